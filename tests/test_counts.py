"""Numbers in messages: singular and plural, separators, and where the number of steps comes from."""

from dataclasses import replace

import pytest

from grpo_core.config.sections import RunConfig, SamplingConfig, TrainerConfig
from grpo_core.training.setup import note_steps

SMALL = TrainerConfig(completions_per_step=64)


@pytest.mark.parametrize("trainer, num_tasks, sentence", [
    (SMALL, 20_000, "the run has 7,500 steps: trainer.epochs (3, the default) × 20,000 tasks / 8 in each step"),
    (replace(SMALL, epochs=0.5), 20_000, "the run has 1,250 steps: trainer.epochs (0.5) × 20,000 tasks / 8 in each step"),
    (SMALL, 1, "the run has 1 step: trainer.epochs (3, the default) × 1 task / 8 in each step"),
    (replace(SMALL, num_steps=5), 20_000, None),
])  # fmt: skip
def test_a_number_of_steps_that_no_key_sets_is_said_with_its_origin(capsys, trainer, num_tasks, sentence):
    config = RunConfig(trainer=trainer, sampling=SamplingConfig(group_size=8))
    note_steps(config, num_tasks, config.prompts_per_step)
    said = f"note: trainer.num_steps is not set, so {sentence}\n" if sentence else ""
    assert capsys.readouterr().out == said
