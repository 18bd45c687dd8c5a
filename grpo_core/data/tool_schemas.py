"""The JSON schemas of tools, which the chat template describes in every prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema

from grpo_core.config.environment_functions import load_tools
from grpo_core.config.sections import RunConfig
from grpo_core.data.encoding import apply_chat_template, offer_tools
from grpo_core.schema import ConfigError, first_line, summarize_error, unwrap

Schema = dict[str, Any]


def make_schema(name: str, function: Callable[..., Any]) -> Schema:
    """Return the JSON schema of the tool `name`, from the type hints and the docstring of its function.

    Raises:
        ConfigError: it has no docstring, or an argument has no type hint or no description.
    """
    try:
        schema = get_json_schema(function if hasattr(function, "__name__") else unwrap(function))
    except Exception as error:  # a type hint may be anything
        raise ConfigError(
            f"tool {name} cannot be described to the model: {first_line(error)}; it needs a docstring with a section "
            f"Args that describes every argument, and a type hint for each"
        ) from None
    schema["function"]["name"] = name
    return schema


def offer_tools_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the chat template describe the tools of a run.

    Raises:
        ConfigError: a tool has no schema, or the chat template leaves the tools out.
    """
    if not config.tools:
        return
    schemas = [make_schema(name, function) for name, function in load_tools(config.tools).items()]
    if not tokenizer.chat_template:
        raise ConfigError(
            f"tools are {config.tools}, but the model's tokenizer has no chat template to describe them; set "
            f"data.chat_template to a Jinja file"
        )
    offer_tools(tokenizer, schemas)
    try:
        text = apply_chat_template(tokenizer, [{"role": "user", "content": "x"}], config.data)
    except Exception as error:  # the template is a program of the model's author, which may raise anything
        raise ConfigError(f"the model's chat template cannot describe tools: {summarize_error(error)}") from None
    for schema in schemas:
        if schema["function"]["name"] not in text:
            raise ConfigError(
                f"the model's chat template leaves the tool {schema['function']['name']} out of the prompts; set "
                f"data.chat_template to a Jinja file that describes tools"
            )
