"""The `evaluate` command: what a policy can do on held-out problems, and whether that is more than its base could.

Every problem is answered once greedily and `samples` times at a temperature, by the policy and by its base.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_core.batch import SamplingParams, Task
from grpo_core.commands.open_policy import Opened, open_source
from grpo_core.config.sections import RunConfig
from grpo_core.data.prompts import make_tasks
from grpo_core.data.rows import load_rows, load_splits
from grpo_core.distributed import ranks
from grpo_core.monitor.progress import bar
from grpo_core.objective.rewards import REWARDS
from grpo_core.registry import fact
from grpo_core.schema import ConfigError, keyword_arguments
from grpo_core.scoring.scoring import Reward, build_reward, score
from grpo_core.training.eval_statistics import bootstrap_interval, majority_at_k, mcnemar, pass_at_k, wilson_interval
from grpo_core.training.prepare import check_columns, make_rewards

GREEDY = SamplingParams(greedy=True)
STREAM = 0x73616D70  # keeps the noise of these samples apart from that of training and of its evaluation
CORRECT, STRICT = " correct", " strict"  # no reward's name begins with a space
ALL = 10**9  # rows
Row = dict[str, Any]
Figures = dict[str, list[float]]  # name -> a number for each problem


def run_evaluate(
    source: str,
    overrides: Sequence[str] = (),
    config: Path | None = None,
    *,
    data: str | None = None,
    split: str | None = None,
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
    """Evaluate, print the table, and write evaluate.json, evaluate.txt and completions.jsonl.

    Raises:
        ConfigError: what cannot be opened, loaded or scored; settings that mean nothing.
    """
    settings = _settings(temperature, top_k, top_p, min_p)
    overrides = [*overrides, *([f"sampling.max_new_tokens={max_new_tokens}"] if max_new_tokens else [])]
    if rewards:
        overrides.append(f"rewards={json.dumps([{'name': name} for name in rewards])}")
    if "RANK" in os.environ:
        ranks.setup()
    opened = open_source(source, overrides, config=config, say=print)
    tasks, what = problems(opened, data, split, limit)
    check_columns(opened.config, tasks, tasks)
    folder = output or (opened.folder or Path()) / (f"evaluate-{Path(data).stem}" if data else "evaluate")
    _make(folder)
    parts = ranks.gather(rows_of(opened, tasks, samples, settings, base=base))
    if not parts:  # another rank writes
        return 0
    rows = sorted((row for part in parts for row in part), key=lambda r: (r["policy"], r["task"], r["sample"]))
    result = summarise(opened, rows, samples) | {"source": source, "weights": opened.weights, "data": what}
    result["sampling"] = {k: v for k, v in vars(settings).items() if v is not None and k != "greedy"}
    result["sampling"] |= {"samples": samples, "max_new_tokens": opened.config.sampling.max_new_tokens}
    print(text := table(result))
    _write(folder, result, text, rows)
    return 0


def rows_of(opened: Opened, tasks: Sequence[Task], samples: int, settings: SamplingParams, *, base: bool) -> list[Row]:
    """This rank's answers of the policy and, with `base`, of its base where there is one."""
    policies = {"policy": nullcontext()}
    if base and opened.has_adapter:
        policies = {"base": opened.policy.reference(), **policies}
    scored, rows = scorers(opened.config), []
    with bar(len(policies) * len(tasks) * (1 + samples), "evaluating", "completion") as shown:
        for name, switch in policies.items():
            with switch:
                made = answers(opened, tasks, scored, samples, settings, shown.update)
            rows += [{"policy": name, **row} for row in made]
    return rows


