"""Log a run: time its phases, write the files of its folder, and print to the terminal."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from grpo_core.batch import Rollouts, Task
from grpo_core.config.files import dump
from grpo_core.config.sections import RunConfig
from grpo_core.counts import format_fixed, quantify
from grpo_core.distributed import ranks, watchdog
from grpo_core.monitor import run_lock
from grpo_core.monitor.aggregates import Stats
from grpo_core.monitor.completion_rows import completion_rows, make_turn_columns
from grpo_core.monitor.progress import LOG_DELAY, keep_refreshing
from grpo_core.monitor.source_stats import add_source_stats
from grpo_core.monitor.trackers import Trackers
from grpo_core.report.eval_sets import label_set, split_sets
from grpo_core.schema import find_failure_kind, finite_or_none, printable
from grpo_core.scoring.scoring import Scores

SHOWN_KLS = ("kl", "teacher_kl", "teacher_kl_exact")  # on the terminal


class RunLog:
    """The log of a run: the files in its folder, and the terminal.

    Every rank calls every method, and only the main rank writes. `seconds` and `memory` collect the phases of a step.
    """

    def __init__(self, folder: Path, config: RunConfig, start_step: int, num_steps: int) -> None:
        """Create the folder of a run, or continue it at `start_step`; `drop_later_rows` makes its files ready.

        With config.overwrite an existing run folder is emptied first.
        """
        self.folder, self.config, self.num_steps = folder, config, num_steps
        self.seconds: dict[str, float] = defaultdict(float)
        self.memory: dict[str, tuple[float, float]] = {}  # phase -> GB allocated, GB reserved
        self.flops_per_token = 0.0  # of the update; 0 if unknown
        self.started = time.perf_counter()
        self.bar: tqdm | None = None
        self._steps_taken, self._phase = start_step, "starting"
        self._last_line = self.started  # when the last line was printed
        self._warnings: set[str] = set()  # kinds of those printed so far
        self._unwritten: dict[str, str] = defaultdict(str)  # file -> its rows that are not on the disk yet
        self._cannot_write = False
        self.trackers: Trackers | None = None
        if ranks.is_main():
            if config.overwrite and (folder / "config.yaml").exists():
                run_lock.empty_folder(folder)
            folder.mkdir(parents=True, exist_ok=True)
            if not _is_same(Path(config.output_dir) / config.name, folder):  # resume: FOLDER with another name
                config = replace(config, name=folder.name, output_dir=str(folder.parent))
            written = dump(replace(config, resume=None, overwrite=False))
            (folder / "config.yaml").write_text(written, encoding="utf-8")
            for file in find_user_files(config):
                (folder / "code").mkdir(exist_ok=True)
                shutil.copy(file, folder / "code")
            self.bar = tqdm(
                total=num_steps, initial=start_step, unit="step", disable=None, dynamic_ncols=True, leave=False
            )
            self._stop_refreshing = keep_refreshing(self.bar, self._describe_progress)
            self.trackers = Trackers(folder, config, written, start_step, self.info)

    def drop_later_rows(self) -> int:
        """Remove the rows of the steps that are taken again; return the number of those in metrics.jsonl.

        It is called once, after all checks of the start.
        """
        if not ranks.is_main():
            return 0
        start = self._steps_taken
        last_steps = {
            "metrics": start - 1,
            "completions": start - 1,
            "evaluation": start or -1,  # the evaluation before the first step is repeated
            "evaluation_completions": start or -1,
        }
        dropped = {name: _truncate(self.folder / f"{name}.jsonl", last) for name, last in last_steps.items()}
        ranks.report_run_folder(self.folder)  # a restart may continue from its newest checkpoint
        return dropped["metrics"]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to the phase `name` of the step, and record its peak GPU memory."""
        watchdog.beat(name)
        self._phase = name
        if self.bar is not None:
            self.bar.set_description_str(name, refresh=False)
        has_gpu, start = torch.cuda.is_available(), time.perf_counter()
        if has_gpu:
            torch.cuda.reset_peak_memory_stats()
        yield
        if has_gpu:
            torch.cuda.synchronize()
            stats, (allocated, reserved) = torch.cuda.memory_stats(), self.memory.get(name, (0.0, 0.0))
            allocated = max(allocated, stats["allocated_bytes.all.peak"] / 1e9)
            self.memory[name] = (allocated, max(reserved, stats["reserved_bytes.all.peak"] / 1e9))
        self.seconds[name] += time.perf_counter() - start
        watchdog.beat()

    def log_step(
        self,
        step: int,
        tasks: list[Task],
        rollouts: Rollouts,
        scores: Scores,
        rewards: Tensor,  # [N, G], after truncation and a KL in the reward: what the advantages are computed from
        advantages: Tensor,  # [B], of each completion the mean over its tokens
        stats: Stats,
        numbers: dict[str, float],
    ) -> dict[str, float]:
        """Write a row of metrics.jsonl and the rollouts of all ranks to completions.jsonl; return the row of metrics.

        `stats` are reduced over ranks, `numbers` are the same on all ranks. A collective.
        """
        add_rollout_stats(stats, rollouts, scores, advantages)
        add_source_stats(stats, self.config.source_names, tasks, rollouts, scores)
        for name, value in self._take_memory_peaks().items():
            stats.add_max(name, torch.tensor(value, device="cpu"))
        row = {"step": step, **stats.reduce(), **numbers}
        for name in ("reward", *(f"rewards/{name}" for name in scores.by_name)):
            row[f"{name}_std"] = max(row.pop(f"{name}_square") - row[name] ** 2, 0.0) ** 0.5
        if self.config.log.completions:
            columns = _completion_columns(scores, self._shaped_rewards(rewards), advantages)
            rows = ranks.gather(completion_rows(tasks, rollouts, columns))
            rows = [{"step": step, **row} for part in rows for row in part]
            self._append("completions", *rows)
            if self.trackers and (step + 1) % self.config.log.every == 0:
                self.trackers.log_completions(rows, step)
        if row.get("memory_retries"):
            micro_batches = quantify(int(row["memory_retries"]), "micro-batch was", "micro-batches were")
            self.info(f"step {step + 1}: memory ran out; {micro_batches} split into halves")
        self.log_row(step, row, lambda row: _format_step(row, list(scores.by_name)))
        return row

    def _take_memory_peaks(self) -> dict[str, float]:
        """Return the peak memory since the last row in GB (1e9 bytes): of the GPU, or of the process without one."""
        if not torch.cuda.is_available():
            return {"peak_memory_gb": peak_resident_gb()}
        peaks = {f"memory_gb/{name}": allocated for name, (allocated, _) in self.memory.items()}
        peaks |= {"peak_memory_gb": max(peaks.values()), "reserved_memory_gb": max(r for _, r in self.memory.values())}
        self.memory = {}
        return peaks

    def _shaped_rewards(self, rewards: Tensor) -> Tensor | None:
        """Return the rewards that the advantages are computed from, or None if they are the scores themselves."""
        same = self.config.truncation.name == "keep" and self.config.loss.kl_in == "loss"
        return None if same else rewards

    def log_row(self, step: int, row: dict[str, float], line: Callable[[dict[str, float]], str]) -> None:
        """Write a row of metrics.jsonl with the seconds of its phases; print `line(row)` every log.every steps.

        Seconds count from the previous row, so an evaluation or a checkpoint counts in the step after it.
        """
        elapsed, self.started = time.perf_counter() - self.started, time.perf_counter()
        row |= {f"seconds/{name}": value for name, value in self.seconds.items()}
        pauses = self.seconds["evaluate"] + self.seconds["checkpoint"]  # before this step
        row |= {"seconds": elapsed, "tokens_per_second": row["tokens"] / (elapsed - pauses)}
        peak = ranks.peak_flops()
        if peak and self.flops_per_token and row.get("tokens_updated"):
            available = peak * ranks.world_size() * self.seconds["update"]
            row["update_mfu"] = row["tokens_updated"] * self.flops_per_token / available
        self.seconds = defaultdict(float)
        self._append("metrics", row)
        self._steps_taken = step + 1
        if self.trackers:
            self.trackers.log_metrics(row, step)
        if self.bar is not None:
            by_name = [name for name in row if name.startswith("rewards/") and not name.endswith("_std")]
            names = ["reward", *by_name] if by_name else ["loss"]
            self.bar.set_postfix(
                {name.removeprefix("rewards/"): format_fixed(row[name], 3) for name in names}, refresh=False
            )
            self.bar.update()
        if (step + 1) % self.config.log.every == 0 or step + 1 == self.num_steps:
            self.info(f"step {step + 1:>{len(str(self.num_steps))}}/{self.num_steps}  {line(row)}")

    def _describe_progress(self) -> str | None:
        """Return the step and its phase, or None while other lines show progress."""
        is_quiet = time.perf_counter() - self._last_line >= LOG_DELAY
        if not is_quiet or self._phase == "evaluate" or self._steps_taken >= self.num_steps:
            return None
        return f"step {self._steps_taken + 1} of {self.num_steps}: {self._phase}"

    def log_evaluation(self, step: int, result: dict[str, float], completions: list[dict[str, Any]]) -> None:
        """Write and print an evaluation after `step` steps, and write its completions.

        The files are evaluation.jsonl and evaluation_completions.jsonl.
        """
        self._append("evaluation", {"step": step, **result})
        if completions:
            self._append("evaluation_completions", *({"step": step, **row} for row in completions))
        if self.trackers:
            self.trackers.log_evaluation(result, step)
        for name, row in split_sets(result).items():
            label = f", {label_set(name, self.config.selecting_set)}" if name else ""
            self.info(f"evaluation after {quantify(step, 'step')}{label}: {describe_evaluation(row)}")

    def has_evaluation(self, step: int) -> bool:
        """Return whether evaluation.jsonl has a row after `step` steps. A collective."""
        exists = False
        if ranks.is_main():
            file = self.folder / "evaluation.jsonl"
            lines = file.read_bytes().splitlines() if file.exists() else []
            exists = any(json.loads(line)["step"] == step for line in lines)
        return ranks.broadcast_from_main(exists)

    def info(self, text: str) -> None:
        """Print a line above the progress bar."""
        self._last_line = time.perf_counter()
        if self.bar is not None:
            tqdm.write(printable(text))  # moves all progress bars down
            sys.stdout.flush()

    def warn(self, sentences: Sequence[str]) -> None:
        """Print the warnings of all ranks, each kind of failure and each other sentence once. A collective.

        The message of an exception may hold the text of a completion, so every step would have another sentence.
        """
        if not ranks.all_max(torch.tensor(float(len(sentences)), device="cpu")):
            return
        everywhere = {sentence for part in ranks.gather(list(sentences)) for sentence in part}
        for sentence in sorted(everywhere):
            if (kind := find_failure_kind(sentence)) not in self._warnings:
                self._warnings.add(kind)
                self.info(f"warning: {sentence}")

    def close(self) -> None:
        if self.bar is not None:
            self._stop_refreshing()
            self.bar.close()
        if self.trackers:
            self.trackers.close()

    def flush(self) -> str | None:
        """Write all rows to the disk; return None, or the reason why the disk refuses them (on the main rank)."""
        problem = None
        for name, text in self._unwritten.items():
            try:
                _append_all(self.folder / f"{name}.jsonl", text.encode(errors="replace"))
                self._unwritten[name] = ""
            except OSError as error:
                problem = error.strerror
        return problem

    def _append(self, name: str, *rows: dict[str, Any]) -> None:
        """Write rows to a file; rows that a full disk refuses are kept and written later."""
        if not ranks.is_main():
            return
        self._unwritten[name] += "".join(json.dumps(finite_or_none(row), ensure_ascii=False) + "\n" for row in rows)
        if (problem := self.flush()) and not self._cannot_write:
            self.info(f"warning: {name}.jsonl cannot be written ({problem}); its rows are kept and written later")
        self._cannot_write = problem is not None


