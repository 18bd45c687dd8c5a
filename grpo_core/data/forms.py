"""Recognise the forms in which others write their data, and name the keys of the configuration that each form needs.

A form is recognised where data.path is a word of the command line. Its keys then replace those of the configuration
file, which were written for other data; the other words of the command line win. Where data.sources is such a word, the
form of each source that names nothing but its path, name and weight sets the keys of that source.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from grpo_core.config import files
from grpo_core.config.sections import DataConfig, RunConfig, SourceConfig
from grpo_core.counts import quantify
from grpo_core.data.columns import MISSING, is_conversation, read_path, rename
from grpo_core.data.rows import Row, peek_rows
from grpo_core.objective.numbers import read_gold
from grpo_core.schema import ConfigError

PEEKED_ROWS = 50  # of the data, by which its form is recognised
GOLDS = ("solution", "answer", "ground_truth")  # columns with the gold answer beside TRL's prompt
BOXED = "{question}\nThink step by step, and write the final answer in \\boxed{{}}."
EQUATION = (
    "Make {target} from the numbers {nums} with + - * / and brackets, each number once. Think first, then write the "
    "equation in <answer> </answer>."
)
MAX_SHOWN_CHARACTERS = 120  # of a value in a sentence, or of an item in a list
KEYS_OF_SOURCE = {  # of a form -> of a source
    **{f"data.{key}": key for key in ("columns", "template", "prompt", "system")},
    **{"rewards": "rewards", "evaluation.reward": "eval_reward"},
}


@dataclass(frozen=True)
class Form:
    """A form of data: how it is recognised, and where its parts are."""

    name: str
    signature: str  # what its rows have, in a sentence
    matches: Callable[[Row], bool]
    template: str  # data.template
    columns: dict[str, str] = field(default_factory=dict)  # data.columns
    gold: str | None = "answer"  # path of the gold answer in a row of the data; None: the data has none
    reward: str | None = None  # None: python_tests or correct_answer for tests or numbers, else reward_of_texts
    reward_of_texts: str | None = "math_equal"  # None: the gold answers may be any text
    prompt: str = "chat"  # data.prompt of a prompt that is text; messages need chat
    target: str | None = "{answer}"  # the item of sft.targets


def _has(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(row.get(name) is not None for name in names)


def _comes_from(row: Row, source: str) -> bool:
    """Return whether a row in verl's form names a data source that begins with `source`."""
    return _has("data_source", "prompt", "reward_model")(row) and str(row["data_source"]).lower().startswith(source)


def _ends_with_assistant(value: Any) -> bool:
    return is_conversation(value) and value[-1]["role"] == "assistant"


TRUTH = "reward_model.ground_truth"  # the gold answer in verl's form
FORMS = (  # the first that all rows match counts (`find_form`)
    Form("Countdown", "nums, target", _has("nums", "target"), EQUATION, gold=None, reward="countdown", target=None),
    Form(
        "Countdown in verl's form",
        "data_source, prompt, reward_model",
        lambda row: _comes_from(row, "countdown") and read_path(row, f"{TRUTH}.target") is not MISSING,
        "{prompt}",
        {"nums": f"{TRUTH}.numbers", "target": f"{TRUTH}.target"},
        gold=None,
        reward="countdown",
        target=None,
    ),
    Form(
        "DAPO-Math",
        "prompt, solution, source_prompt",
        _has("prompt", "solution", "source_prompt"),
        "{prompt}\nThink step by step, and write the answer in the last line.",
        {"answer": "solution"},
        "solution",
    ),
    Form(
        "DAPO-Math",
        "data_source math_dapo, prompt, reward_model",
        lambda row: _comes_from(row, "math_dapo"),
        "{prompt}",
        {"answer": TRUTH},
        TRUTH,
    ),
    Form(
        "verl",
        "data_source, prompt, reward_model",
        lambda row: _comes_from(row, "") and read_path(row, TRUTH) is not MISSING,
        "{prompt}",
        {"answer": TRUTH},
        TRUTH,
    ),
    Form(
        "open-r1",
        "problem, solution, answer",
        _has("problem", "solution", "answer"),
        BOXED,
        {"question": "problem"},
        reward="math_equal",
        target="{solution}",
    ),
    Form(
        "MATH",
        "problem, solution with \\boxed",
        lambda row: _has("problem", "solution")(row) and "\\boxed" in str(row["solution"]),
        BOXED,
        {"question": "problem", "answer": "solution"},
        reward="math_equal",
    ),
    Form(
        "GSM8K",
        "question, answer with ####",
        lambda row: _has("question", "answer")(row) and "####" in str(row["answer"]),
        "{question}",
        reward="correct_answer",
    ),
    *(
        Form(
            "TRL",
            f"prompt, {gold}",
            _has("prompt", gold),
            "{prompt}",
            {} if gold == "answer" else {"answer": gold},
            gold,
            prompt="template",
        )
        for gold in GOLDS
    ),
    *(
        Form(
            name,
            f"{column} with a last turn of the assistant",
            lambda row, column=column: _ends_with_assistant(row.get(column)),
            f"{{{column}}}",
            gold=f"{column}.-1.content",
            reward_of_texts=None,
        )
        for name, column in (("TRL", "prompt"), ("conversations", "messages"))
    ),
    Form(
        "TRL",
        "prompt, completion",
        lambda row: _has("prompt", "completion")(row) and isinstance(row["completion"], str),
        "{prompt}",
        gold=None,
        prompt="template",
        target="{completion}",
    ),
    Form(
        "TRL",
        "prompt, completion with one message",
        lambda row: _has("prompt")(row) and is_conversation(row.get("completion")) and len(row["completion"]) == 1,
        "{prompt}",
        {"target": "completion.0.content"},
        gold=None,
        prompt="template",
        target="{target}",
    ),
    Form("TRL", "prompt", _has("prompt"), "{prompt}", gold=None, prompt="template", target=None),
)


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

    `written` are the keys of the command line's words, which stay as they are. With data.sources there is a line for
    each source whose form is recognised.

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
    sources, lines, others, targets = [], [], {}, []
    own = {*written, "data.last_turn", "evaluation.num_tasks"}  # they are the same for all sources
    for i, source in enumerate(config.data.sources):
        keys: dict[str, Any] = {}
        if source == SourceConfig(path=source.path, name=source.name, weight=source.weight):
            try:
                keys, line = _recognise_path(config.of_source(source.name), own, supervised)
            except ConfigError as error:
                raise ConfigError(f"data.sources[{i}] ({source.name}): {error}") from None
            lines += [f"data.sources[{i}] ({source.name}): {line}"] if line else []
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
    return {"data.sources": sources, **others} if lines else {}, "\n".join(lines) or None


