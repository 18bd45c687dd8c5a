"""Numbers in messages: singular and plural, separators, and where the number of steps comes from."""

import ast
import re
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from test_architecture import MODULES, tree_of

from grpo_core.config.sections import DataConfig, RunConfig, SamplingConfig, TrainerConfig
from grpo_core.counts import format_fixed, format_significant, name_interval, quantify
from grpo_core.monitor.run_log import _format_step
from grpo_core.report.summary import average_last_steps
from grpo_core.training.setup import describe_tasks, note_steps

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


def test_singular_plural_and_separators():
    assert quantify(1, "step") == "1 step" and quantify(0, "step") == "0 steps" and quantify(7500, "step") == "7,500 steps"
    assert quantify(1, "process", "processes") == "1 process" and quantify(2, "process", "processes") == "2 processes"
    assert quantify(1.0, "epoch") == "1 epoch" and quantify(0.0048, "epoch") == "0.0048 epochs"
    assert name_interval(1, "step") == "step" and name_interval(5, "step") == "5 steps"


NOUNS = "steps tasks tokens completions processes prompts rows values samples problems epochs groups targets passes minibatches micro-batches cores times"
PLURAL = re.compile(rf" (?:\w+ )?(?:{'|'.join(NOUNS.split())})\b")
SENTENCES_OF_DATA = {"data/word_problems"}


def plurals_without_a_singular(tree):
    """Lines in which a number that is not a constant is followed by a plural, which is wrong for 1."""
    for node in ast.walk(tree):
        parts = node.values if isinstance(node, ast.JoinedStr) else []
        for part, after in pairwise(parts):
            if isinstance(part, ast.FormattedValue) and isinstance(after, ast.Constant) and PLURAL.match(after.value):
                is_constant = isinstance(part.value, ast.Name) and part.value.id.isupper()
                is_counted = isinstance(part.value, ast.Call) and getattr(part.value.func, "id", "") == "quantify"
                if not is_constant and not is_counted:
                    yield node.lineno, ast.unparse(part.value) + after.value[:20]


@pytest.mark.parametrize("name", [name for name in MODULES if name not in SENTENCES_OF_DATA])
def test_counts_in_messages_are_written_by_one_function(name):
    assert [*plurals_without_a_singular(tree_of(name))] == []


def test_a_plural_without_a_singular_is_seen():
    assert [*plurals_without_a_singular(ast.parse("f'{n} steps', f'{n:,} new tokens of {m}'"))] == [(1, "n steps"), (1, "n new tokens of ")]
    assert [*plurals_without_a_singular(ast.parse("f'{MOST} steps {n} step {quantify(n, \"row\")} tokens'"))] == []


def test_numbers_that_are_rounding_errors_are_zero():
    assert format_fixed(-5.4e-09, 4) == "0.0000" and format_fixed(-0.25, 3) == "-0.250"
    assert format_significant(-5.4e-09) == "0" and format_significant(0.0123456) == "0.01235"
    row = {"reward": -1e-9, "tied_groups": 0.0, "length": 8.0, "kl": -5.4e-09, "grad_norm": 1.0, "seconds": 1.0, "skipped": 0.0}
    assert _format_step(row, []).startswith("reward 0.000  tied 0%  length 8  kl 0.0000  grad")
    run = SimpleNamespace(metrics=[{"kl": -5.4e-09, "loss": -3e-09, "logprob_gap": 1e-07}], is_supervised=False)
    assert average_last_steps(run) == {"Loss": "0", "KL, nats per token": "0", "Sampler to trainer, nats": "1e-07"}


@pytest.mark.parametrize("number, line", [
    (1, "1 task (0 dropped, because the prompt has more than 1 token)"),
    (7473, "7,473 tasks (0 dropped, because the prompt has more than 1 token)"),
])  # fmt: skip
def test_the_tasks_of_a_run_are_counted(number, line):
    prepared = SimpleNamespace(tasks=range(number), num_too_long=0, tokenizer=None)
    assert describe_tasks(RunConfig(data=DataConfig(max_prompt_tokens=1)), prepared) == line
