"""Lint, format and types, with the tools of the test extra."""

import subprocess
import sys

import pytest
from conftest import ROOT

COMMANDS = (
    ["ruff", "check", "grpo_core", "tests", "benchmarks", "examples"],
    ["ruff", "format", "--check", "grpo_core", "examples"],
    ["mypy"],  # pyproject.toml says which files: the mathematics, strictly
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_it_finds_nothing(command, tmp_path):
    cache = ["--cache-dir", str(ROOT / ".mypy_cache" if command == ["mypy"] else tmp_path)]  # it reads all of torch
    done = subprocess.run([sys.executable, "-m", *command, *cache], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
