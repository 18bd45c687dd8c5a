"""Recognise the forms of other projects' data, and name the keys of the configuration that each form needs.

A form is recognised if data.path is given on the command line. Its keys then replace those of the configuration file,
which were written for other data; other keys given on the command line take precedence. If data.sources is given on the
command line, the form of each source that sets nothing but path, name and weight sets the other keys of that source.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from grpo_core.config import files
from grpo_core.config.sections import DataConfig, RunConfig, SourceConfig
from grpo_core.counts import quantify
from grpo_core.data.columns import is_conversation, read_path, rename
from grpo_core.data.form_table import FORMS, Form, ends_with_assistant, find_form
from grpo_core.data.rows import Row, count_rows, peek_rows
from grpo_core.objective.numbers import read_gold
from grpo_core.schema import ConfigError

PEEKED_ROWS = 50  # of the data, by which its form is recognised
EVALUATED_SHARE = 10  # one row in as many is held out at most, unless evaluation.num_tasks is given
MAX_SHOWN_CHARACTERS = 120  # of a value in a sentence, or of an item in a list
KEYS_OF_SOURCE = {  # of a form -> of a source
    **{f"data.{key}": key for key in ("columns", "template", "prompt", "system")},
    **{"rewards": "rewards", "evaluation.reward": "eval_reward"},
}


def load_config(path: str | Path, overrides: Sequence[str] = (), *, supervised: bool = False) -> RunConfig:
    """Read and check a configuration as the commands do: `config.files.load`, with the form of the data recognised.

    Raises:
        ConfigError: as `load` and `recognise`.
    """
    return files.load(
        path,
        overrides,
        supervised=supervised,
        recognise=recognise,
        notify=lambda sentence: print(f"note: {sentence}"),
    )


def recognise(
    config: RunConfig, written: Collection[str], supervised: bool = False
) -> tuple[dict[str, Any], str | None]:
    """Return the keys of the form that the data has, and a line about what they replace, if they do.

    `written` are the keys given on the command line, which are not replaced. With data.sources there is a line for each
    source whose form is recognised.

    Raises:
        ConfigError: the data cannot be read; nothing says how completions are scored; a library that the form's
            reward needs is not installed; or the sources are for `sft` and have several targets.
    """
    if config.data.sources:
        return _recognise_sources(config, written, supervised) if "data.sources" in written else ({}, None)
    return _recognise_path(config, written, supervised)


def _recognise_sources(
    config: RunConfig, written: Collection[str], supervised: bool
) -> tuple[dict[str, Any], str | None]:
    """Return data.sources with the keys of their forms, the other keys that these need, and the lines about them."""
    sources, lines, others, targets, sizes = [], [], {}, [], []
    own = {*written, "data.last_turn", "evaluation.num_tasks"}  # they are the same for all sources
    for i, source in enumerate(config.data.sources):
        keys, line = {}, None
        try:
            if source == SourceConfig(path=source.path, name=source.name, weight=source.weight):
                keys, line = _recognise_path(config.of_source(source.name), own, supervised)
            size = _fit_evaluation(config.of_source(source.name), {}, written)
        except ConfigError as error:
            raise ConfigError(f"data.sources[{i}] ({source.name}): {error}") from None
        lines += [f"data.sources[{i}] ({source.name}): {line}"] if line else []
        sizes += [(size["evaluation.num_tasks"], source.name)] if size else []
        form_keys = {KEYS_OF_SOURCE[key]: value for key, value in keys.items() if key in KEYS_OF_SOURCE}
        if "system" in form_keys and config.data.system:
            form_keys["system"] = ""
        sources.append(asdict(source) | form_keys)
        others |= {key: value for key, value in keys.items() if key == "data.max_prompt_tokens"}
        targets += [keys["sft.targets"]] if "sft.targets" in keys else []
    if any(target != targets[0] for target in targets):
        raise ConfigError(
            f"data.sources have forms with several targets, {', '.join(target[0] for target in targets)}; sft trains "
            f"the same targets of all sources, so name them with sft.targets, and the columns of each source"
        )
    others |= {"sft.targets": targets[0]} if targets else {}
    if sizes:
        (size, name), others["evaluation.num_tasks"] = min(sizes), min(sizes)[0]
        changes = _describe_changes(config, {"evaluation.num_tasks": size})
        lines.append(f"the source {name} is small, which sets {changes}")
    return {"data.sources": sources, **others} if lines else {}, "\n".join(lines) or None


def _recognise_path(config: RunConfig, written: Collection[str], supervised: bool) -> tuple[dict[str, Any], str | None]:
    """Return the keys of the form that the data at data.path has, and a line about what they replace."""
    data = config.data
    if _is_generated(data.path):
        return {}, None
    keys: dict[str, Any] = {}
    if Path(data.path).is_file():  # which has no splits, whatever the data of the configuration file had
        keys |= {"data.split": "train", "data.subset": None, "data.eval_split": None}
    keys = {key: value for key, value in keys.items() if key not in written}
    subset, split = (keys.get(key, attrgetter(key)(config)) for key in ("data.subset", "data.split"))
    peeked = peek_rows(data.path, subset, split, PEEKED_ROWS)
    form, rows = find_form(peeked)
    keys |= _fit_evaluation(config, keys, written)
    if form is None:
        changes = _describe_changes(config, keys)
        kind = "is one file, which" if Path(data.path).is_file() else "is small, which"
        return keys, f"{data.path} {kind} sets {changes}" if changes else None
    columns = _list_columns(form, data, written)
    names_gold = "answer" in data.columns and any(key.startswith("data.columns") for key in written)
    reward = _choose_reward(form, [rename(row, columns) for row in rows])
    if reward == "python_tests":
        others = {name: path for name, path in form.columns.items() if name != "answer"}
        form = replace(form, columns=others | {"tests": form.columns.get("answer", str(form.gold))}, target=None)
    if supervised and form.target is None and "sft.targets" not in written:
        _check_targets(config, form, [rename(row, columns) for row in rows])
    if reward is None and not supervised and not names_gold and "rewards" not in written:
        raise ConfigError(
            f"data.path is {data.path!r}, in the form of {form.name} ({form.signature}), which does not say how "
            f"completions are scored; name the rewards, such as rewards=my_rewards.py:my_reward"
            f"{_describe_columns(form, rows[0])}{_describe_words(form, [rename(row, columns) for row in rows])}"
        )
    form_keys = _list_keys(form, [rename(row, columns) for row in rows], rows[0], reward, supervised)
    form_keys["data.columns"] |= _list_written(data, written)
    if data.max_prompt_tokens < DataConfig.max_prompt_tokens:  # a limit for the file's own data
        form_keys["data.max_prompt_tokens"] = DataConfig.max_prompt_tokens
    if "evaluation.num_tasks" in written and not config.evaluation.num_tasks:  # no evaluation needs a reward
        form_keys.pop("evaluation.reward", None)
    if names_gold:
        form_keys.pop("evaluation.num_tasks", None)
    keys |= {key: value for key, value in form_keys.items() if not _is_written(key, written)}
    _check_library(form, data.path, keys)
    changes = _describe_changes(config, keys) or "nothing else"
    if others := len(peeked) - len(rows):
        changes += (
            f"; {others} of its first {quantify(len(peeked), 'row')} {'does' if others == 1 else 'do'} not have it"
        )
    return keys, f"{data.path} has the form of {form.name} ({form.signature}), which sets {changes}"


def _is_generated(path: str) -> bool:
    return ":" in path and not Path(path).exists()  # such as builtin:word_problems


def _fit_evaluation(config: RunConfig, keys: Mapping[str, Any], written: Collection[str]) -> dict[str, Any]:
    """Return evaluation.num_tasks for data of which it would hold out more than a tenth; nothing for other data.

    `keys` are those of the data that the configuration is about to get.
    """
    data, evaluation = config.data, config.evaluation
    has_own = any(keys.get(key, attrgetter(key)(config)) for key in ("data.eval_split", "data.eval_path"))
    if (
        _is_generated(data.path)
        or has_own
        or evaluation.sets
        or "evaluation.num_tasks" in written
        or not evaluation.num_tasks
    ):
        return {}
    subset, split = (keys.get(key, attrgetter(key)(config)) for key in ("data.subset", "data.split"))
    count = count_rows(data.path, subset, split, evaluation.num_tasks * EVALUATED_SHARE)
    count = count if data.limit is None else min(count, data.limit)
    num_tasks = max(1, count // EVALUATED_SHARE)
    return {"evaluation.num_tasks": num_tasks} if num_tasks < min(evaluation.num_tasks, count) else {}


def _list_columns(form: Form, data: DataConfig, written: Collection[str]) -> dict[str, str]:
    """Return data.columns with the overrides of the command line."""
    if "data.columns" in written:
        return data.columns
    return form.columns | _list_written(data, written)


def _list_written(data: DataConfig, written: Collection[str]) -> dict[str, str]:
    return {name: path for name, path in data.columns.items() if f"data.columns.{name}" in written}


def _choose_reward(form: Form, rows: Sequence[Row]) -> str | None:
    """Return the reward of a form, or of its gold answers; None if they are of no kind, or tests beside others.

    `rows` have our names: the gold answer is the column answer, also of conversations with one, as in `make_prompt`.
    """
    if form.reward is not None or form.gold is None:
        return form.reward
    golds = [gold for gold in _list_golds(form, rows) if gold is not None and gold != ""]  # those are faulty rows
    have_tests = {_is_tests(gold) for gold in golds}
    if True in have_tests:
        return None if False in have_tests else "python_tests"
    return "correct_answer" if all(read_gold(gold) is not None for gold in golds) else form.reward_of_texts


def _list_golds(form: Form, rows: Sequence[Row]) -> list[Any]:
    has_answer = any("answer" in row for row in rows)
    return [row.get("answer") if has_answer else read_path(row, str(form.gold)) for row in rows]


def _describe_columns(form: Form, row: Row) -> str:
    """Return a clause about the columns of which one may hold the gold answer of TRL's prompt alone; "" without any."""
    others = [name for name in row if form is FORMS[-1] and name.lower() != "prompt"]
    return (
        f", or the gold answer, such as data.columns='{{answer: COLUMN}}', of the columns {', '.join(others)}"
        if others
        else ""
    )


