"""The reward `reasoning_gym`: the scorer of the task of Reasoning Gym that has made the row."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_core.config.gym_tasks import PREFIX, open_gym_task
from grpo_core.objective.answers import cut_thinking
from grpo_core.objective.rewards import REWARDS

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.S)
MARK = "####"

_scorers: dict[str, Any] = {}  # task and arguments -> its data set


def find_answer(text: str, prompt: str | None = None) -> str | None:
    """Return the answer in a completion: what stands in the last <answer>...</answer>, else after the last ####.

    Without either it is the whole text. The reasoning, <think>...</think>, does not count. None if nothing is left.

    >>> [find_answer(text) for text in ("<think>5?</think> 7", "#### 7", "<answer>7</answer>.", "")]
    ['7', '7', '7', None]
    """
    text = cut_thinking(text, prompt)
    marked = ANSWER.findall(text)
    return (marked[-1] if marked else text.rpartition(MARK)[2]).strip() or None


@REWARDS.register("reasoning_gym", never_null=("generator", "metadata"), own_process=True)
def reasoning_gym(
    completions: Sequence[str],
    prompts: Sequence[str] | None = None,
    *,
    question: Sequence[str],
    answer: Sequence[Any],
    metadata: Sequence[Mapping[str, Any]],
    generator: Sequence[Mapping[str, Any]],
) -> list[float | None]:
    """The task's own score of the answer, from 0 to 1; 0.0 without an answer, or where the scorer cannot read it.

    The answer stands in the last <answer>...</answer>, else after the last ####, else it is the whole completion
    without its reasoning. For data.path reasoning_gym:TASK, whose rows have these columns.
    """
    scores: list[float | None] = []
    rows = zip(question, answer, metadata, generator, strict=True)
    for i, (asked, gold, facts, made_by) in enumerate(rows):
        stated = find_answer(completions[i], None if prompts is None else prompts[i])
        item = {"question": asked, "answer": gold, "metadata": facts}
        scores.append(0.0 if stated is None else _score(_find_scorer(made_by), stated, item))
    return scores


def _score(scorer: Any, answer: str, item: dict[str, Any]) -> float:
    try:
        return float(scorer.score_answer(answer=answer, entry=item))
    except Exception:  # the scorers are many, and some raise on an answer of another form
        return 0.0


def _find_scorer(generator: Mapping[str, Any]) -> Any:
    """Return the data set that scores the rows of a generator; it has made no items."""
    key = json.dumps(generator, default=str, sort_keys=True)
    if key not in _scorers:
        _scorers[key] = open_gym_task(PREFIX + generator["task"], {**generator["args"], "size": 1})
    return _scorers[key]