def _is_same(first: Path, second: Path) -> bool:
    """Return True if two paths are one folder, as far as their texts say."""
    return os.path.abspath(first) == os.path.abspath(second)


def find_user_files(config: RunConfig) -> set[str]:
    """Return the user's files that the configuration takes functions from."""
    loss = config.loss
    names = [loss.name, loss.average, loss.kl, loss.rollout_correction.name, loss.rejection.name, config.advantage.name]
    names += [config.truncation.name, config.evaluation.reward, *(reward.name for reward in config.rewards)]
    names += [config.environment.name or "", config.tool_parser or "", *config.tools]
    for source in config.data.sources:
        names += [source.eval_reward or "", *(reward.name for reward in source.rewards)]
    return {name.rpartition(":")[0] for name in names if ".py:" in name}


def add_rollout_stats(stats: Stats, rollouts: Rollouts, scores: Scores, advantages: Tensor) -> None:
    """Add the metrics of a step's rollouts, scores and advantages."""
    lengths = rollouts.lengths()
    rewards = {"reward": scores.rewards, **{f"rewards/{name}": values for name, values in scores.by_name.items()}}
    for name, values in rewards.items():
        stats.add_mean(name, values, ~values.isnan())
        stats.add_mean(f"{name}_square", values.square(), ~values.isnan())
    for name, failed in scores.failed.items():
        stats.add_mean(f"failed/{name}", failed)
    stats.add_mean("advantage_abs", advantages.abs())
    stats.add_mean("length", lengths)
    stats.add_max("length_max", lengths)
    stats.add_mean("truncated", rollouts.truncated)
    stats.add_total("tokens", lengths.sum())
    if scores.turns:
        _add_turn_stats(stats, scores.turns)


