"""Built-in reward functions.

A reward is `fn(completions, prompts=..., **columns) -> list[float | None]`, one number for each completion. None means
that the completion cannot be scored; it is then left out of its group. The function receives the data columns that it
names as arguments, or all columns if it takes **kwargs. Its keyword-only arguments with a default are its
configuration. A user's function needs no registration: `name: file.py:function`.

A function whose first parameter is named `groups` gets whole groups, N lists of G completions, and each column once per
group; it returns N lists of G numbers. A function with a parameter `other_rewards` is called after the other rewards
and gets their values by name, in the form of the completions.

The keyword argument `reward_timeout`, if a function has it, is trainer.reward_timeout unless it is set.

Further facts about a reward, as attributes of the function:

    never_null       columns that must have a value in every row
    gold             {column: function}, which returns None for a gold answer that the reward cannot judge
    answer           function that returns the final answer of a completion, for the majority vote of an evaluation
    names_reward     argument that names another reward of the run
    required         arguments that the configuration must set
    reads            function that returns, for the arguments, the columns that they name
    check_arguments  function of all arguments by name, which returns "ARGUMENT is ...; it must be ...", or None
    own_process      True: the reward runs in a process of its own with a time limit, as a user's function does
    prepare          function that is called once, when that process starts
"""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo_core.objective.answers import (
    CHOICE_LETTERS,
    CLOSE,
    OPEN,
    accepted_choices,
    accepted_texts,
    check_letters,
    cut_thinking,
    final_choice,
    final_text,
)
from grpo_core.objective.countdown import find_equation, read_number, read_numbers, solve
from grpo_core.objective.numbers import final_number, read_gold
from grpo_core.registry import Registry

OTHER_REWARDS = "other_rewards"
MODULES = {  # of rewards that need more than mathematics
    "judge": "grpo_core.scoring.judge",
    "math_equal": "grpo_core.scoring.math_equal",
    "python_tests": "grpo_core.scoring.python_tests",
    "reasoning_gym": "grpo_core.scoring.gym_reward",
}

REWARDS = Registry("reward", allows_async=True, modules=MODULES)


@REWARDS.register("has_think_tags")
def has_think_tags(completions: Sequence[str], *, prompts: Sequence[str]) -> list[float]:
    """1.0 if the completion contains <think>...</think>, or closes a block that the prompt has opened; else 0.0."""
    return [float(CLOSE in text.partition(OPEN)[2]) for text in _with_opened_block(completions, prompts)]


@REWARDS.register("num_unique_chars")
def num_unique_chars(completions: Sequence[str]) -> list[float]:
    """The number of distinct characters in the completion."""
    return [float(len(set(text))) for text in completions]


@REWARDS.register("combined")
def combined(
    completions: Sequence[str], *, prompts: Sequence[str], think_weight: float = 0.7, diversity_weight: float = 0.3
) -> list[float]:
    """think_weight * has_think_tags + diversity_weight * num_unique_chars, the reward of the published recipe."""
    scores = zip(has_think_tags(completions, prompts=prompts), num_unique_chars(completions), strict=True)
    return [think_weight * think + diversity_weight * diversity for think, diversity in scores]


@REWARDS.register("think_format")
def think_format(completions: Sequence[str], *, prompts: Sequence[str]) -> list[float]:
    """1.0 if the completion is one block <think>...</think> that is not empty, and then an answer; else 0.0.

    No other text may come before the block, and the prompt may have opened it.
    """

    def well_formed(text: str) -> bool:
        if text.count(OPEN) != 1 or text.count(CLOSE) != 1:
            return False
        before, _, rest = text.partition(OPEN)
        thought, closed, answer = rest.partition(CLOSE)
        return bool(not before.strip() and closed and thought.strip() and answer.strip())

    return [float(well_formed(text)) for text in _with_opened_block(completions, prompts)]


@REWARDS.register("correct_answer", never_null=("answer",), gold={"answer": read_gold}, answer=final_number)
def correct_answer(
    completions: Sequence[str],
    prompts: Sequence[str] | None = None,
    *,
    answer: Sequence[Any],
    strict: bool = False,
    outside_thinking: bool = False,
) -> list[float | None]:
    r"""1.0 if the completion's final number equals that of the column `answer`, else 0.0; None if that has no number.

    The final number is the one after the last ####, else the one in the last \boxed{}, else (unless `strict`) the last
    number of the text (objective/numbers.py). It may stand inside the reasoning, <think>...</think>, unless
    `outside_thinking` is set. A list of gold answers accepts any of them.
    """
    texts = cut_all_thinking(completions, prompts) if outside_thinking else completions
    accepted = [read_gold(gold) for gold in answer]
    finals = [final_number(text, strict=strict) for text in texts]
    return _compare(finals, accepted)


@REWARDS.register("text_match", never_null=("answer",), gold={"answer": accepted_texts}, answer=final_text)
def text_match(
    completions: Sequence[str],
    prompts: Sequence[str] | None = None,
    *,
    answer: Sequence[Any],
    strict: bool = False,
    outside_thinking: bool = True,
) -> list[float | None]:
    r"""1.0 if the completion's answer is the text in the column `answer`, or one of several there; else 0.0.

    The answer is the line after the last ####, else the content of the last \boxed{}, else what follows "answer is" or
    "answer:", else (unless `strict`) the last line. Case, spaces and punctuation at either end make no difference. None
    if the column is empty.
    """
    texts = cut_all_thinking(completions, prompts) if outside_thinking else completions
    accepted = [accepted_texts(gold) for gold in answer]
    finals = [final_text(text, strict=strict) for text in texts]
    return _compare(finals, accepted)


