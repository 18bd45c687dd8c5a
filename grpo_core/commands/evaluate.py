"""The `evaluate` command: measure a policy on held-out problems and compare it with its base model.

The policy and the base model answer every problem once greedily and `samples` times at a temperature.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_core.batch import SamplingParams, Task
from grpo_core.commands.evaluate_table import format_problems, format_table
from grpo_core.commands.open_policy import OpenedPolicy, open_source
from grpo_core.config.sections import ENVIRONMENT_REWARD, DataConfig, RunConfig
from grpo_core.counts import quantify
from grpo_core.data.encoding import describe_prompt_changes
from grpo_core.data.eval_sets import describe_set, load_eval_sets
from grpo_core.data.prompts import make_tasks
from grpo_core.data.rows import describe_eval_source, load_rows, load_splits, name_split
from grpo_core.data.trained_rows import warn_of_trained_rows
from grpo_core.data.turns import describe_dropped_turns
from grpo_core.distributed import ranks
from grpo_core.environments.setup import sample_turns
from grpo_core.monitor.completion_rows import completion_rows, make_turn_columns
from grpo_core.monitor.progress import progress_bar
from grpo_core.objective.rewards import REWARDS
from grpo_core.random_keys import make_key
from grpo_core.registry import get_fact
from grpo_core.report.eval_sets import label_set
from grpo_core.report.whole_files import write_whole
from grpo_core.schema import (
    GENERATED,
    ConfigError,
    describe_impossible_path,
    finite_or_none,
    keyword_arguments,
    list_known,
)
from grpo_core.scoring.scoring import Reward, Scores, build_reward, score
from grpo_core.training import run_dir
from grpo_core.training.eval_statistics import bootstrap_interval, majority_at_k, mcnemar, pass_at_k, wilson_interval
from grpo_core.training.gold_answers import check_gold_answers, drop_unjudged
from grpo_core.training.prepare import check_columns, make_rewards

GREEDY = SamplingParams(greedy=True)
CORRECT, STRICT = " correct", " strict"  # begin with a space, so they cannot be the name of a reward
MARKS = {"correct": CORRECT, "strict": STRICT}  # column of completions.jsonl -> reward
ALL_ROWS = 10**9
FILES = ("evaluate.json", "evaluate.txt", "completions.jsonl")
Row = dict[str, Any]  # one completion, as in completions.jsonl
Figures = dict[str, list[float]]  # name -> one number per problem


def run_evaluate(
    source: str,
    overrides: Sequence[str] = (),
    config: Path | None = None,
    *,
    data: str | None = None,
    split: str | None = None,
    eval_set: str | None = None,
    limit: int | None = None,
    samples: int = 8,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    max_new_tokens: int | None = None,
    rewards: Sequence[str] = (),
    base: bool = True,
    output: Path | None = None,
) -> int:
    """Evaluate, print the table, and write evaluate.json, evaluate.txt and completions.jsonl. Returns 0.

    Under torchrun the problems are divided among the processes.

    Raises:
        ConfigError: the source cannot be opened, the data cannot be loaded or scored, or a setting is out of range.
    """
    settings = _check_settings(temperature, top_k, top_p, min_p)
    overrides = [*overrides, *([f"sampling.max_new_tokens={max_new_tokens}"] if max_new_tokens else [])]
    chosen = json.dumps([{"name": name} for name in rewards], ensure_ascii=False)
    overrides += [f"rewards={chosen}"] if rewards else []
    _start(data, output)
    opened = open_source(source, overrides, config=config, notify=print)
    opened, eval_set = choose_source(opened, eval_set, keeps_rewards=bool(rewards))
    warnings: list[str] = []
    tasks, description = load_problems(opened, data, split, limit, eval_set, warnings)
    tasks = _check_problems(opened, tasks, description, warnings)
    folder = output or (opened.folder or Path()) / name_folder(opened.steps, data)
    _make_folder(folder)
    failures: dict[str, str] = {}
    with closing(opened):
        rows = answer_with_policies(opened, tasks, samples, settings, base=base, failures=failures)
    parts = _gather((rows, failures))
    if not parts:  # only the main rank receives the rows, and writes them
        return 0
    rows = _print_warnings_and_sort(parts, warnings)
    result = summarise(opened, rows, samples) | {"source": source, "weights": opened.weights, "data": description}
    result["sampling"] = {k: v for k, v in vars(settings).items() if v is not None and k != "greedy"}
    result["sampling"] |= {"samples": samples, "max_new_tokens": opened.config.sampling.max_new_tokens}
    print(table := format_table(result))
    _write_files(folder, result, table, rows)
    return 0


def _gather(part: tuple[list[Row], dict[str, str]]) -> list[tuple[list[Row], dict[str, str]]]:
    """Return the parts of all ranks on the main rank, and leave their group, since NCCL warns at the end otherwise."""
    parts = ranks.gather(part)
    if ranks.world_size() > 1:
        ranks.shutdown()
    return parts


def _print_warnings_and_sort(parts: Sequence[tuple[list[Row], dict[str, str]]], warnings: Sequence[str]) -> list[Row]:
    """Print the warnings and the reasons why rewards failed on any rank, and return the rows of all ranks in order."""
    failures = {name: why for _, part in reversed(parts) for name, why in part.items()}
    for sentence in [*warnings, *failures.values()]:
        print(f"warning: {sentence}")
    return sorted((row for rows, _ in parts for row in rows), key=lambda r: (r["policy"], r["task"], r["sample"]))


def _check_problems(
    opened: OpenedPolicy, tasks: list[Task], description: dict[str, Any], warnings: list[str]
) -> list[Task]:
    """Return and name the problems that are answered, count them in the description, and add what is odd about them."""
    config, place = opened.config, name_split(description["path"], description["split"])
    _, judged, sentences = drop_unjudged(config, [], tasks)
    check_columns(config, judged, judged, place)
    warnings += sentences + describe_prompt_changes(opened.tokenizer, config.data, judged)
    warnings += describe_dropped_turns(config.data, judged)
    warnings += check_gold_answers(config, [], judged, place)
    description["left_out"] += len(tasks) - len(judged)
    description["problems"] = len(judged)
    is_default = opened.folder is None and description["path"] == DataConfig().path
    print(f"evaluating on {format_problems(description)}{'; --data and --config choose others' if is_default else ''}")
    return judged


def name_folder(steps: int | None, data: str | None = None) -> str:
    """Return the output folder's name: "evaluate", and the data's name and a checkpoint's steps if there are any."""
    parts = ["evaluate", *([Path(data).stem] if data else []), *([f"step-{steps:06d}"] if steps is not None else [])]
    return "-".join(parts)


