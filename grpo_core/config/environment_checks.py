"""Checks of the section `environment` and of tools that need no model."""

from __future__ import annotations

import inspect
from operator import attrgetter

from grpo_core.config.environment_functions import (
    BUILT_IN_TOOLS,
    CALCULATOR,
    TOOL_PARSERS,
    build_environment,
    load_tools,
)
from grpo_core.config.sections import ENVIRONMENT_REWARD, RunConfig
from grpo_core.schema import ConfigError


def check_environment(config: RunConfig) -> None:
    """Check that an environment or tools can be loaded, and that what they need is set.

    Raises:
        ConfigError: names the key.
    """
    environment = config.environment
    if environment.name is not None and config.tools:
        raise ConfigError(
            f"environment.name is {environment.name!r} and tools are {config.tools}; a completion has one of the two, "
            f"so leave one out, or call the tools in the environment"
        )
    if environment.name == BUILT_IN_TOOLS:
        raise ConfigError(f"environment.name is {BUILT_IN_TOOLS!r}; set tools to a list of functions instead")
    if environment.name is not None:
        _check_name(config)
        build_environment(environment.name, environment.args)
        for reward in config.all_rewards[:-1]:
            if reward.name == ENVIRONMENT_REWARD:
                raise ConfigError(
                    f"the reward {reward.name} has the name of the environment's own reward; register it with another"
                )
    elif environment.args:
        raise ConfigError(f"environment.args is {environment.args}, but environment.name is null; set the name")
    if config.tools:
        _check_tools(config)
    elif config.tool_parser is not None:
        raise ConfigError(f"tool_parser is {config.tool_parser!r}, but there are no tools; set tools")
    if not config.has_turns:
        _check_unused(config)


def _check_name(config: RunConfig) -> None:
    name, stops = config.environment.name or "", config.sampling.stop_strings
    is_file = name.rpartition(":")[0].endswith(".py") or name.endswith(".py")
    if name != CALCULATOR and not is_file:
        raise ConfigError(
            f"environment.name is {name!r}; it must be {CALCULATOR}, or a class in a file, my_env.py:MyEnvironment"
        )
    if name == CALCULATOR and not any(text.endswith("=") for text in stops):
        raise ConfigError(
            f"environment.name is {name}, which answers turns that end in an equals sign, but sampling.stop is "
            f"{config.sampling.stop!r}; set it to a text that ends in one, such as ' ='"
        )


def _check_tools(config: RunConfig) -> None:
    load_tools(config.tools)
    if config.data.prompt != "chat":
        raise ConfigError(
            f"tools are {config.tools}, but data.prompt is {config.data.prompt}; tools are described by the model's "
            f"chat template, so set data.prompt to chat"
        )
    if config.tool_parser is not None:
        parser = TOOL_PARSERS.get(config.tool_parser)
        try:
            inspect.signature(parser).bind("")
        except TypeError as error:
            raise ConfigError(
                f"tool_parser is {config.tool_parser!r}, which cannot be called with a turn's text: {error}"
            ) from None


def _check_unused(config: RunConfig) -> None:
    """Refuse what has no effect where a completion is one turn."""
    for key in ("environment.max_turn_tokens", "environment.max_answer_tokens", "loss.echo_coef"):
        if value := attrgetter(key)(config):
            raise ConfigError(
                f"{key} is {value}, but there is neither an environment nor a tool; set environment.name or tools"
            )
