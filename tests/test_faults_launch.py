"""The launcher refuses what this machine cannot run, and one sentence says why a rank ended."""

import pytest
from test_launch import TINY, started  # noqa: F401

from grpo_core.cli import main
from grpo_core.commands import launch
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