def _describe_words(form: Form, rows: Sequence[Row]) -> str:
    """Return a clause about the first gold answer that is no number among others that are; "" for other answers."""
    golds = [] if form.gold is None or form.reward_of_texts else _list_golds(form, rows)
    words = [gold for gold in golds if read_gold(gold) is None]
    if 2 * len(words) >= len(golds):
        return ""
    are = "is no number" if len(words) == 1 else "are no numbers"
    return (
        f"; {len(words)} of its first {len(golds)} gold answers {are}, such as {_show(words[0])}; to train on the "
        f"others alone, write rewards=correct_answer evaluation.reward=correct_answer data.bad_rows=drop"
    )


def _is_tests(gold: Any) -> bool:
    """Return whether a gold answer is tests of code: pairs of input and output, or assertions; also as JSON."""
    if isinstance(gold, str) and gold.lstrip().startswith(("[", "{")):
        with contextlib.suppress(ValueError, RecursionError):
            gold = json.loads(gold)
    if isinstance(gold, Mapping):
        return {"inputs", "outputs"} <= gold.keys()
    items = gold if isinstance(gold, (list, tuple)) and gold else [gold]
    return all(
        {"input", "output"} <= item.keys()
        if isinstance(item, Mapping)
        else isinstance(item, str) and item.lstrip().startswith("assert ")
        for item in items
    )


