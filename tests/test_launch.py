"""What the launcher starts, and starts again."""

import subprocess
from pathlib import Path

import pytest

from grpo_core.commands import launch
from grpo_core.schema import ConfigError

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"


@pytest.fixture
def started(monkeypatch):
    """Ends of the starts to come, and the overrides that each was given."""
    ends, given = [], []

    class Ranks:
        def __init__(self, processes, config, overrides, note):
            given.append(overrides)
            note.write_text("/runs/tiny")

        def wait(self):
            return ends.pop(0)

    monkeypatch.setattr(launch, "_Ranks", Ranks)
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
