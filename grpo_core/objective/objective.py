"""The record `Objective`: the functions of a run's objective with their arguments bound, and the rows that they need.

It is built from the configuration in one place (training/prepare.py) and handed to everything that computes a part of
the objective: training/rollouts.py (shaped rewards, advantages), training/freeze.py (old and reference log-probs),
training/update.py (the loss) and the command `replay`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from grpo_core.objective.inputs import ADVANTAGE_INPUTS, CORRECTION_INPUTS, LOSS_INPUTS
from grpo_core.objective.laws import zero_advantage
from grpo_core.objective.rejections import keep_all
from grpo_core.objective.token_weights import AVERAGES
from grpo_core.registry import get_fact
from grpo_core.schema import unwrap


@dataclass(frozen=True)
class Objective:
    """The functions and switches of an objective.

    A term that learns from tied groups (all rewards of a group equal, so every advantage is 0) sets `learns_from_ties`;
    the update leaves rows with advantage 0 out of its forward otherwise. A registered function, or one of a user's
    file, declares it by an attribute: `my_loss.learns_from_ties = True`. For a term that is added to update.token_loss,
    build_objective in training/prepare.py passes `learns_from_ties=True`.
    """

    loss_fn: Callable  # objective/losses.py
    kl_fn: Callable  # objective/kl.py
    correction_fn: Callable  # objective/corrections.py
    advantage_fn: Callable[..., Tensor]  # objective/advantages.py
    truncation_fn: Callable  # objective/truncation.py
    rejection_fn: Callable = keep_all  # objective/rejections.py
    average: str = "sequence"  # a name of objective/token_weights.py
    has_kl: bool = False  # kl_coef starts above 0
    kl_in: Literal["loss", "reward"] = "loss"
    entropy_adapts: bool = False  # entropy_coef may rise above 0 during the run
    top_entropy: float = 1.0  # share of the tokens that the surrogate trains, those of the highest entropy
    off_policy_mask: float | None = None  # bound of corrections.off_policy_mask
    rejection_in: Literal["loss", "surrogate"] = "loss"  # what the tokens that are rejected leave
    normalize_correction: bool = False  # the weights of the rollout correction are divided by their mean
    log_ratio_coef: float = 0.0  # weight of (l - l_roll)**2
    positive_nll_coef: float = 0.0  # weight of the mean -l over completions with a reward above the next number
    positive_nll_above: float = 0.0
    echo_coef: float = 0.0  # weight of the mean -l over the tokens that environments gave
    router_aux_coef: float = 0.0  # weight of the load-balancing loss of a model's routers, a mean over completions
    min_group_std: float = 0.0  # a group whose rewards spread less counts as tied
    max_new_tokens: int = 256  # length limit of a completion
    steps_per_batch: int = 1  # optimizer steps on one batch: minibatches × passes
    has_teacher: bool = False  # the step asks a frozen model for its log-probs (training/distillation.py)
    teacher_coef: float = 0.0  # of l_teacher - l_old in the advantage of each token
    teacher_kl_fn: Callable | None = None  # of kl.py, over the vocabulary; None: no such term
    teacher_kl_coef: float = 0.0
    learns_from_ties: bool = False  # a function, or a term of yours, learns from rows with advantage 0

    @cached_property
    def loss_needs(self) -> frozenset[str]:
        """The inputs that the loss or the correction asks for by name."""
        asked = LOSS_INPUTS.requested(self.loss_fn) + CORRECTION_INPUTS.requested(self.correction_fn)
        return frozenset(asked)

    @cached_property
    def advantage_needs(self) -> frozenset[str]:
        """The inputs that the advantage function asks for by name."""
        return frozenset(ADVANTAGE_INPUTS.requested(self.advantage_fn))

    @property
    def rejects(self) -> bool:
        """Return whether tokens may be left out because sampler and trainer differ."""
        return unwrap(self.rejection_fn) is not keep_all

    @property
    def selects(self) -> bool:
        """Return whether the loss chooses tokens among all of the optimizer step."""
        return get_fact(self.loss_fn, "selects") is not None

    @property
    def needs_cross_row_masks(self) -> bool:
        """Return whether a mask or weight depends on other rows of the optimizer step, which costs a forward."""
        return self.rejects or self.selects or self.normalize_correction

    @property
    def needs_reference(self) -> bool:
        """Return whether something reads the reference's log-probs of the drawn tokens."""
        has_kl = self.has_kl and self.kl_in == "loss" and not self.kl_needs_vocabulary
        return has_kl or "ref_logprobs" in self.loss_needs | self.advantage_needs

    @property
    def needs_teacher(self) -> bool:
        """Return whether something reads the teacher's log-probs of the drawn tokens: all but its KL alone."""
        asked = "teacher_logprobs" in self.loss_needs | self.advantage_needs
        return self.has_teacher and (asked or self.teacher_coef > 0 or self.teacher_kl_fn is None)

    @property
    def kl_needs_vocabulary(self) -> bool:
        """Return whether the KL is a sum over the vocabulary, which costs a reference forward in every micro-batch."""
        return bool(get_fact(self.kl_fn, "full_vocabulary"))

    def needs_tied_rows(self, kl_coef: float, entropy_coef: float) -> bool:
        """Return whether rows with advantage 0 have a part in the gradient of a step with these coefficients."""
        kl_in_loss = kl_coef != 0 and self.kl_in == "loss"
        coefficients = (entropy_coef, self.log_ratio_coef, self.positive_nll_coef, self.router_aux_coef)
        has_term = kl_in_loss or any(coefficient != 0 for coefficient in coefficients)
        return self.learns_from_ties or has_term or self.entropy_adapts


def functions_learn_from_ties(average: str, loss_fn: Callable, *others: Callable) -> bool:
    """Return whether a function declares that it learns from tied groups, or a trial shows that it does.

    A loss does if its gradient at advantage 0 is not 0. An average does if leaving out a row changes the weights of the
    other rows (it breaks the law `splits`).
    """
    if any(get_fact(function, "learns_from_ties", False) for function in (loss_fn, *others)):
        return True
    with torch.device("cpu"):
        is_zero, _ = zero_advantage(loss_fn)
    return not is_zero or bool(get_fact(AVERAGES.get(average), "breaks"))
