"""Checks of the section `teacher` that need no model, and of the other sections' settings that depend on a teacher."""

from __future__ import annotations

from grpo_core.config.sections import RunConfig
from grpo_core.objective.advantages import ADVANTAGES
from grpo_core.objective.inputs import ADVANTAGE_INPUTS, LOSS_INPUTS
from grpo_core.objective.losses import LOSSES
from grpo_core.registry import get_fact
from grpo_core.schema import ConfigError

TEACHER_INPUT = "teacher_logprobs"
HOW_TO_SET = "set teacher.path, teacher.adapter or teacher.prompt"


def asks_for_teacher(config: RunConfig) -> bool:
    """Return whether the loss or the advantage asks for the teacher's log-probs."""
    return bool(_list_askers(config))


def check_teacher(config: RunConfig) -> None:
    """Check that what needs a teacher has one, and that the run is possible without rewards where it has none.

    Raises:
        ConfigError: names the key.
    """
    teacher = config.teacher
    if not teacher.exists:
        if teacher.kl is not None:
            raise ConfigError(f"teacher.kl is {teacher.kl}, but there is no teacher; {HOW_TO_SET}")
        for asker in _list_askers(config):
            raise ConfigError(f"{asker} asks for {TEACHER_INPUT}, but there is no teacher; {HOW_TO_SET}")
    if teacher.adapter is not None and teacher.path is None and config.lora.r == 0:
        raise ConfigError(
            f"teacher.adapter is {teacher.adapter!r} with teacher.path null, but lora.r is 0, so the base that the "
            f"teacher would share is trained; set teacher.path to the teacher's base model"
        )
    if teacher.adapter is not None and teacher.path is None and config.lora.trainable_token_indices:
        raise ConfigError(
            f"teacher.adapter is {teacher.adapter!r} with teacher.path null, but lora.trainable_token_indices is set, "
            f"beside which PEFT loads no second adapter; set teacher.path to the teacher's base model"
        )
    if not any(reward.weight for reward in config.all_rewards):
        _check_without_rewards(config)


def _list_askers(config: RunConfig) -> list[str]:
    """Return the functions that ask for the teacher's log-probs, as text."""
    loss, advantage = config.loss.name, config.advantage.name
    askers = [f"loss {loss}"] if TEACHER_INPUT in LOSS_INPUTS.requested(LOSSES.get(loss)) else []
    if TEACHER_INPUT in ADVANTAGE_INPUTS.requested(ADVANTAGES.get(advantage)):
        askers.append(f"advantage {advantage}")
    return askers


def _check_without_rewards(config: RunConfig) -> None:
    """Refuse settings that act on rewards where no reward has a weight and the teacher alone trains."""
    setting = None
    if config.sampling.dynamic_attempts:
        setting = f"sampling.dynamic_attempts is {config.sampling.dynamic_attempts}"
    elif config.loss.kl_in == "reward" and config.loss.kl_coef:
        setting = "loss.kl_in is reward"
    elif get_fact(ADVANTAGES.get(config.advantage.name), "reads_components"):
        setting = f"advantage.name is {config.advantage.name}"
    if setting:
        raise ConfigError(
            f"{setting}, but no reward has a weight other than 0, because the teacher alone trains; "
            f"change it or add a reward"
        )
