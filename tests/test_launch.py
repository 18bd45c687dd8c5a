"""What the launcher starts, and starts again."""

import subprocess
import sys
from pathlib import Path

import pytest

from grpo_core.commands import launch
from grpo_core.commands.read_ahead import ReadAhead
from grpo_core.config.files import load
from grpo_core.data import tasks
from grpo_core.model.loading import load_tokenizer
from grpo_core.schema import ConfigError

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"


@pytest.fixture
def started(monkeypatch):
    """Ends of the starts to come, and the overrides that each was given."""
    return replace_ranks(monkeypatch, None)


def replace_ranks(monkeypatch, folder):
    ends, given = [], []

    class Ranks:
        def __init__(self, processes, config, overrides, note):
            given.append(overrides)
            note.write_text(str(folder or "/runs/tiny"))

        def wait(self):
            return ends.pop(0)

    monkeypatch.setattr(launch, "_Ranks", Ranks)
    monkeypatch.setattr(launch, "can_fork", lambda: False)
    return ends, given


def test_a_restart_goes_on_in_the_folder_of_the_run_and_removes_nothing(started):
    ends, given = started
    ends += [137, 1, 0]
    assert launch.run_launch(2, TINY, ["overwrite=true", "seed=3", "trainer.max_restarts=5"]) == 0
    assert given[0] == ["overwrite=true", "seed=3", "trainer.max_restarts=5"]
    again = ["seed=3", "trainer.max_restarts=5", "overwrite=false", "resume=/runs/tiny"]
    assert given[1:] == [again, again]


@pytest.mark.parametrize("end", [0, 2, 130, 143])
def test_what_a_restart_would_not_mend_is_final(started, end):
    ends, given = started
    ends += [end]
    assert launch.run_launch(1, TINY, ["trainer.max_restarts=5"]) == end and len(given) == 1


@pytest.mark.parametrize("code, writes", [(137, True), (137, False), (2, True), (143, True)])
def test_a_run_that_was_ended_from_outside_says_from_where_it_continues(monkeypatch, tmp_path, capsys, code, writes):
    (ends, _), step = replace_ranks(monkeypatch, tmp_path), tmp_path / "checkpoints" / "step-000004"
    ends += [code]
    if writes:
        step.mkdir(parents=True)
    assert launch.run_launch(1, TINY, []) == code
    advice = f"grpo_core: resume={tmp_path} continues the run from step-000004\n"
    assert capsys.readouterr().err == (advice if writes and code == 137 else "")


def test_restarts_are_counted(started):
    ends, given = started
    ends += [4, 3, 137]
    assert launch.run_launch(1, TINY, ["trainer.max_restarts=2"]) == 137 and len(given) == 3


@pytest.mark.parametrize("word", ["two", "0", "2x"])
def test_a_number_of_processes_that_is_none_is_told_by_launch_sh(word):
    done = subprocess.run(["bash", "launch.sh", word, "seed=1"], cwd=TINY.parents[1], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"PROCESSES is '{word}'; it must be a whole number of at least 1.\n"


def test_a_batch_that_does_not_divide_is_told_before_anything_starts(started):
    with pytest.raises(ConfigError, match="must be a multiple of sampling.group_size × processes"):
        launch.run_launch(3, TINY, [])
    assert started[1] == []


FORKED = """
import os, signal
from grpo_core.commands import forked_rank

def check(config, overrides):
    apart = os.getsid(0) == os.getpid() != os.getsid(os.getppid())
    default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    open_to = not {signal.SIGTERM, signal.SIGINT} & signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return 0 if apart and default and open_to and os.environ["RANK"] == "1" and overrides == ["seed=3"] else 7

forked_rank.run_train = check
signal.signal(signal.SIGTERM, lambda number, frame: None)
rank = forked_rank.ForkedRank(None, ["seed=3"], {**os.environ, "OMP_NUM_THREADS": "1", "RANK": "1"})
print("exit code", rank.wait(), rank.poll())
"""


def test_a_forked_rank_has_a_session_and_signals_of_its_own(environment):
    """Ctrl-C in a terminal reaches the whole session: a rank in the launcher's would get it twice, and end at once."""
    done = subprocess.run(["python", "-c", FORKED], env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout == "exit code 0 0\n", done.stderr


def test_what_is_read_ahead_is_what_a_rank_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "_offered", None)
    (tmp_path / "only_there.py").write_text("def best(rewards):\n    return rewards - rewards.mean(dim=1, keepdim=True)\n")
    words = ["data.limit=200", "evaluation.num_tasks=20", f"advantage.name={tmp_path}/only_there.py:best"]
    ahead = ReadAhead(TINY, words)
    config = ahead.config()
    assert "grpo_core_user_only_there" not in sys.modules and config == load(TINY, words)
    read = ahead.tasks()
    assert read == tasks.read_tasks(config, load_tokenizer("builtin:tiny")) and len(read[0]) == 200
    assert tasks.find_offered_tasks(config) is None
    tasks.offer_tasks(config, read)
    assert tasks.find_offered_tasks(load(TINY, [*words, "seed=3", "resume=auto"])) is read
    assert tasks.find_offered_tasks(load(TINY, ["data.limit=199", *words[1:]])) is None


def test_what_cannot_be_read_ahead_is_told_as_ever_or_left_to_the_ranks(tmp_path):
    with pytest.raises(ConfigError, match="unknown key trainer.num_step"):
        ReadAhead(TINY, ["trainer.num_step=3"]).config()
    with pytest.raises(ConfigError, match="there is no file .*nowhere.jsonl"):
        ReadAhead(TINY, [f"data.path={tmp_path}/nowhere.jsonl"]).config()
    (tmp_path / "rows.jsonl").write_text('{"text": "no question"}\n')
    ahead = ReadAhead(TINY, [f"data.path={tmp_path}/rows.jsonl"])
    assert ahead.config().data.path and ahead.tasks() is None
