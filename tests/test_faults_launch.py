"""The launcher refuses what this machine cannot run, and one sentence says why a rank ended."""

import os
import queue

import pytest
import torch
from test_launch import TINY, started  # noqa: F401

from grpo_core.cli import main
from grpo_core.commands import launch
from grpo_core.commands.read_ahead import ReadAhead
from grpo_core.commands.train import run_job
from grpo_core.config.sections import LogConfig, RunConfig
from grpo_core.distributed import ranks
from grpo_core.objective.advantages import ADVANTAGES
from grpo_core.objective.losses import LOSSES
from grpo_core.objective.rewards import REWARDS
from grpo_core.schema import ConfigError


@pytest.mark.parametrize("cores, gpus, processes, sentence", [
    (2, 0, 2000, "2,000 processes were asked for on this machine; at most 16 are possible, 8 for each of 2 cores"),
    (1, 0, 16, "16 processes were asked for on this machine; at most 8 are possible, 8 for each of 1 core"),
    (64, 2, 4, "4 processes were asked for on this machine; at most 2 are possible, one for each GPU"),
])  # fmt: skip
def test_more_processes_than_the_machine_can_run_are_refused_before_they_start(
    started, monkeypatch, cores, gpus, processes, sentence  # noqa: F811
):
    monkeypatch.setattr(launch.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: gpus)
    words = [f"trainer.completions_per_step={8 * processes}"]
    with pytest.raises(ConfigError) as error:
        launch.run_launch(processes, TINY, words)
    assert str(error.value) == sentence and started[1] == []
    started[0].append(0)
    limit = processes // 2 if gpus or cores == 1 else 16
    assert launch.run_launch(limit, TINY, [f"trainer.completions_per_step={8 * limit}"]) == 0 and len(started[1]) == 1


@pytest.mark.parametrize("variable, text, sentence", [
    ("NNODES", "two", "NNODES is 'two' in the environment; it must be a whole number of at least 1"),
    ("NNODES", "0", "NNODES is '0' in the environment; it must be a whole number of at least 1"),
    ("NODE_RANK", "-1", "NODE_RANK is '-1' in the environment; it must be a whole number of at least 0"),
    ("NODE_RANK", "2", "NODE_RANK is 2 in the environment; it must be below NNODES, which is 2"),
])  # fmt: skip
def test_a_number_of_machines_that_is_none_is_one_sentence(monkeypatch, capsys, variable, text, sentence):
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv(variable, text)
    assert main(["launch", "--processes", "1", "--config", str(TINY)]) == 2
    assert capsys.readouterr().err == f"grpo_core: {sentence}\n"


ENDS = {  # a file's line -> what the sentence says of it
    "os._exit(7)": "called os._exit(7) while it was imported",
    "os._exit(0)": "called os._exit(0) while it was imported",
    "sys.exit(7)": "called sys.exit(7) while it was imported",
    "sys.exit()": "called sys.exit() while it was imported",
    "raise SystemExit('no key')": "called sys.exit('no key') while it was imported",
}
KINDS = {"rewards[0].name": REWARDS, "loss.name": LOSSES, "advantage.name": ADVANTAGES}


@pytest.mark.parametrize("line", ENDS)
@pytest.mark.parametrize("kind", [*KINDS])
def test_a_file_that_ends_the_process_at_its_import_is_one_sentence(tmp_path, capsys, kind, line):
    path = tmp_path / "mine.py"
    path.write_text(f"import os, sys\n{line}\ndef f(completions):\n    return [0.0 for _ in completions]\n")
    real = os._exit
    assert main(["train", "--config", str(TINY), f"{kind}={path}:f"]) == 2
    assert os._exit is real
    assert capsys.readouterr().err == f"grpo_core: {KINDS[kind].kind} '{path}:f': {path} {ENDS[line]}\n"


@pytest.mark.parametrize("line, sentence", [
    ("os._exit(7)", "called os._exit(7) on a batch of two"),
    ("sys.exit(7)", "called sys.exit(7) on a batch of two"),
])  # fmt: skip
def test_a_loss_that_ends_the_process_is_one_sentence(tmp_path, capsys, line, sentence):
    path = tmp_path / "mine.py"
    head = "def f(logprobs, old_logprobs, advantages, completion_mask):"
    path.write_text(f"import os, sys\n{head}\n    {line}\n")
    assert main(["train", "--config", str(TINY), f"loss.name={path}:f"]) == 2
    assert capsys.readouterr().err == f"grpo_core: loss {path}:f {sentence}\n"
    assert main(["check-loss", f"{path}:f"]) in (1, 2)


def test_a_file_may_fork_processes_that_end_by_themselves(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import os\nif (child := os.fork()) == 0:\n    os._exit(3)\n"
                    "code = os.waitpid(child, 0)[1]\ndef f(completions):\n    return [os.waitstatus_to_exitcode(code)]\n")  # fmt: skip
    assert REWARDS.get(f"{path}:f")(["a"]) == [3]


@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_a_file_that_kills_its_process_at_its_import_is_one_sentence(tmp_path, number):
    path = tmp_path / "mine.py"
    path.write_text(f"import os, signal\nos.kill(os.getpid(), signal.{number})\ndef f(rewards):\n    return rewards\n")
    with pytest.raises(ConfigError, match=f"^the process that imported {path} was ended by {number}$"):
        ReadAhead(TINY, [f"advantage.name={path}:f"]).config()


