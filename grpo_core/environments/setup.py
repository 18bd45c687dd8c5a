"""Make the environments of a run, and sample completions whose turns they answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from grpo_core.batch import Rollouts, Task
from grpo_core.config.environment_functions import BUILT_IN_TOOLS
from grpo_core.config.sections import DataConfig, RunConfig
from grpo_core.data.encoding import apply_chat_template
from grpo_core.environments.boundary import CALL_ID, Boundary
from grpo_core.environments.driver import EnvironmentTurns, PlayedCompletion, TurnLimits
from grpo_core.environments.recording import FOLDER, Recording
from grpo_core.environments.scores import add_environment
from grpo_core.environments.tool_calls import recognise_parser
from grpo_core.environments.user_code import digest_environment
from grpo_core.environments.worker import EnvironmentWorker
from grpo_core.sampling.sampler import Sampler
from grpo_core.sampling.texts import decode_completions, find_hidden_ids
from grpo_core.schema import ConfigError
from grpo_core.scoring.scoring import Scores

PROBE_TOOL = "probe_of_a_tool"


class Environments:
    """The environments of one rank: a process, and what turns its answers into tokens."""

    def __init__(
        self,
        config: RunConfig,
        sampler: Sampler,
        *,
        folder: Path | None = None,
        rank: int = 0,
        warn: Callable[[str], object] = lambda sentence: None,
    ) -> None:
        """Start the process; answers of a training step are recorded in `folder`, that of the run.

        Raises:
            ConfigError: the chat template cannot be split at the end of a turn, or its form of calls is unknown; or the
                process cannot load the environment.
        """
        settings, tokenizer = config.environment, sampler.tokenizer
        self.config, self.sampler, self.warn = config, sampler, warn
        role: Literal["user", "tool"] = "tool" if config.tools else "user"
        self.boundary = Boundary(tokenizer, config.data, sampler.eos_ids, role)
        name, args = settings.name or BUILT_IN_TOOLS, settings.args
        if config.tools:
            args = {"tools": config.tools, "parser": config.tool_parser or find_parser(tokenizer, config.data)}
        self.label = label_environment(config)
        hidden = find_hidden_ids(tokenizer, sampler.eos_ids)
        self.decode = partial(decode_completions, tokenizer, hidden=hidden)
        self.recording = Recording(None if folder is None else folder / FOLDER, rank, digest_environment(config))
        self.worker = EnvironmentWorker(name, args, settings.timeout)
        self._next_key = 0

    def generate(
        self, tasks: Sequence[Task], group_size: int, *, step: int | None = None, **options: Any
    ) -> tuple[Rollouts, list[PlayedCompletion]]:
        """Draw completions as `Sampler.generate` does, and return them with their turns, [B].

        With `step`, that of the run, the answers are kept in the run folder, or read from it.
        """
        turns = self._start(tasks, group_size, options.get("max_new_tokens"), step)
        try:
            rollouts = self.sampler.generate(tasks, group_size, turns=turns, **options)
        except BaseException:
            self.worker.forget()
            raise
        turns.finish()
        self.worker.finish(0.0)  # sends what closes the last completions' objects
        return rollouts, turns.played

    def add_to_scores(self, scores: Scores, played: Sequence[PlayedCompletion]) -> Scores:
        """Return the scores of completions with their turns and the environment's rewards (scores.py)."""
        settings = self.config.environment
        weight = settings.reward_weight if settings.name else None
        scores = add_environment(scores, played, label=self.label, weight=weight)
        return replace(scores, failures=(*scores.failures, *self.take_problems()))

    def list_problems(self, played: Sequence[PlayedCompletion]) -> list[str]:
        """Return a sentence about the failures of completions whose rewards are not asked for, and `take_problems`."""
        reasons = dict.fromkeys(x.failure for x in played if x.failure is not None)
        return [*(f"{self.label} {reason}" for reason in [*reasons][:1]), *self.take_problems()]

    def take_problems(self) -> list[str]:
        """Return a sentence for each way in which the environments failed outside of a completion's turns."""
        problems = [*dict.fromkeys(self.worker.close_failures)]
        self.worker.close_failures.clear()
        sentences = [f"{self.label} {problem} as a completion's object was closed" for problem in problems]
        return sentences + ([f"{self.label} {self.recording.problem}"] if self.recording.problem else [])

    def close(self) -> None:
        """End the process, after the objects of completions that have ended are closed."""
        self.worker.finish(self.config.environment.timeout)
        self.worker.close()

    def _start(
        self, tasks: Sequence[Task], group_size: int, max_new_tokens: int | None, step: int | None
    ) -> EnvironmentTurns:
        settings = self.config.environment
        limits = TurnLimits(
            settings.max_turns,
            max_new_tokens or self.sampler.max_new_tokens,
            settings.max_turn_tokens,
            settings.max_answer_tokens,
        )
        turns = EnvironmentTurns(
            self.worker,
            self.boundary,
            self.decode,
            tasks,
            group_size,
            limits,
            first_key=self._next_key,
            recording=None if step is None else self.recording,
            step=step or 0,
            warn=self.warn,
        )
        self._next_key += len(tasks) * group_size
        return turns


def label_environment(config: RunConfig) -> str:
    """Return the subject of sentences about a run's environment or tools."""
    return f"environment {config.environment.name}" if config.environment.name else "the process of the tools"


def make_environments(config: RunConfig, sampler: Sampler, **options: Any) -> Environments | None:
    """Return the environments of a run, or None where a completion is one turn; `options` are as for `Environments`."""
    return Environments(config, sampler, **options) if config.has_turns else None


def sample_turns(
    sampler: Sampler, environments: Environments | None, tasks: Sequence[Task], group_size: int, **options: Any
) -> tuple[Rollouts, list[PlayedCompletion]]:
    """Draw completions with or without environments; without them there are no turns."""
    if environments is not None:
        return environments.generate(tasks, group_size, **options)
    options.pop("step", None)
    return sampler.generate(tasks, group_size, **options), []


def find_parser(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> str:
    """Return the name of the parser for the calls that the chat template asks for.

    Raises:
        ConfigError: it is not known.
    """
    parser = recognise_parser(str(tokenizer.chat_template), _render_call(tokenizer, config), PROBE_TOOL)
    if parser is None:
        raise ConfigError(
            "the form in which the model's chat template writes calls of tools is not known; set tool_parser to a "
            "function that reads the calls in a turn, my_parser.py:parse"
        )
    return parser


def _render_call(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> str | None:
    """Return what the chat template writes for a turn with a call, or None if it refuses one."""
    function = {"name": PROBE_TOOL, "arguments": {"key": "value"}}
    call = {"type": "function", "id": CALL_ID, "function": function}
    question = [{"role": "user", "content": "x"}]
    try:
        prompt = apply_chat_template(tokenizer, question, config)
        turns = [*question, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return apply_chat_template(tokenizer, turns, config, add_generation_prompt=False).removeprefix(prompt)
    except Exception:  # the template is a program of the model's author, which may raise anything
        return None
