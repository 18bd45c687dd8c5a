"""The forms in which others write their data: how each is recognised, and where its parts are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grpo_core.data.columns import MISSING, is_conversation, read_path
from grpo_core.data.rows import Row

GOLDS = ("answer", "solution", "ground_truth")  # columns with the gold answer beside TRL's prompt
BOXED = "{question}\nThink step by step, and write the final answer in \\boxed{{}}."
EQUATION = (
    "Make {target} from the numbers {nums} with + - * / and brackets, each number once. Think first, then write the "
    "equation in <answer> </answer>."
)


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
    """Return whether a row in verl's form has a gold answer, and a data source that begins with `source`."""
    has_gold = _has("prompt")(row) and read_path(row, TRUTH) not in (None, MISSING)
    return has_gold and str(row.get("data_source")).lower().startswith(source)


def ends_with_assistant(value: Any) -> bool:
    """Return whether a column's value is a conversation whose last turn is the assistant's."""
    return is_conversation(value) and value[-1]["role"] == "assistant"


TRUTH = "reward_model.ground_truth"  # the gold answer in verl's form
FORMS = (  # the first that most rows match counts (`find_form`)
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
        "prompt, reward_model",
        lambda row: _comes_from(row, ""),
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
    Form("open-r1", "problem, answer", _has("problem", "answer"), BOXED, {"question": "problem"}, reward="math_equal"),
    Form(
        "GSM8K",
        "question, answer with ####",
        lambda row: _has("question", "answer")(row) and "####" in str(row["answer"]),
        "{question}",
        reward="correct_answer",
    ),
    Form(
        "TRL",
        "prompt, solution, answer",
        _has("prompt", "solution", "answer"),
        "{prompt}",
        prompt="template",
        target="{solution}",
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
            lambda row, column=column: ends_with_assistant(row.get(column)),
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


def find_form(rows: Sequence[Row]) -> tuple[Form | None, list[Row]]:
    """Return the form of the data, and the rows that have it; None and no rows for data of no form.

    It is the first form that more than half of the rows have. The others are faulty, and are refused or left out by
    their number when the tasks are made. The columns may have capitals in the data, such as Question.
    """
    form, formed = _match(rows, rows)
    if form is None and rows:
        form, formed = _match([{str(name).lower(): value for name, value in row.items()} for row in rows], rows)
        form = form and replace(form, columns=_name_capitals(form.columns, rows[0]))
    return form, formed


def _match(views: Sequence[Row], rows: Sequence[Row]) -> tuple[Form | None, list[Row]]:
    for form in FORMS:
        formed = [row for view, row in zip(views, rows, strict=True) if form.matches(view)]
        if 2 * len(formed) > len(rows):
            return form, formed
    return None, []


def _name_capitals(columns: dict[str, str], row: Row) -> dict[str, str]:
    """Return the columns of a form with those of the data that have capitals, such as {question: Question}."""
    names = {str(name).lower(): str(name) for name in row if str(name).lower() not in row}
    paths = {new_name: path.partition(".") for new_name, path in columns.items()}
    return names | {new: f"{names.get(first, first)}{dot}{rest}" for new, (first, dot, rest) in paths.items()}