def wait_for(ends):
    """What the launcher returns after the ranks have ended with these (rank, exit code), in this order."""
    start = object.__new__(launch._Ranks)
    start.ended, start.ranks, start.threads, start.signals = queue.Queue(), dict(ends), [], 0
    for end in ends:
        start.ended.put(end)
    return start.wait()


@pytest.mark.parametrize("ends, code, sentence", [
    ([(1, -9), (0, 5)], 137, "rank 1 was ended by SIGKILL"),
    ([(0, 5), (1, -9)], 137, "rank 1 was ended by SIGKILL"),
    ([(0, 5), (2, 5), (1, -11)], 139, "rank 1 was ended by SIGSEGV"),
    ([(0, 5), (1, 4)], 4, "rank 1 failed with exit code 4"),
    ([(0, 5), (1, 0)], 5, "rank 0 lost its connection to another rank"),
    ([(1, 143), (0, 143)], 143, None),
    ([(1, 130), (0, 130)], 130, None),
    ([(1, -15), (0, 5)], 143, "rank 1 was ended by SIGTERM"),
    ([(1, 3), (0, 5)], 3, None),
    ([(0, 0), (1, 0)], 0, None),
])  # fmt: skip
def test_one_sentence_says_which_rank_ended_the_run(capsys, ends, code, sentence):
    assert wait_for(ends) == code
    assert capsys.readouterr().err == (f"grpo_core: {sentence}\n" if sentence else "")


LOST = [
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:56484: Connection reset by peer. This is",
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3421",
    "[../gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete",
    "[../gloo/gloo/transport/tcp/pair.cc:144] Write error: Broken pipe",
]


@pytest.mark.parametrize("message", LOST)
def test_a_rank_that_lost_another_one_leaves_the_sentence_to_the_launcher(monkeypatch, capsys, message):
    def job(config):
        raise RuntimeError(message)

    monkeypatch.setattr("grpo_core.distributed.ranks.die_with_launcher", lambda: None)
    monkeypatch.setenv("GRPO_CORE_FOLDER_NOTE", "note")
    assert run_job(job, RunConfig()) == 5 and capsys.readouterr().err == ""
    assert run_job(job, RunConfig(log=LogConfig(verbose=True))) == 5 and "Traceback" in capsys.readouterr().err
    monkeypatch.delenv("GRPO_CORE_FOLDER_NOTE")
    assert run_job(job, RunConfig()) == 5
    assert capsys.readouterr().err == "grpo_core: rank 0 lost its connection to another rank\n"


@pytest.mark.parametrize("error", [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("the judge's server timed out"),
    torch.distributed.DistBackendError("ncclUnhandledCudaError: Call to CUDA function failed: out of memory"),
    ValueError("gloo: connection reset"),
], ids=lambda error: str(error)[:20])  # fmt: skip
def test_an_error_of_the_ranks_own_is_shown(monkeypatch, error):
    def job(config):
        raise error

    monkeypatch.setattr("grpo_core.distributed.ranks.die_with_launcher", lambda: None)
    with pytest.raises(type(error)):
        run_job(job, RunConfig())


def test_two_starts_at_the_same_moment_meet_in_places_of_their_own(tmp_path, monkeypatch):
    environments = []

    class Process:
        def __init__(self, command, env, **options):
            environments.append(env)

        def wait(self):
            return 0

    monkeypatch.setattr(launch.subprocess, "Popen", Process)
    monkeypatch.setattr(launch, "can_fork", lambda: False)
    monkeypatch.setattr(launch.signal, "signal", lambda number, handler: None)
    for _ in range(2):  # of two runs, or of a run and its restart
        assert launch._Ranks(2, None, [], tmp_path / "folder").wait() == 0
    stores = [env["GRPO_CORE_STORE"] for env in environments]
    assert stores[0] == stores[1] != stores[2] == stores[3] and not any(os.path.exists(store) for store in stores)
    assert {env["MASTER_PORT"] for env in environments} == {"0"}, "a port that is free now may be another run's later"
    for env, rank in zip(environments, (0, 1, 0, 1), strict=True):
        monkeypatch.setattr(ranks.os, "environ", env)
        made = ranks._make_store()
        assert made["rank"] == rank and made["world_size"] == 2 and isinstance(made["store"], torch.distributed.FileStore)


def test_a_single_process_and_other_launchers_ranks_meet_as_they_should(monkeypatch):
    monkeypatch.setattr(ranks.os, "environ", {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"})
    assert isinstance(ranks._make_store()["store"], torch.distributed.HashStore)
    monkeypatch.setattr(ranks.os, "environ", {"RANK": "0", "WORLD_SIZE": "4", "MASTER_PORT": "29500", "GRPO_CORE_STORE": "x"})
    assert ranks._make_store() == {}


def test_a_port_that_is_taken_is_one_sentence(monkeypatch):
    def fail(*words, **settings):
        raise ranks.dist.DistNetworkError("The server socket has failed to listen on port 29500: EADDRINUSE\nException raised from")

    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(ranks.dist, "init_process_group", fail)
    with pytest.raises(ConfigError, match="^rank 0 cannot join the others at 127.0.0.1:29500, MASTER_ADDR:.*EADDRINUSE$"):
        ranks.setup()