@REWARDS.register(
    "choice_match",
    never_null=("answer",),
    gold={"answer": accepted_choices},
    argument_limits={"letters": check_letters},
    answer=final_choice,
)
def choice_match(
    completions: Sequence[str],
    prompts: Sequence[str] | None = None,
    *,
    answer: Sequence[Any],
    letters: str = CHOICE_LETTERS,
    strict: bool = False,
    outside_thinking: bool = True,
) -> list[float | None]:
    r"""1.0 if the completion chooses the letter in the column `answer`, such as B, (B) or "B) Paris"; else 0.0.

    The choice is the letter after the last ####, else in the last \boxed{}, else after "the answer is", else (unless
    `strict`) the last letter in brackets, in bold or alone on a line. None if the column has none of `letters`.
    """
    texts = cut_all_thinking(completions, prompts) if outside_thinking else completions
    accepted = [accepted_choices(gold, letters) for gold in answer]
    finals = [final_choice(text, letters, strict=strict) for text in texts]
    return _compare(finals, accepted)


@REWARDS.register("countdown", never_null=("nums", "target"), gold={"nums": read_numbers, "target": read_number})
def countdown(
    completions: Sequence[str],
    prompts: Sequence[str] | None = None,
    *,
    nums: Sequence[Any],
    target: Sequence[Any],
    use_all: bool = True,
    other_value: float = 0.0,
    strict: bool = False,
    outside_thinking: bool = True,
) -> list[float | None]:
    """1.0 if the completion's equation makes the column `target` from the numbers of the column `nums`, else 0.0.

    Each number must be used once, or at most once if `use_all` is off. An equation of these numbers with another value
    gets `other_value`. None if a column has no numbers (objective/countdown.py has the grammar).
    """
    texts = cut_all_thinking(completions, prompts) if outside_thinking else completions
    rewards: list[float | None] = []
    for text, gold_numbers, gold in zip(texts, nums, target, strict=True):
        available, aim = read_numbers(gold_numbers), read_number(gold)
        if available is None or aim is None:
            rewards.append(None)
            continue
        solved = solve(find_equation(text, strict=strict))
        value, used = solved or (None, [])
        missing, others = Counter(available) - Counter(used), Counter(used) - Counter(available)
        is_allowed = solved is not None and not others and not (use_all and missing)
        rewards.append((1.0 if value == aim else other_value) if is_allowed else 0.0)
    return rewards


@REWARDS.register("reward_model", required=("path",))
def reward_model(completions: Sequence[str], *, prompts: Sequence[str], path: str = "") -> list[float | None]:
    """The logit of a sequence classification model with one label at `path`, for the prompt and the completion.

    A run computes it in the training process (model/reward_model.py), so it cannot be called as a function.
    """
    raise ValueError("reward_model computes in a run; load_reward_model in grpo_core.model.reward_model loads it")


@REWARDS.register("length_by_pass_rate", names_reward="of")
def length_by_pass_rate(
    groups: Sequence[Sequence[str]],
    *,
    other_rewards: Mapping[str, Sequence[Sequence[float | None]]],
    of: str = "correct_answer",
    scale: float = 1000.0,
) -> list[list[float | None]]:
    """-length / scale * max(pass rate, 1 / G): a penalty for length that grows with the pass rate of the prompt.

    The pass rate is the share of 1.0 among the values of the reward `of` in the group; None where it has no value. The
    length is in characters. After arXiv:2506.05256.
    """
    rewards: list[list[float | None]] = []
    for texts, values in zip(groups, other_rewards[of], strict=True):
        judged = [value for value in values if value is not None]
        if not judged:
            rewards.append([None] * len(texts))
            continue
        pass_rate = sum(value == 1.0 for value in judged) / len(judged)
        rewards.append([-len(text) / scale * max(pass_rate, 1 / len(texts)) for text in texts])
    return rewards


def takes_groups(function: Callable) -> bool:
    """Return whether `function` takes whole groups, which the name of its first parameter says."""
    return next(iter(inspect.signature(function).parameters), "") == "groups"


def reads_other_rewards(function: Callable) -> bool:
    """Return whether `function` is called after the other rewards, with their values."""
    return OTHER_REWARDS in inspect.signature(function).parameters


def cut_all_thinking(completions: Sequence[str], prompts: Sequence[str] | None) -> list[str]:
    """Return the completions without their reasoning, which a prompt that ends with <think> has opened."""
    if prompts is None:
        return [cut_thinking(text) for text in completions]
    return [cut_thinking(text, prompt) for text, prompt in zip(completions, prompts, strict=True)]


def _compare(finals: Sequence[Any], accepted: Sequence[Any]) -> list[float | None]:
    """Return 1.0 for each final answer that is among those accepted for it, else 0.0; None where none can be judged."""
    pairs = zip(finals, accepted, strict=True)
    return [None if right is None else float(final in right) for final, right in pairs]


def _with_opened_block(completions: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """Return the completions, with <think> in front where the prompt ends with it."""
    pairs = zip(completions, prompts, strict=True)
    return [OPEN + text if prompt.rstrip().endswith(OPEN) else text for text, prompt in pairs]