def answer_with_policies(
    opened: OpenedPolicy,
    tasks: Sequence[Task],
    samples: int,
    settings: SamplingParams,
    *,
    base: bool,
    failures: dict[str, str] | None = None,  # receives a sentence for each reward that fails
) -> list[Row]:
    """Return this rank's rows of the policy, preceded by those of the base model if `base` and there is an adapter."""
    policies = {"policy": nullcontext()}
    if base and opened.has_adapter:
        policies = {"base": opened.policy.reference(), **policies}
    rewards, rows = make_correctness_and_rewards(opened.config), []
    with progress_bar(len(policies) * len(tasks) * (1 + samples), "evaluating", "completion") as progress:
        for name, switch in policies.items():
            with switch:
                answers = answer_tasks(opened, tasks, rewards, samples, settings, progress.update, failures)
            rows += [{"policy": name, **row} for row in answers]
    return rows


def _check_settings(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> SamplingParams:
    try:
        return SamplingParams(temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    except ValueError as error:
        raise ConfigError(f"--{str(error).replace('_', '-')}") from None


def load_problems(
    opened: OpenedPolicy,
    data: str | None,
    split: str | None,
    limit: int | None,
    eval_set: str | None = None,
    notes: list[str] | None = None,
) -> tuple[list[Task], dict]:
    """Return the problems of `data`, or the run's held-out ones without it, and their description for evaluate.json.

    `eval_set` names one of evaluation.sets; None takes the first that does not select. `notes` is as for `make_tasks`.

    Raises:
        ConfigError: the data cannot be loaded, the run has no such set, or it has held out no problems.
    """
    if eval_set is not None and data is not None:
        raise ConfigError(f"--set is {eval_set!r} and --data is {data!r}; give one of them")
    config = opened.config.data
    has_eval_data = config.eval_path is not None or config.eval_split is not None or config.path.startswith(GENERATED)
    if data is not None:
        split = split or ("train" if Path(data).is_file() else "test")
        data = os.path.expanduser(data)
        subset, args = (config.subset, config.args) if data == config.path else (None, {})
        rows, path = load_rows(data, subset, split, limit, args), data
        if opened.folder and notes is not None and (warning := warn_of_trained_rows(opened.config, rows)):
            notes.append(warning)
    elif name := _choose_set(opened.config, eval_set):
        rows = load_eval_sets(opened.config)[1][name]
        rows = rows.select(range(len(rows))[:limit])
        path, split = describe_set(opened.config, name)
        split = f"{split}, evaluation set {label_set(name, opened.config.selecting_set)}"
    else:
        # rows held out of the training data depend on their number, so `limit` must not change it
        count = (limit or ALL_ROWS) if has_eval_data else opened.config.evaluation.num_tasks
        rows = load_splits(config, count)[1]
        rows = rows.select(range(len(rows))[:limit])
        path, split = describe_eval_source(config)
    if not rows:
        raise ConfigError("the run has held out no problems (evaluation.num_tasks is 0); name a data set with --data")
    tasks, num_too_long = make_tasks(rows, config, opened.tokenizer, notes)
    treatment = "cut" if config.long_prompts == "truncate_left" else "left_out"
    counts = {"problems": len(tasks), "left_out": 0, treatment: num_too_long}
    return tasks, {"path": path, "split": split, **counts}


def choose_source(
    opened: OpenedPolicy, eval_set: str | None, *, keeps_rewards: bool = False
) -> tuple[OpenedPolicy, str | None]:
    """Return the policy with one of data.sources as its only data, and the evaluation set to answer.

    `eval_set` names the source; None takes the first that does not select. Without sources nothing changes. With
    `keeps_rewards` the rewards are those of the run and not those of the source.

    Raises:
        ConfigError: the run has no source of the name.
    """
    names = [source.name for source in opened.config.data.sources]
    if not names:
        return opened, eval_set
    if eval_set is not None and eval_set not in names:
        raise ConfigError(f"--set is {eval_set!r}; {list_known(eval_set, names)}")
    reported = [name for name in names if name != opened.config.selecting_set]
    name = eval_set or [*reported, *names][0]
    config = opened.config.of_source(name)
    return replace(opened, config=replace(config, rewards=opened.config.rewards) if keeps_rewards else config), None


def _choose_set(config: RunConfig, wanted: str | None) -> str | None:
    """Return the name of the evaluation set to answer: `wanted`, or the first that does not select; None without sets.

    Raises:
        ConfigError: the run has no set of the name.
    """
    names = [part.name for part in config.evaluation.sets]
    if wanted is not None and wanted not in names:
        raise ConfigError(f"--set is {wanted!r}; {list_known(wanted, names) if names else 'the run has no named sets'}")
    if not config.evaluation.num_tasks:
        return None
    reported = [name for name in names if name != config.selecting_set]
    return wanted or next(iter([*reported, *names]), None)


def make_correctness_and_rewards(config: RunConfig) -> list[Reward]:
    """Return correctness by evaluation.reward, also in its strict form if it has one; then the config's rewards."""
    name, timeout = config.evaluation.reward, config.trainer.reward_timeout
    correctness = [Reward(CORRECT, 1.0, build_reward(name, timeout=timeout))]
    if "strict" in keyword_arguments(REWARDS.get(name)):
        correctness.append(Reward(STRICT, 1.0, build_reward(name, {"strict": True}, timeout=timeout)))
    return [*correctness, *make_rewards(config)]


def answer_tasks(
    opened: OpenedPolicy,
    tasks: Sequence[Task],
    rewards: Sequence[Reward],
    samples: int,
    settings: SamplingParams,
    update_progress: Callable[[int], object] = lambda count: None,
    failures: dict[str, str] | None = None,
) -> list[Row]:
    """Answer this rank's part of the tasks greedily (sample 0) and `samples` times (samples 1, 2, ...).

    Returns one row per completion. `failures` receives a sentence for each reward that fails.
    """
    tasks = [replace(task, seed=make_key("evaluate", opened.config.seed, task.index)) for task in tasks]
    mine = sorted(tasks[ranks.rank() :: ranks.world_size()], key=lambda task: len(task.prompt_ids))
    size, rows = opened.config.evaluation.batch_size, []
    for start in range(0, len(mine), size):
        part = mine[start : start + size]
        rows += _answer_batch(opened, part, rewards, 1, GREEDY, 0, failures)
        update_progress(len(part))
        if samples:
            rows += _answer_batch(opened, part, rewards, samples, settings, 1, failures)
            update_progress(len(part) * samples)
    return rows


def _answer_batch(
    opened: OpenedPolicy,
    tasks: Sequence[Task],
    rewards: Sequence[Reward],
    count: int,
    settings: SamplingParams,
    first_sample: int,
    failures: dict[str, str] | None,
) -> list[Row]:
    rollouts, turns = sample_turns(opened.sampler, opened.environments, tasks, count, settings=settings)
    scores = score(rewards, tasks, rollouts.completions, count)
    if opened.environments is not None:
        scores = opened.environments.add_to_scores(scores, turns)
    if failures is not None:
        _note_failures(opened, scores, failures)
    by_name = {name: values.flatten().tolist() for name, values in scores.by_name.items()}
    columns = {column: [x == 1.0 for x in by_name.pop(name)] for column, name in MARKS.items() if name in by_name}
    columns["rewards"] = [{name: values[i] for name, values in by_name.items()} for i in range(len(rollouts))]
    return completion_rows(tasks, rollouts, columns | make_turn_columns(turns), first_sample=first_sample)


def _note_failures(opened: OpenedPolicy, scores: Scores, failures: dict[str, str]) -> None:
    """Add a sentence for each reward that failed for the first time, and for the environment."""
    for name in scores.failed:
        begin = opened.environments.label if opened.environments and name == ENVIRONMENT_REWARD else f"reward {name}"
        subject = "evaluation.reward" if name in MARKS.values() else begin
        for why in scores.failures:
            if why.startswith(f"{begin} "):
                failures.setdefault(name, subject + why.removeprefix(begin))


def compute_figures(rows: Sequence[Row], samples: int, answer_of: Callable | None) -> Figures:
    """Compute the figures of one policy, each a list with a number per problem.

    greedy; greedy, strict: correctness of the greedy answer. mean@n, pass@k and maj@k: of the samples
    (training/eval_statistics.py). Rewards, turns, length and cut off (the share of truncated completions): of the
    samples, or of the greedy answer without samples. `answer_of` returns the final answer in a text; maj@k needs it.
    """
    by_task: dict[int, list[Row]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    groups = [sorted(group, key=lambda row: row["sample"]) for group in by_task.values()]
    figures: Figures = {"greedy": [float(group[0]["correct"]) for group in groups]}
    if "strict" in rows[0]:
        figures["greedy, strict"] = [float(group[0]["strict"]) for group in groups]
    if samples:
        correct = [[row["correct"] for row in group[1:]] for group in groups]
        figures[f"mean@{samples}"] = [sum(marks) / samples for marks in correct]
        for k in _list_k(samples):
            figures[f"pass@{k}"] = pass_at_k([sum(marks) for marks in correct], samples, k)
        if answer_of is not None and samples > 1:
            answers = [[answer_of(row["text"]) for row in group[1:]] for group in groups]
            figures[f"maj@{samples}"] = majority_at_k(answers, correct, samples)
    groups = [group[1:] or group for group in groups]
    for name in rows[0]["rewards"]:
        values = [[row["rewards"][name] for row in group if row["rewards"][name] is not None] for group in groups]
        figures[f"reward {name}"] = [sum(value) / len(value) if value else math.nan for value in values]
    if "turns" in rows[0]:
        figures["turns"] = [sum(len(row["turns"]) for row in group) / len(group) for group in groups]
    figures["length"] = [sum(row["length"] for row in group) / len(group) for group in groups]
    figures["cut off"] = [sum(row["truncated"] for row in group) / len(group) for group in groups]
    return figures


def _list_k(samples: int) -> list[int]:
    """Return the k of pass@k: the powers of 2 below `samples`, and `samples`, all above 1."""
    powers = [2**i for i in range(1, samples.bit_length()) if 2**i < samples]
    return [*powers, samples] if samples > 1 else []


def summarise(opened: OpenedPolicy, rows: Sequence[Row], samples: int) -> dict[str, Any]:
    """Return the mean and the interval of every figure by policy.

    With a base model also of the differences, and McNemar's test of the greedy answers.
    """
    answer_of = get_fact(REWARDS.get(opened.config.evaluation.reward), "answer")
    by_policy = {
        name: compute_figures([row for row in rows if row["policy"] == name], samples, answer_of)
        for name in ("base", "policy")
        if any(row["policy"] == name for row in rows)
    }
    result: dict[str, Any] = {
        policy: {name: _add_interval(name, values) for name, values in figures.items()}
        for policy, figures in by_policy.items()
    }
    if len(by_policy) == 2:
        base, policy = by_policy["base"], by_policy["policy"]
        differences = {name: [b - a for a, b in zip(base[name], policy[name], strict=True)] for name in policy}
        lost, won, p = mcnemar([x == 1 for x in base["greedy"]], [x == 1 for x in policy["greedy"]])
        result["paired"] = {"lost": lost, "won": won, "p": p}
        result["difference"] = {name: _add_interval("", values) for name, values in differences.items()}
    return result


def _add_interval(name: str, values: Sequence[float]) -> dict[str, float | int]:
    """Return the mean over problems with its 95 % interval: Wilson's for greedy accuracy, otherwise the bootstrap's."""
    numbers = [value for value in values if not math.isnan(value)]
    if not numbers:
        return {"value": math.nan, "ci_low": math.nan, "ci_high": math.nan, "n": 0}
    if name.startswith("greedy"):
        low, high = wilson_interval(int(sum(numbers)), len(numbers))
    else:
        low, high = bootstrap_interval(numbers)
    return {"value": sum(numbers) / len(numbers), "ci_low": low, "ci_high": high, "n": len(numbers)}


def _start(data: str | None, output: Path | None) -> None:
    """Join the process group, if there is one, and check --data and --output before the model loads."""
    if "RANK" in os.environ:
        ranks.setup()
    if data is not None and (problem := describe_impossible_path(data)):
        raise ConfigError(f"--data {problem}")
    if output is not None:
        _check_folder(output)


def _check_folder(folder: Path) -> None:
    """Check that the output folder can be written, is no run's folder, and lies in no run that is being written."""
    if problem := describe_impossible_path(folder):
        raise ConfigError(f"--output {problem}")
    run_dir.check_writable(folder, "--output")
    if (folder / "config.yaml").exists():
        raise ConfigError(f"--output {folder} is the folder of a run, which has files of the same names; name another")


def _make_folder(folder: Path) -> None:
    """Create the output folder.

    Raises:
        ConfigError: it cannot be created, is a run's folder, or lies in the folder of a run that is being written.
    """
    _check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be written: {error.strerror}") from None


def _keep_earlier_samples(folder: Path, result: dict[str, Any]) -> None:
    """Rename the files of an earlier evaluation whose samples gave figures, such as pass@8, that `result` lacks."""
    try:
        earlier = json.loads((folder / "evaluate.json").read_text(encoding="utf-8"))
        figures, samples = earlier["policy"].keys() - result["policy"].keys(), earlier["sampling"]["samples"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # there is none
    if not samples or not any("@" in name for name in figures):
        return
    for name in FILES:
        old = folder / name
        if old.exists():
            os.replace(old, old.with_name(f"{old.stem}-{samples}-samples{old.suffix}"))
    print(
        f"\nthe earlier evaluation with {quantify(samples, 'sample')} is kept in "
        f"{folder / f'evaluate-{samples}-samples.json'}"
    )


def _write_files(folder: Path, result: dict[str, Any], table: str, rows: Sequence[Row]) -> None:
    try:
        _keep_earlier_samples(folder, result)
        write_whole(folder / "evaluate.json", (json.dumps(finite_or_none(result), indent=1) + "\n").encode())
        write_whole(folder / "evaluate.txt", (table + "\n").encode())
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(folder / "completions.jsonl", "".join(lines).encode(errors="replace"))
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be written: {error.strerror}") from None
    print(f"\nwritten to {folder}: {', '.join(FILES)}")
