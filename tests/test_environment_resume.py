"""A run whose environment answers after random delays, killed in the middle of a step, is the run that was left alone.

When answers come decides which rows are decoded together, so two runs differ by rounding. They are compared with the
same answers at the same moments: the run that is left alone reads those that the killed and resumed one has recorded.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_faults import run
from test_run import read, without_times

pytestmark = pytest.mark.slow

GAME = '''
import asyncio
import random


class Game:
    """Answers three turns with their lengths; every answer comes after 0 to 50 ms and is noted in a file."""

    def __init__(self, row, seed, *, notes=""):
        self.notes, self.delays = notes, random.SystemRandom()

    async def step(self, turn):
        await asyncio.sleep(self.delays.uniform(0, 0.05))
        with open(self.notes, "a") as file:
            file.write("x")
        return None if turn.number == 3 else f" {len(turn.text)} ="
'''
STEPS = {"sampling__max_new_tokens": 32, "evaluation__num_tasks": 0, "reference__every": 0, "data__curriculum": "{}", "data__limit": 50, "debug__dump_batches": 1}  # answers of steps with a saved batch stay
ANSWERS = 8 * 3  # of a rank in a step, but for completions that have no room left


@pytest.fixture
def train(tmp_path, environment):
    """Train in a folder of this name with so many processes; return what the command did, and the run folder."""
    (tmp_path / "game.py").write_text(GAME)

    def start(name, processes, attempts, *words, fault=None):
        out = tmp_path / name
        game = [f"environment.name={tmp_path}/game.py:Game", f"environment.args={{notes: {tmp_path / 'notes'}}}"]
        game += ["environment.max_turn_tokens=4", "environment.max_turns=4", f"trainer.completions_per_step={8 * processes}"]
        return run(processes, out, *game, *words, environment=environment, fault=fault, sampling__dynamic_attempts=attempts, **STEPS), out / "tiny"

    return start


def contents(folder):
    """The rows that a run has written, without times, and its last weights."""
    (weights,) = (folder / "adapter").glob("*.safetensors")
    return [without_times(read(folder / f"{kind}.jsonl")) for kind in ("metrics", "completions")], load_file(weights)


def polls(folder, rank):
    files = sorted((folder / "turns").glob(f"step-*-rank-{rank}.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line]


@pytest.mark.parametrize("processes, attempts", [
    (2, 0),
    pytest.param(1, 0, marks=pytest.mark.soak),
    pytest.param(2, 1, marks=pytest.mark.soak),
])  # fmt: skip
def test_a_run_killed_in_the_middle_of_a_step_and_resumed_is_bitwise_the_run_left_alone(train, tmp_path, processes, attempts):
    fault = {"what": "kill", "where": "answer", "rank": processes - 1, "calls": [3 * (1 + attempts) * ANSWERS - 10]}
    done, killed = train("killed", processes, attempts, fault=fault)
    assert done.returncode == 137 and len(read(killed / "metrics.jsonl")) == 2, done.stderr
    begun = [line for line in polls(killed, processes - 1) if "complete" in line]
    assert 2 <= len(begun) <= 2 + 3 * attempts  # the call in which it was killed is not among them
    done, killed = train("killed", processes, attempts, "resume=auto")
    assert done.returncode == 0 and "asked again" not in done.stdout, done.stderr
    (metrics, completions), weights = contents(killed)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3] and max(row["turns"] for row in metrics) > 3
    notes = (tmp_path / "notes").read_text()
    shutil.copytree(killed / "turns", tmp_path / "alone" / "tiny" / "turns")
    done, alone = train("alone", processes, attempts)
    assert done.returncode == 0 and "asked again" not in done.stdout, done.stderr
    assert (tmp_path / "notes").read_text() == notes  # nobody was asked
    (metrics_, completions_), weights_ = contents(alone)
    assert metrics == metrics_ and completions == completions_ and weights.keys() == weights_.keys()
    assert all(torch.equal(value, weights_[name]) for name, value in weights.items())
    assert polls(alone, 0) == polls(killed, 0)