def _settings(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> SamplingParams:
    try:
        return SamplingParams(temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    except ValueError as error:
        raise ConfigError(f"--{str(error).replace('_', '-')}") from None


def problems(opened: Opened, data: str | None, split: str | None, limit: int | None) -> tuple[list[Task], dict]:
    """The problems, and which they are: of `data`, or those that the run has held out.

    Raises:
        ConfigError: there are none.
    """
    config = opened.config.data
    own = config.eval_path is not None or config.eval_split is not None or config.path.startswith("builtin:")
    if data is not None:
        split = split or ("train" if Path(data).is_file() else "test")
        rows, path = load_rows(data, config.subset if data == config.path else None, split, limit), data
    else:
        count = (limit or ALL) if own else opened.config.evaluation.num_tasks
        rows = load_splits(config, count)[1][:limit]
        path = config.eval_path or config.path
        split = config.eval_split or ("test" if path.startswith("builtin:") else f"held out of {config.split}")
    if not rows:
        raise ConfigError("the run has held out no problems (evaluation.num_tasks is 0); name some with --data")
    tasks, left_out = make_tasks(rows, config, opened.tokenizer)
    return tasks, {"path": path, "split": split, "problems": len(tasks), "left_out": left_out}


def scorers(config: RunConfig) -> list[Reward]:
    """Lenient and, where there is such a thing, strict correctness; then the configuration's rewards."""
    name, timeout = config.evaluation.reward, config.trainer.reward_timeout
    found = [Reward(CORRECT, 1.0, build_reward(name, timeout=timeout))]
    if "strict" in keyword_arguments(REWARDS.get(name)):
        found.append(Reward(STRICT, 1.0, build_reward(name, {"strict": True}, timeout=timeout)))
    return [*found, *make_rewards(config)]


def answers(
    opened: Opened,
    tasks: Sequence[Task],
    rewards: Sequence[Reward],
    samples: int,
    settings: SamplingParams,
    done: Callable[[int], object] = lambda count: None,
) -> list[Row]:
    """This rank's part of the tasks, answered greedily (sample 0) and `samples` times (1, 2, ...): a row each."""
    tasks = [replace(task, seed=(opened.config.seed, task.index, STREAM)) for task in tasks]
    mine = sorted(tasks[ranks.rank() :: ranks.world_size()], key=lambda task: len(task.prompt_ids))
    size, rows = opened.config.evaluation.batch_size, []
    for start in range(0, len(mine), size):
        part = mine[start : start + size]
        for count, how, first in ((1, GREEDY, 0), (samples, settings, 1)):
            if count:
                rows += _answer(opened, part, rewards, count, how, first)
                done(len(part) * count)
    return rows


def _answer(
    opened: Opened, tasks: Sequence[Task], rewards: Sequence[Reward], count: int, how: SamplingParams, first: int
) -> list[Row]:
    rollouts = opened.sampler.generate(tasks, count, settings=how)
    scores = score(rewards, tasks, rollouts.completions, count)
    lengths, truncated = rollouts.lengths().tolist(), rollouts.truncated.tolist()
    named = {name: values.flatten().tolist() for name, values in scores.by_name.items()}
    return [
        {
            "task": tasks[i // count].index,
            "sample": first + i % count,
            "prompt": tasks[i // count].prompt,
            "text": text,
            "correct": named[CORRECT][i] == 1.0,
            **({"strict": named[STRICT][i] == 1.0} if STRICT in named else {}),
            "rewards": {
                name: None if math.isnan(values[i]) else values[i]
                for name, values in named.items()
                if name not in (CORRECT, STRICT)
            },
            "length": lengths[i],
            "truncated": truncated[i],
        }
        for i, text in enumerate(rollouts.completions)
    ]


def figures(rows: Sequence[Row], samples: int, answer_of: Callable | None) -> Figures:
    """What the rows of one policy say of each problem, in the order of the problems.

    greedy, strict: of the greedy answer. mean@n, pass@k, maj@k: of the samples (estimates.py), and so are rewards,
    lengths and the share that was cut off where there are samples.
    """
    by_task: dict[int, list[Row]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    groups = [sorted(group, key=lambda row: row["sample"]) for group in by_task.values()]
    found: Figures = {"greedy": [float(group[0]["correct"]) for group in groups]}
    if "strict" in rows[0]:
        found["greedy, strict"] = [float(group[0]["strict"]) for group in groups]
    if samples:
        marks = [[row["correct"] for row in group[1:]] for group in groups]
        found[f"mean@{samples}"] = [sum(mark) / samples for mark in marks]
        counts = [2**i for i in range(1, samples.bit_length()) if 2**i < samples] + [samples] * (samples > 1)
        for k in counts:
            found[f"pass@{k}"] = pass_at_k([sum(mark) for mark in marks], samples, k)
        if answer_of is not None:
            given = [[answer_of(row["text"]) for row in group[1:]] for group in groups]
            for k in counts[-1:]:
                found[f"maj@{k}"] = majority_at_k(given, marks, k)
    groups = [group[1:] or group for group in groups]
    for name in rows[0]["rewards"]:
        values = [[row["rewards"][name] for row in group if row["rewards"][name] is not None] for group in groups]
        found[f"reward {name}"] = [sum(value) / len(value) if value else math.nan for value in values]
    found["length"] = [sum(row["length"] for row in group) / len(group) for group in groups]
    found["cut off"] = [sum(row["truncated"] for row in group) / len(group) for group in groups]
    return found


def summarise(opened: Opened, rows: Sequence[Row], samples: int) -> dict[str, Any]:
    """Each policy's figures with their intervals; of two the differences and McNemar's test of the greedy answers."""
    answer_of = fact(REWARDS.get(opened.config.evaluation.reward), "answer")
    by_policy = {
        name: figures([row for row in rows if row["policy"] == name], samples, answer_of)
        for name in ("base", "policy")
        if any(row["policy"] == name for row in rows)
    }
    result: dict[str, Any] = {
        policy: {name: _interval(name, values) for name, values in found.items()} for policy, found in by_policy.items()
    }
    if len(by_policy) == 2:
        base, policy = by_policy["base"], by_policy["policy"]
        differences = {name: [b - a for a, b in zip(base[name], policy[name], strict=True)] for name in policy}
        lost, won, p = mcnemar([x == 1 for x in base["greedy"]], [x == 1 for x in policy["greedy"]])
        result["paired"] = {"lost": lost, "won": won, "p": p}
        result["difference"] = {name: _interval("", values) for name, values in differences.items()}
    return result


def _interval(name: str, values: Sequence[float]) -> dict[str, float | int]:
    """The mean over problems with its interval: Wilson's for a share of right answers, else the bootstrap's."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return {"value": math.nan, "ci_low": math.nan, "ci_high": math.nan, "n": 0}
    if name.startswith("greedy"):
        low, high = wilson_interval(int(sum(known)), len(known))
    else:
        low, high = bootstrap_interval(known)
    return {"value": sum(known) / len(known), "ci_low": low, "ci_high": high, "n": len(known)}


def table(result: dict[str, Any]) -> str:
    """The result for a terminal, 95 % intervals in brackets."""
    data, how = result["data"], result["sampling"]
    shown = [name for name in ("base", "policy", "difference") if name in result]
    lines = [f"{result['weights']}" + (", against its base" if "base" in result else "")]
    lines.append(f"{data['problems']} problems of {data['path']} ({data['split']})")
    if data["left_out"]:
        lines[-1] += f", {data['left_out']} left out: their prompts are too long"
    if how["samples"]:
        cuts = "".join(f", {name} {how[name]:g}" for name in ("top_k", "top_p", "min_p") if name in how)
        lines[-1] += f"; {how['samples']} samples of each at temperature {how['temperature']:g}{cuts}"
    width = max(len(short(name)) for name in result["policy"]) + 2
    lines += ["", " " * width + "".join(f"{name:<28}" for name in shown).rstrip()]
    for name in result["policy"]:
        cells = (cell(name, result[policy][name], signed=policy == "difference") for policy in shown)
        lines.append(f"{short(name):<{width}}" + "".join(f"{cell:<28}" for cell in cells).rstrip())
    if "paired" in result:
        paired = result["paired"]
        lines += ["", f"greedy, problem by problem: {paired['won']} won and {paired['lost']} lost against the base, "
                  f"McNemar's p = {paired['p']:.2g}"]  # fmt: skip
    return "\n".join(lines)


def short(name: str) -> str:
    """A reward of a file without the file's folder."""
    return re.sub(r"[^ ]*/(?=[^/]*\.py:)", "", name)


def cell(name: str, value: dict[str, float], *, signed: bool = False) -> str:
    """A figure of that name with its interval: shares in per cent."""
    share = not name.startswith(("reward", "length"))
    scale, form = (100, "+.1f" if signed else ".1f") if share else (1, "+.3g" if signed else ".3g")
    mean, low, high = (f"{value[key] * scale:{form}}" for key in ("value", "ci_low", "ci_high"))
    return f"{mean}{' %' if share and not signed else ''} ({low} to {high})"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be written: {error.strerror}") from None


def _write(folder: Path, result: dict[str, Any], text: str, rows: Sequence[Row]) -> None:
    try:
        (folder / "evaluate.json").write_text(json.dumps(_without_nan(result), indent=1) + "\n", encoding="utf-8")
        (folder / "evaluate.txt").write_text(text + "\n", encoding="utf-8")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "completions.jsonl").write_bytes("".join(lines).encode(errors="replace"))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None
    print(f"\n{folder}: evaluate.json, evaluate.txt, completions.jsonl")


def _without_nan(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