def _add_turn_stats(stats: Stats, turns: Sequence[Any]) -> None:
    """Add the metrics of completions of several turns (environments/driver.py)."""
    values = {
        "turns": [len(completion.turns) for completion in turns],
        "given_tokens": [completion.given_tokens for completion in turns],
        "tool_calls": [completion.calls for completion in turns],
        "tool_errors": [completion.errors for completion in turns],
        "cut_answers": [completion.cut_answers for completion in turns],
        "answers_without_room": [completion.lacks_room for completion in turns],
        "environment_failures": [completion.failure is not None for completion in turns],
    }
    for name, numbers in values.items():
        stats.add_mean(name, torch.tensor(numbers, dtype=torch.float32, device="cpu"))


def describe_evaluation(result: dict[str, float]) -> str:
    """Return the result of one evaluation set as text."""
    sampling = "".join(
        f", {name} {result[name]}" for name in ("temperature", "top_k", "top_p", "min_p") if name in result
    )
    loss = f", loss {result['loss']:.4f} nats a token" if result.get("loss") is not None else ""
    failed = f"; the reward failed on {result['failed']}" if result.get("failed") else ""
    if number := result.get("environment_failed"):
        failed += f"; the environment failed on {number}"
    return (
        f"accuracy {result['accuracy']:.1%} ({result['correct']:,} of {result['n']:,}, "
        f"95 % interval {result['ci_low']:.1%} to {result['ci_high']:.1%}{sampling}{failed}){loss}"
    )


