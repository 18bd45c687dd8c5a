"""A reward of your own: a function that returns one number per completion.

Try it on a few completions, then train with it beside a built-in reward:

    python examples/my_reward.py
    bash launch.sh 2 name=mine rewards='[correct_answer, {name: examples/my_reward.py:close_answer, weight: 0.2}]'

docs/rewards.md describes what a reward receives, what it may return, and what happens when it fails.
"""

from grpo_core.objective.rewards import final_number


def close_answer(
    completions: list[str],  # B
    answer: list[str],  # B; the column `answer` of the data, because the parameter has its name
    *,
    tolerance: float = 0.1,  # keyword-only arguments are set by `args: {tolerance: 0.2}` beside `weight`
) -> list[float | None]:
    """Return 1.0 where the last number of a completion is within `tolerance`, a share, of the right one, else 0.0.

    None marks a completion that cannot be judged, here because the right answer has no number. This reward is then left
    out of the completion's sum.
    """
    rewards: list[float | None] = []
    for text, right_answer in zip(completions, answer, strict=True):
        number, right_number = final_number(text), final_number(right_answer)
        if right_number is None:
            rewards.append(None)
        elif number is None:
            rewards.append(0.0)
        else:
            rewards.append(float(abs(number - right_number) <= tolerance * abs(right_number)))
    return rewards


if __name__ == "__main__":
    completions = ["She has #### 40", "She has #### 43", "She has #### 50", "I do not know."]
    for text, reward in zip(completions, close_answer(completions, ["#### 40"] * 4), strict=True):
        print(f"{reward}  {text}")
