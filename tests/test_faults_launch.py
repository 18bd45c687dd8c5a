"""The launcher refuses what this machine cannot run, and one sentence says why a rank ended."""

import os

import pytest
from test_launch import TINY, started  # noqa: F401

from grpo_core.cli import main
from grpo_core.commands import launch
from grpo_core.commands.read_ahead import ReadAhead
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
