"""The walk through a new loss in docs/loss.md, each command as it is written there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_run import SHORT

from grpo_core.objective.advantage_laws import check_advantage
from grpo_core.objective.advantages import ADVANTAGES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "loss.md").read_text()
SECTION = re.search(r"## From an idea to a trained loss in five commands\n(.*?)\n## ", PAGE, re.S)[1]
COMMANDS = re.findall(r"^    (.+)$", re.sub(r"```.*?```", "", SECTION, flags=re.S), re.M)
(PYTHON,) = re.findall(r"```python\n(.*?)```", SECTION, re.S)
(ADVANTAGE,) = re.findall(r"```python\n(# my_advantages.py.*?)```", PAGE, re.S)


def test_there_are_the_five_commands():
    starts = [
        "python -m grpo_core losses",
        "python -m grpo_core check-loss",
        "sed -i",
        "bash launch.sh 2",
        "head -n 10",
    ]
    assert [command[: len(start)] for command, start in zip(COMMANDS, starts, strict=True)] == starts


@pytest.mark.slow
def test_they_do_what_is_said(tmp_path, environment):
    """In a copy of the repository, so that my_losses.py and runs/ are nobody's; the run is cut to two steps."""
    for name in ("grpo_core", "configs", "launch.sh", "environment.sh", "pyproject.toml", "constraints.txt"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    (tmp_path / "my_losses.py").write_text(PYTHON)
    environment = {**environment, "PYTHONPATH": environment["PYTHONPATH"].replace(str(ROOT), str(tmp_path), 1)}

    def run(command):
        return subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    assert run(COMMANDS[0]).returncode == 0
    first = run(COMMANDS[1])
    assert first.returncode == 1 and re.findall(r"^FAILS +(\w+) +(\S+)", first.stdout, re.M) == [("on_policy", "0.08")]
    again = run(COMMANDS[2])
    assert again.returncode == 0 and "13 laws, all passed" in again.stdout, again.stdout
    assert re.search(r"^A > 0 +0.123 +0.616 +1 +1.62 +8.14 +nonzero everywhere$", again.stdout, re.M), again.stdout
    short = " ".join([*SHORT, "trainer.num_steps=2", "output_dir=runs"])
    trained = run(f"{COMMANDS[3]} {short}")
    assert trained.returncode == 0, trained.stderr
    shown = run(COMMANDS[4]).stdout
    assert "-(r**0.7 / 0.7) A" in shown
    assert (tmp_path / "runs" / "soft" / "code" / "my_losses.py").read_text() == (tmp_path / "my_losses.py").read_text()
    assert '"accuracy"' in shown


def test_the_advantage_shown_is_sound(tmp_path):
    (tmp_path / "mine.py").write_text(ADVANTAGE)
    assert all(outcome.ok for outcome in check_advantage(ADVANTAGES.get(f"{tmp_path / 'mine.py'}:tempered")))
