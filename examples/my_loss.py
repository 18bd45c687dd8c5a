"""A loss of your own: a function of tensors that returns a loss for every token, without averaging.

Check it in seconds on a CPU, then train with it:

    python -m grpo_core check-loss examples/my_loss.py:soft power=0.7
    bash launch.sh 2 name=mine loss.name=examples/my_loss.py:soft trainer.num_minibatches=4 engine.learning_rate=5e-4

Four minibatches are four optimizer steps on the completions of one sampling phase. With a single optimizer step the
ratio is always 1, and then every sound loss has the same gradient. docs/loss.md develops this loss from an idea.
"""

from torch import Tensor

from grpo_core import PolicyLoss, token_ratio


def soft(
    logprobs: Tensor,  # [B, C] of the policy, with gradient
    old_logprobs: Tensor,  # [B, C] of the policy before this step's first update
    advantages: Tensor,  # [B, 1]
    completion_mask: Tensor,  # [B, C] bool, false in the padding
    *,
    power: float = 0.5,  # keyword-only arguments are set by loss.args='{power: 0.7}'
) -> PolicyLoss:
    """-(r**power / power) A

    The gradient of a token is weighted by r**power in place of r. With a power below 1, a token that has already become
    more probable is pushed less. The division by `power` makes the gradient that of REINFORCE where r = 1; without it,
    `power` would also scale the learning rate, and check-loss would report that the law on_policy fails.
    """
    ratio = token_ratio(logprobs, old_logprobs)  # [B, C] exp(logprobs - old_logprobs), kept finite
    per_token_loss = -(ratio**power / power) * advantages  # [B, C]
    return PolicyLoss(per_token_loss, {"ratio": ratio.detach()})  # metrics.jsonl gets the mean of the ratio
