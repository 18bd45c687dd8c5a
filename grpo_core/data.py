"""Rows to tasks: the tokenizer, the prompt, and which tasks belong to a (step, rank)."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from grpo_core.batch import Task
from grpo_core.config import DataConfig
from grpo_core.rows import Row, permutation
from grpo_core.schema import ConfigError, in_short, known

BUILTIN = Path(__file__).parent / "builtin"


def model_path(path: str) -> str:
    """A hub id or folder as it is; builtin:NAME becomes the folder inside this package.

    Raises:
        ConfigError: no such built-in model, or no such folder where only a folder can be meant.
    """
    if not path.startswith("builtin:"):
        if missing := missing_folder(path):
            raise ConfigError(f"model.path is {path!r}: {missing}")
        return path
    folder = BUILTIN / path.removeprefix("builtin:")
    if not folder.is_dir():
        raise ConfigError(f"model.path is {path!r}; {known(path, [f'builtin:{p.name}' for p in BUILTIN.glob('*/')])}")
    return str(folder)


def missing_folder(path: str) -> str | None:
    """Why nothing is at `path`, where it must be a folder: a name that begins as one or lies in one that is there."""
    where = Path(path)
    local = path.startswith(("/", ".", "~")) or path.count("/") > 1 or ("/" in path and where.parent.is_dir())
    if where.exists() or not local:
        return None
    if not where.parent.is_dir():
        return f"there is no folder {path}"
    there = [beside.name for beside in where.parent.iterdir() if beside.is_dir()]
    return f"there is no folder {path}; {known(where.name, there)}"


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ConfigError: it cannot be loaded.
    """
    folder = model_path(path)
    if Path(folder).is_dir() and not [*Path(folder).glob("*token*"), *Path(folder).glob("vocab*")]:
        raise ConfigError(f"model.path is {path!r}, and its tokenizer cannot be loaded: no file of it is there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of many kinds, by the tokenizer's
        raise ConfigError(
            f"model.path is {path!r}, and its tokenizer cannot be loaded: {first_line(error)}{local_hint(path)}"
        ) from error
    if not tokenizer("one 1", add_special_tokens=False)["input_ids"]:  # what comes of a folder that has none
        raise ConfigError(f"model.path is {path!r}, and its tokenizer cannot be loaded: no file of it is there")
    return tokenizer


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def local_hint(path: str) -> str:
    """What to do where no hub can be reached."""
    folder = path.startswith(("builtin:", ".", "/")) or Path(path).exists()
    return "" if folder else "; if the hub cannot be reached, set model.path to a folder that holds the model"


def make_tasks(rows: Sequence[Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Task], int]:
    """Every row as a task, and the number of prompts longer than max_prompt_tokens, which long_prompts decides about.

    Raises:
        ConfigError: a column that the template or the mapping names is not there or holds no text, a prompt that is too
            long (with long_prompts: error), or no row is left.
    """
    if not rows:
        return [], 0
    rows = _renamed(rows, config.columns)
    for name in template_fields(config.template):
        if name not in rows[0]:
            raise ConfigError(f"data.template uses {{{name}}}, but the data has the columns {', '.join(rows[0])}")
        for number, row in enumerate(rows, 1):
            if not isinstance(row[name], str):
                is_what = "null" if row[name] is None else f"{str(row[name])[:40]!r}, which is no text"
                raise ConfigError(f"row {number} of the data: {name!r}, which data.template uses, is {is_what}")
    if config.prompt == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            "data.prompt is chat, but the model's tokenizer has no chat template; use data.prompt: template"
        )
    prompts = [render_prompt(row, config, tokenizer) for row in rows]
    ids = tokenizer(prompts, add_special_tokens=config.prompt != "chat", return_attention_mask=False)["input_ids"]
    if [] in ids:
        raise ConfigError(f"row {ids.index([]) + 1} of the data: the prompt is empty, and a completion needs a token")
    most = config.max_prompt_tokens
    long = [index for index, prompt_ids in enumerate(ids) if len(prompt_ids) > most]
    if long and config.long_prompts == "error":
        raise ConfigError(
            f"row {long[0] + 1} of the data: the prompt has {len(ids[long[0]])} tokens, and data.max_prompt_tokens is "
            f"{most}; {len(long)} of {len(ids)} are longer (data.long_prompts: drop leaves them out)"
        )
    for index in long if config.long_prompts == "truncate_left" else ():
        ids[index] = ids[index][-most:]
        prompts[index] = tokenizer.decode(ids[index])
    tasks = [
        Task(index, prompt, prompt_ids, row)
        for index, (prompt, prompt_ids, row) in enumerate(zip(prompts, ids, rows, strict=True))
        if len(prompt_ids) <= most
    ]
    if not tasks:
        raise ConfigError(f"data.max_prompt_tokens is {most}; every prompt is longer than that")
    return tasks, len(long)


def _renamed(rows: Sequence[Row], columns: dict[str, str]) -> list[Row]:
    """With our names for the data's columns."""
    for ours, theirs in columns.items():
        if theirs not in rows[0]:
            raise ConfigError(f"data.columns.{ours} is {theirs!r}; {known(theirs, rows[0])}")
        if ours in rows[0] and ours not in columns.values():
            raise ConfigError(f"data.columns.{ours} is {theirs!r}, but the data has a column {ours!r} of its own")
    names = {theirs: ours for ours, theirs in columns.items()}
    return [{names.get(name, name): value for name, value in row.items()} for row in rows]


def render_prompt(row: Row, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the policy continues.

    Raises:
        ConfigError: the template or the model's chat template cannot be filled in.
    """
    try:
        text = config.template.format(**row)
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise ConfigError(f"data.template {config.template!r} cannot be filled in: {error}") from None
    if config.prompt == "template":
        return text
    system = [{"role": "system", "content": config.system}] if config.system else []
    turns = [*system, {"role": "user", "content": text}]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template is a program of the model's
        raise ConfigError(f"the model's chat template cannot be filled in: {in_short(error)}") from error


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
            self._epoch, self._order = epoch, permutation(len(self.tasks), self.seed, epoch)
        return self.tasks[self._order[offset]]