def peak_resident_gb() -> float:
    """Return the peak resident memory of this process in GB (1e9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _completion_columns(scores: Scores, shaped: Tensor | None, advantages: Tensor) -> dict[str, list[Any]]:
    """Return the columns of completions.jsonl that come from the scores, one value per completion each."""
    by_name = {name: values.flatten().tolist() for name, values in scores.by_name.items()}
    columns: dict[str, list[Any]] = {
        "rewards": [{name: values[i] for name, values in by_name.items()} for i in range(scores.rewards.numel())],
        "reward": scores.rewards.flatten().tolist(),
    }
    if shaped is not None:
        columns["shaped_reward"] = shaped.flatten().tolist()
    return columns | {"advantage": advantages.flatten().tolist()} | make_turn_columns(scores.turns)


def _format_step(row: dict[str, float], rewards: list[str]) -> str:
    by_name = (
        "".join(f"  {name} {format_fixed(row[f'rewards/{name}'], 3)}" for name in rewards) if len(rewards) > 1 else ""
    )
    by_reward = by_name  # with a teacher alone there are no rewards, or none with a weight
    if "tied_groups" in row:
        by_reward = f"reward {format_fixed(row['reward'], 3)}{by_name}  tied {row['tied_groups']:.0%}"
    return (
        (f"{by_reward.strip()}  " if by_reward else "")
        + f"length {row['length']:.0f}"
        + _format_failures(row)
        + "".join(f"  {name} {format_fixed(row[name], 4)}" for name in SHOWN_KLS if name in row)
        + f"  grad {row['grad_norm']:.3f}  {row['seconds']:.1f} s"
        + ("  update skipped: gradient not finite" if row["skipped"] else "")
    )


def _format_failures(row: dict[str, float]) -> str:
    """Return the share of completions on which each reward, or the environment, failed; "" without failures."""
    shares = {key.removeprefix("failed/"): row[key] for key in row if key.startswith("failed/") and row[key] > 0}
    parts = [f"{name} {share:.0%}" if share >= 0.01 else f"{name} under 1%" for name, share in shares.items()]
    return f"  failed: {', '.join(parts)}" if parts else ""


def _truncate(path: Path, last_step: int) -> int:
    """Remove the rows of steps after `last_step`, which will be repeated, and an incomplete last row.

    Return the number of rows that were removed.
    """
    if not path.exists():
        return 0
    lines, staying = path.read_bytes().splitlines(keepends=True), []
    for line in lines:  # bytes: text is also split at U+2028, which JSON allows
        if not line.endswith(b"\n") or json.loads(line)["step"] > last_step:
            break
        staying.append(line)
    path.write_bytes(b"".join(staying))
    return len(lines) - len(staying)


def _append_all(path: Path, content: bytes) -> None:
    """Append all of `content` to the file, or nothing if the disk is full."""
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(end)
            raise
