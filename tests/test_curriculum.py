"""The pass rates of the prompts are kept, and a curriculum's order is a function of the seed, the step and them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_loop import count_good, make_run, rows

from grpo_core.batch import Task
from grpo_core.config.files import load_overrides
from grpo_core.config.sections import CurriculumConfig, DataConfig, EvaluationConfig
from grpo_core.data.pass_rates import PassRates
from grpo_core.data.stream import TaskStream
from grpo_core.distributed import ranks
from grpo_core.schema import ConfigError
from grpo_core.scoring.scoring import Reward
from grpo_core.training import checkpoint
from grpo_core.training.trainer import train

GROUP = 4
BOTH = CurriculumConfig(rest_after=2, rest_epochs=2, prefer=[0.2, 0.8])


def make_tasks(count=10):
    return [Task(i, "p", [1], {}) for i in range(count)]


def make_stream(curriculum=BOTH, count=10, per_step=4, seed=3, rank=0, world_size=1):
    tasks = make_tasks(count)
    rates = PassRates(tasks)
    return TaskStream(tasks, per_step, seed, rank, world_size, rates=rates, curriculum=curriculum), rates


def number_of_passes(task, step, place):
    """Some outcome of a group."""
    return (7 * task.index + 3 * step + 2 * place) % (GROUP + 1)


def take_steps(stream, rates, steps, passes=number_of_passes):
    """The tasks of each step, after each of which the outcomes are noted."""
    drawn = []
    for step in steps:
        tasks = stream.batch(step)
        assert stream.batch(step) == tasks  # looking changes nothing
        drawn.append([task.index for task in tasks])
        rates.note(tasks, [passes(task, step, task.seed[-1]) for task in tasks], [GROUP] * len(tasks))
        stream.end_step(step, rates.end_step())
    return drawn


@pytest.mark.parametrize("count, per_step", [(10, 4), (7, 7), (3, 8)])
def test_where_no_prompt_rests_the_order_is_that_without_a_curriculum(count, per_step):
    stream, rates = make_stream(CurriculumConfig(rest_after=9), count, per_step)
    plain = TaskStream(make_tasks(count), per_step, 3)
    assert take_steps(stream, rates, range(9), lambda task, step, place: 1) == [[task.index for task in plain.batch(step)] for step in range(9)]
    assert [stream.replacements(9, 1), stream.replacements(9, 2)] == [plain.replacements(9, 1), plain.replacements(9, 2)]


def test_without_a_rule_the_outcomes_are_kept_and_change_no_order():
    stream, rates = make_stream(CurriculumConfig())
    plain = TaskStream(make_tasks(), 4, 3)
    assert take_steps(stream, rates, range(5)) == [[task.index for task in plain.batch(step)] for step in range(5)]
    assert rates.judged.sum() == 5 * 4 * GROUP and rates.passed.sum() > 0


def test_a_prompt_that_was_solved_n_times_running_rests_for_k_epochs():
    stream, rates = make_stream(CurriculumConfig(rest_after=2, rest_epochs=3), count=4, per_step=1)
    drawn = [row for (row,) in take_steps(stream, rates, range(30), lambda task, step, place: GROUP if task.index == 0 else 1)]
    first, second, third = [place for place, row in enumerate(drawn) if row == 0][:3]
    assert first < 4 <= second < 8  # in each of the first two epochs; then three epochs of the three others
    assert 8 + 3 * 3 <= third < 8 + 3 * 3 + 4
    assert rates.streak[0] == sum(row == 0 for row in drawn) and rates.streak[1] == 0


def test_a_group_that_is_not_solved_or_was_not_judged_does_not_let_it_rest():
    stream, rates = make_stream(CurriculumConfig(rest_after=2, rest_epochs=3), count=1, per_step=1)
    for passed, judged, streak in ((4, 4, 1), (0, 0, 1), (3, 4, 0), (4, 4, 1), (2, 2, 2)):
        rates.note(stream.batch(len(rates._visits)), [passed], [judged])
        stream.end_step(0, rates.end_step())
        assert rates.streak[0] == streak
    assert (rates.passed[0], rates.judged[0]) == (13, 14) and rates.rate(0) == 13 / 14


def test_of_two_rules_the_longer_rest_counts_and_a_group_without_a_value_lets_nothing_rest():
    stream, rates = make_stream(BOTH, count=2, per_step=1)
    for judged, due in ((4, [2]), (4, [2 + 3]), (0, [2 + 3 + 1])):  # outside of the bounds; solved twice; not judged
        task = replace(make_tasks(1)[0], seed=(0, 0))
        rates.note([task], [judged], [judged])
        visits = rates.end_step()
        stream.parts[0].order.end_step([0], visits)
        assert rates.due[0] == due[0]


def test_prompts_outside_of_the_bounds_come_in_every_second_epoch():
    passes = {0: 0, 1: 1, 2: 3, 3: 4}  # of 4: outside, inside, inside, outside
    stream, rates = make_stream(CurriculumConfig(prefer=[0.25, 0.75]), count=4, per_step=1)
    drawn = [row for (row,) in take_steps(stream, rates, range(6 * 20), lambda task, step, place: passes[task.index])]
    assert [drawn.count(row) for row in range(4)] == [20, 40, 40, 20]
    for epoch in range(10):
        both = drawn[6 * epoch : 6 * epoch + 6]
        assert sorted(both[:4]) == [0, 1, 2, 3] and sorted(both[4:]) == [1, 2]


def test_replacements_leave_out_prompts_that_rest():
    stream, rates = make_stream(CurriculumConfig(rest_after=1, rest_epochs=5), count=6, per_step=2)
    take_steps(stream, rates, range(3), lambda task, step, place: GROUP * (task.index < 3))
    assert {task.index for attempt in range(1, 9) for task in stream.replacements(3, attempt)} == {3, 4, 5}


def test_the_order_is_a_function_of_the_seed_the_step_and_the_pass_rates():
    whole = take_steps(*make_stream(), range(30))
    assert whole == take_steps(*make_stream(), range(30)) != take_steps(*make_stream(seed=4), range(30))
    assert whole != [[task.index for task in TaskStream(make_tasks(), 4, 3).batch(step)] for step in range(30)]
    for cut in (1, 7, 20):
        stream, rates = make_stream()
        first = take_steps(stream, rates, range(cut))
        resumed, loaded = make_stream()
        loaded.load(rates.tensors())
        assert first + take_steps(resumed, loaded, range(cut, 30)) == whole


@pytest.mark.parametrize("count", [10, 3])  # of 3 prompts a step has each more than once
def test_two_ranks_draw_what_one_draws(monkeypatch, count):
    """The outcomes of both are counted on both, in the order of the prompts."""
    alone, rates = make_stream(count=count)
    two = [make_stream(rank=rank, world_size=2, count=count) for rank in range(2)]
    for step in range(20):
        parts = [stream.batch(step) for stream, _ in two]
        assert parts[0] + parts[1] == alone.batch(step)
        take_steps(alone, rates, [step])
        for (_, own), tasks in zip(two, parts, strict=True):
            own.note(tasks, [number_of_passes(task, step, task.seed[-1]) for task in tasks], [GROUP] * 2)
        together = torch.cat([torch.tensor(own._visits) for _, own in reversed(two)])
        monkeypatch.setattr(ranks, "all_rows", lambda values, together=together: together)
        for stream, own in two:
            stream.end_step(step, own.end_step())
        monkeypatch.undo()
        for _, own in two:
            assert all(np.array_equal(own.tensors()[name], value) for name, value in rates.tensors().items())


def test_a_checkpoint_of_other_tasks_is_left_alone():
    _, rates = make_stream()
    rates.load({"prompts/passed": torch.ones(3), "prompts/judged": torch.ones(3)})
    assert not rates.judged.any() and np.isnan(rates.rate(0))


def make_curriculum_run(folder, **fields):
    """A run on fakes: a prompt is right where the completion has at least one good letter."""
    curriculum = CurriculumConfig(rest_after=1, rest_epochs=1, prefer=[0.1, 0.9])
    change = lambda config: replace(  # noqa: E731
        config, data=DataConfig(curriculum=curriculum), evaluation=EvaluationConfig(num_tasks=0, reward="good"),
        sampling=replace(config.sampling, dynamic_attempts=1),
    )  # fmt: skip
    run = make_run(folder, change=change, num_steps=8)
    tasks = [Task(i, "p", [2 + i, 3, 4], {"answer": "x", "row": i}) for i in range(9)]
    rates = PassRates(tasks)
    stream = TaskStream(tasks, 4, 0, rates=rates, curriculum=curriculum)
    good = Reward("good", 1.0, lambda completions: [min(1.0, x) for x in count_good(completions)])
    return replace(run, tasks=stream, pass_rates=rates, rewards=[good], **fields)


def test_a_run_counts_every_group_and_goes_on_from_its_checkpoint_bitwise(tmp_path, monkeypatch):
    whole = make_curriculum_run(tmp_path / "whole")
    train(whole)
    metrics, completions = rows(tmp_path / "whole"), rows(tmp_path / "whole", "completions")
    groups = 8 * 4 + sum(row["resampled_groups"] for row in metrics)
    assert whole.pass_rates.judged.sum() == 8 * groups and 0 < whole.pass_rates.passed.sum() < 8 * groups
    assert metrics[-1]["resting_prompts"] > 0

    cut = make_curriculum_run(tmp_path / "cut")
    train(replace(cut, num_steps=3))
    saved = tmp_path / "cut" / "checkpoints" / "step-000003"
    resumed = make_curriculum_run(tmp_path / "rest", policy=cut.policy, engine=cut.engine, sampler=cut.sampler, start_step=3)
    handed_on = []
    monkeypatch.setattr(resumed.engine, "load", lambda tensors, numbers: handed_on.extend(tensors), raising=False)
    checkpoint.load(saved, checkpoint.read_meta(saved, resumed.config)[0], resumed)
    assert resumed.pass_rates.judged.sum() > 0 and handed_on and not [name for name in handed_on if name.startswith("prompts/")]
    train(resumed)
    drawn = [[(row["step"], row["task"], row["text"]) for row in part] for part in (completions, rows(tmp_path / "rest", "completions"))]
    assert drawn[0][3 * 32 :] == drawn[1]
    last = [load_file(run.folder / "checkpoints" / "step-000008" / "tensors.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(value, last[1][name]) for name, value in last[0].items()) and "prompts/due" in last[0]


@pytest.mark.parametrize(
    "words, message",
    [
        (["data.curriculum.prefer=[0.9, 0.1]"], r"data.curriculum.prefer is \[0.9, 0.1\]; it must be two pass rates"),
        (["data.curriculum.prefer=[0.1]"], "it must be two pass rates"),
        (["data.curriculum.rest_after=-1"], "data.curriculum.rest_after is -1; it must be at least 0"),
        (["data.curriculum.rest_epochs=0"], "data.curriculum.rest_epochs is 0; it must be at least 1"),
        (["data.curriculum.rest_after=1", "rewards=[think_format]"], r"needs evaluation.reward \(correct_answer\) among the rewards"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(ConfigError, match=message):
        load_overrides(words)