def _check_targets(config: RunConfig, form: Form, rows: Sequence[Row]) -> None:
    """Check that the data has the columns of sft.targets, which are those of the configuration file.

    Conversations that end with the assistant's turn need none.

    Raises:
        ConfigError: it lacks one.
    """
    if any(ends_with_assistant(row.get(form.template[1:-1])) for row in rows):
        return
    for target in config.sft.targets:
        for name in _list_fields(target.template):
            if name not in rows[0]:
                raise ConfigError(
                    f"data.path is {config.data.path!r}, in the form of {form.name} ({form.signature}), which has no "
                    f"targets; name them, such as sft.targets='[\"{{COLUMN}}\"]' with a column of "
                    f"{', '.join(rows[0])}"
                )


def _list_fields(template: str) -> list[str]:
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name]
    except ValueError:
        return []  # which is refused with the targets


def _list_keys(form: Form, rows: Sequence[Row], row: Row, reward: str | None, supervised: bool) -> dict[str, Any]:
    """Return every key that a form sets, with its value as in a configuration file.

    `rows` have our names, and `row` those of the data. A column that gets our name keeps its own too, which functions
    of the user may read.
    """
    prompts = [row.get(form.template[1:-1]) for row in rows]
    own = {name: name for name in form.columns.values() if name in row}
    hidden = {f"{name}_of_data": name for name in form.columns if name in row and name not in own}
    keys: dict[str, Any] = {
        "data.eval_path": None,
        "data.columns": form.columns | own | hidden,
        "data.prompt": "chat" if any(map(is_conversation, prompts)) else form.prompt,
        "data.template": form.template,
        "data.system": None,
        "data.last_turn": "gold",
    }
    if supervised:
        keys |= {} if form.target is None else {"sft.targets": [form.target]}
        reward = reward or (form.gold and "text_match")
    elif reward is not None:
        keys["rewards"] = [reward]
    if reward is not None:
        return keys | {"evaluation.reward": reward}
    return keys | {"evaluation.num_tasks": 0}  # nothing says whether a completion is right