def _recognise_path(config: RunConfig, written: Collection[str], supervised: bool) -> tuple[dict[str, Any], str | None]:
    """Return the keys of the form that the data at data.path has, and a line about what they replace."""
    data = config.data
    if ":" in data.path and not Path(data.path).exists():  # rows that are generated, such as builtin:word_problems
        return {}, None
    keys: dict[str, Any] = {}
    if Path(data.path).is_file():  # which has no splits, whatever the data of the configuration file had
        keys |= {"data.split": "train", "data.subset": None, "data.eval_split": None}
    keys = {key: value for key, value in keys.items() if key not in written}
    subset, split = (keys.get(key, attrgetter(key)(config)) for key in ("data.subset", "data.split"))
    peeked = peek_rows(data.path, subset, split, PEEKED_ROWS)
    form, rows = find_form(peeked)
    if form is None:
        changes = _describe_changes(config, keys)
        return keys, f"{data.path} is one file, which sets {changes}" if changes else None
    columns = _list_columns(form, data, written)
    names_gold = "answer" in data.columns and any(key.startswith("data.columns") for key in written)
    reward = _choose_reward(form, [rename(row, columns) for row in rows])
    if reward == "python_tests":
        form = replace(form, columns={"tests": str(form.gold)}, target=None)
    if supervised and form.target is None and "sft.targets" not in written:
        _check_targets(config, form, [rename(row, columns) for row in rows])
    if reward is None and not supervised and not names_gold and "rewards" not in written:
        raise ConfigError(
            f"data.path is {data.path!r}, in the form of {form.name} ({form.signature}), which does not say how "
            f"completions are scored; name the rewards, such as rewards=my_rewards.py:my_reward"
            f"{_describe_words(form, [rename(row, columns) for row in rows])}"
        )
    form_keys = _list_keys(form, rows, reward, supervised)
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
        changes += f"; {others} of its first {quantify(len(peeked), 'row')} {'has' if others == 1 else 'have'} no form"
    return keys, f"{data.path} has the form of {form.name} ({form.signature}), which sets {changes}"


def find_form(rows: Sequence[Row]) -> tuple[Form | None, list[Row]]:
    """Return the form of the data, and the rows that have it; None and no rows for data of no form.

    Rows that match no form at all do not count if they are fewer than half: they are faulty, and are refused or left
    out by their number when the tasks are made.
    """
    formed = [row for row in rows if any(form.matches(row) for form in FORMS)]
    if 2 * len(formed) <= len(rows):
        return None, []
    form = next((form for form in FORMS if all(map(form.matches, formed))), None)
    return form, formed if form else []


def _list_columns(form: Form, data: DataConfig, written: Collection[str]) -> dict[str, str]:
    """Return data.columns as the words of the command line leave them."""
    if "data.columns" in written:
        return data.columns
    return form.columns | {name: path for name, path in data.columns.items() if f"data.columns.{name}" in written}


def _choose_reward(form: Form, rows: Sequence[Row]) -> str | None:
    """Return the reward of a form, or of its gold answers; None if they are of no kind, or tests beside others.

    `rows` have our names: the gold answer is the column answer, also of conversations with one, as in `make_prompt`.
    """
    if form.reward is not None or form.gold is None:
        return form.reward
    golds = _list_golds(form, rows)
    have_tests = {_is_tests(gold) for gold in golds}
    if True in have_tests:
        return None if False in have_tests else "python_tests"
    return "correct_answer" if all(read_gold(gold) is not None for gold in golds) else form.reward_of_texts


def _list_golds(form: Form, rows: Sequence[Row]) -> list[Any]:
    has_answer = any("answer" in row for row in rows)
    return [row.get("answer") if has_answer else read_path(row, str(form.gold)) for row in rows]


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
    if any(_ends_with_assistant(row.get(form.template[1:-1])) for row in rows):
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


def _list_keys(form: Form, rows: Sequence[Row], reward: str | None, supervised: bool) -> dict[str, Any]:
    """Return every key that a form sets, with its value as in a configuration file.

    A column that gets our name keeps its own too, which functions of the user may read.
    """
    prompts = [row.get(form.template[1:-1]) for row in rows]
    keys: dict[str, Any] = {
        "data.eval_path": None,
        "data.columns": form.columns | {name: name for name in form.columns.values() if name in rows[0]},
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
    """Return whether a word of the command line sets a key; data.template says what the whole prompt is."""
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
