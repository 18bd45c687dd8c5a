"""Data sets to tasks: loading, the prompt, and which tasks belong to a (step, rank)."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars, load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from grpo_core.batch import Task
from grpo_core.config import DataConfig
from grpo_core.problems import word_problems
from grpo_core.schema import ConfigError, known

BUILTIN = Path(__file__).parent / "builtin"
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
BUILTIN_ROWS = {"train": 20_000, "test": 1_000}


def model_path(path: str) -> str:
    """A hub id or folder as it is; builtin:NAME becomes the folder inside this package.

    Raises:
        ConfigError: no such built-in model.
    """
    if not path.startswith("builtin:"):
        return path
    folder = BUILTIN / path.removeprefix("builtin:")
    if not folder.is_dir():
        raise ConfigError(f"model.path is {path!r}; {known(path, [f'builtin:{p.name}' for p in BUILTIN.glob('*/')])}")
    return str(folder)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ConfigError: it cannot be loaded.
    """
    folder = model_path(path)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path is {path!r}, and its tokenizer cannot be loaded: {_first_line(error)}"
        ) from error


def quieten() -> None:
    """No progress bars of the data library."""
    disable_progress_bars()


def load_splits(config: DataConfig, num_eval: int, seed: int) -> tuple[Dataset, Dataset]:
    """Training rows and at most `num_eval` rows for evaluation, disjoint where they come from one split.

    Raises:
        ConfigError: data that cannot be loaded, or too few rows to hold `num_eval` of them out.
    """
    train = _limited(_load(config.path, config.subset, config.split), config.limit)
    if config.eval_path is not None or config.eval_split is not None:
        held_out = _load(config.eval_path or config.path, config.subset, config.eval_split or "train")
    elif config.path.startswith("builtin:"):
        held_out = _load(config.path, None, "test")
    else:
        if num_eval >= len(train):
            raise ConfigError(
                f"evaluation.num_tasks is {num_eval}, but {config.path} has only {len(train)} rows to hold them out "
                f"from; name data.eval_path or data.eval_split, or ask for fewer"
            )
        order = _permutation(len(train), seed, 0)
        train, held_out = train.select(sorted(order[num_eval:])), train.select(sorted(order[:num_eval]))
    return train, held_out.select(range(min(num_eval, len(held_out))))


def make_tasks(rows: Dataset, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Task], int]:
    """Every row as a task, and how many were left out because their prompt is longer than max_prompt_tokens.

    Raises:
        ConfigError: a column that the template or the mapping names is not there, or no row is left.
    """
    for ours, theirs in config.columns.items():
        if theirs not in rows.column_names:
            raise ConfigError(f"data.columns.{ours} is {theirs!r}; {known(theirs, rows.column_names)}")
    rows = rows.rename_columns({theirs: ours for ours, theirs in config.columns.items() if ours != theirs})
    for name in template_fields(config.template):
        if name not in rows.column_names:
            raise ConfigError(
                f"data.template uses {{{name}}}, but the data has the columns {', '.join(rows.column_names)}"
            )
    if config.prompt == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            "data.prompt is chat, but the model's tokenizer has no chat template; use data.prompt: template"
        )
    columns = list(rows)
    prompts = [render_prompt(row, config, tokenizer) for row in columns]
    ids = tokenizer(prompts, add_special_tokens=config.prompt != "chat")["input_ids"] if prompts else []
    tasks = [
        Task(index, prompt, prompt_ids, row)
        for index, (prompt, prompt_ids, row) in enumerate(zip(prompts, ids, columns, strict=True))
        if 0 < len(prompt_ids) <= config.max_prompt_tokens
    ]
    if prompts and not tasks:
        raise ConfigError(f"data.max_prompt_tokens is {config.max_prompt_tokens}; every prompt is longer than that")
    return tasks, len(prompts) - len(tasks)


def render_prompt(row: dict[str, Any], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the policy continues."""
    text = config.template.format(**row)
    if config.prompt == "template":
        return text
    system = [{"role": "system", "content": config.system}] if config.system else []
    turns = [*system, {"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def template_fields(template: str) -> list[str]:
    """The column names in a template.

    Raises:
        ConfigError: the template is malformed.
    """
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"the template {template!r} is malformed: {error}") from None


class TaskStream:
    """The training tasks in the order of their use: an endless row of seeded permutations, one an epoch.

    `batch(step)` is a function of (seed, step) and of nothing that happened before, so resuming needs one integer. The
    prompts of a step do not depend on the number of ranks; rank r has the r-th part of them.
    """

    def __init__(
        self, tasks: Sequence[Task], prompts_per_step: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        assert prompts_per_step % world_size == 0 and tasks
        self.tasks, self.prompts_per_step, self.seed = tasks, prompts_per_step, seed
        share = prompts_per_step // world_size
        self.positions = range(rank * share, (rank + 1) * share)
        self._epoch, self._order = -1, np.empty(0, dtype=int)

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in one epoch, at least 1."""
        return max(1, len(self.tasks) // self.prompts_per_step)

    def batch(self, step: int) -> list[Task]:
        """This rank's N tasks of `step`, each with the seed of its completions."""
        return [
            replace(self._at(step * self.prompts_per_step + position), seed=(self.seed, step, position))
            for position in self.positions
        ]

    def replacements(self, step: int, attempt: int) -> list[Task]:
        """This rank's N tasks to take the places of tied ones in the `attempt`-th (from 1) resampling of `step`.

        Drawn from the whole data by (seed, step, attempt), so that what was resampled before is nobody's business.
        """
        total, whole = len(self.tasks), self.prompts_per_step
        generator = np.random.default_rng((self.seed, step, attempt, 2))
        rows = generator.choice(total, whole, replace=whole > total)
        return [
            replace(self.tasks[rows[position]], seed=(self.seed, step, attempt * whole + position))
            for position in self.positions
        ]

    def _at(self, place: int) -> Task:
        epoch, offset = divmod(place, len(self.tasks))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, _permutation(len(self.tasks), self.seed, epoch)
        return self.tasks[self._order[offset]]


def _permutation(count: int, *key: int) -> np.ndarray:
    return np.random.default_rng((*key, 1)).permutation(count)


def _load(path: str, subset: str | None, split: str) -> Dataset:
    if path.startswith("builtin:"):
        if path != "builtin:word_problems" or split not in BUILTIN_ROWS:
            raise ConfigError(
                f"data.path {path!r} (split {split!r}) is not built in; known: builtin:word_problems with train or test"
            )
        return Dataset.from_list(word_problems(split, BUILTIN_ROWS[split]))
    local = Path(path)
    if local.suffix in FORMATS and not local.exists():
        raise ConfigError(f"data: there is no file {path}")
    try:
        if local.is_file() and split != "train":
            raise ConfigError(f"{path} is one file and has no split {split!r}; name another file as data.eval_path")
        if local.is_file() and local.suffix in FORMATS:
            return load_dataset(FORMATS[local.suffix], data_files=str(local), split="train")
        if local.is_file():
            raise ConfigError(f"data.path is {path}; a file must end in {', '.join(FORMATS)}")
        return load_dataset(path, subset, split=split)
    except ConfigError:
        raise
    except Exception as error:  # datasets raises many kinds; all of them mean the same to the user
        raise ConfigError(
            f"data.path is {path!r} (split {split!r}), and it cannot be loaded: {_first_line(error)}"
        ) from error


def _limited(rows: Dataset, limit: int | None) -> Dataset:
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _first_line(error: Exception) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (
        str(error).splitlines() or ["the data is empty" if isinstance(error, StopIteration) else type(error).__name__]
    )[0]