def _is_written(key: str, written: Collection[str]) -> bool:
    """Return whether the command line sets a key; data.template sets the whole prompt."""
    if key in ("data.prompt", "data.system") and "data.template" in written:
        return True
    return key in written or (key == "evaluation.num_tasks" and "evaluation.reward" in written)


def _check_library(form: Form, path: str, keys: dict[str, Any]) -> None:
    names = [*keys.get("rewards", ()), keys.get("evaluation.reward")]
    if "math_equal" in names and importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            f"data.path is {path!r}, in the form of {form.name} ({form.signature}), whose reward math_equal needs "
            f"math-verify, which is not installed: pip install -e '.[math]'; or choose other functions with rewards= "
            f"and evaluation.reward="
        )


def _describe_changes(config: RunConfig, keys: dict[str, Any]) -> str:
    """Return the keys whose values change, each with its new and its old value; "" without any.

    Rewards and targets that are replaced are named with their weights and arguments, which are lost too.
    """
    changes = []
    for key, new in keys.items():
        old = attrgetter(key)(config)
        if isinstance(old, list):
            old = [_shorten_item(item) for item in old]
        if old != new:
            changes.append(f"{key} {_show(new)} (not {_show(old)})")
    return ", ".join(changes)


def _shorten_item(item: Any) -> Any:
    """Return a section in a list as in a configuration file, without the values that are defaults."""
    first, *others = fields(item)
    values = {x.name: getattr(item, x.name) for x in others}
    defaults = asdict(type(item)(getattr(item, first.name)))
    changed = {name: value for name, value in values.items() if value != defaults[name]}
    return {first.name: getattr(item, first.name), **changed} if changed else getattr(item, first.name)


def _show(value: Any) -> str:
    """Return a value as text; each item of a list is shortened on its own, so that all are named."""
    if isinstance(value, list):
        return f"[{', '.join(_shorten(files.to_inline_yaml(item)) for item in value)}]"
    return _shorten(repr(value) if isinstance(value, str) else files.to_inline_yaml(value))


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."
