"""The `sample` command: answer one question, or read questions from an interactive prompt."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from grpo_core.batch import SamplingParams, Task
from grpo_core.commands.evaluate import choose_source, load_problems
from grpo_core.commands.open_policy import OpenedPolicy, open_source
from grpo_core.counts import quantify
from grpo_core.data.encoding import encode_prompts
from grpo_core.data.prompts import list_template_fields, render_prompt
from grpo_core.data.rows import name_split
from grpo_core.environments.driver import PlayedCompletion
from grpo_core.monitor.progress import show_elapsed
from grpo_core.objective.rewards import REWARDS
from grpo_core.random_keys import make_key
from grpo_core.sampling.texts import decode_completions, find_hidden_ids
from grpo_core.schema import ConfigError, printable
from grpo_core.scoring.reward_call import find_missing_columns, list_needed_columns
from grpo_core.scoring.scoring import Reward, score
from grpo_core.training.prepare import make_rewards

MIN_COLUMN_WIDTH = 28  # characters
SEPARATOR = " | "  # between columns
HELP = """\
/adapter on|off   answer with the trained policy (on) or with its base model (off)
/n 4              number of answers; several are shown in columns, one is printed as it is sampled
/temperature 0.7  sampling temperature; 0 is greedy
/answer 18        correct answer, for rewards that need the column answer; /answer alone removes it
/quit             leave, as Ctrl-D does; Ctrl-C stops an answer"""


@dataclass(frozen=True)
class AnswerSettings:
    """The settings for the answers to the next question."""

    samples: int = 1
    temperature: float | None = None  # None: greedy for one answer, 1 for several
    answer: str | None = None
    base: bool = False
    raw: bool = False
    seed: int = 0

    @property
    def sampling(self) -> SamplingParams:
        """The settings of the sampler.

        Raises:
            ValueError: the temperature is negative or not a number.
        """
        temperature = float(self.samples > 1) if self.temperature is None else self.temperature
        return SamplingParams(temperature) if temperature else SamplingParams(greedy=True)


def run_sample(
    source: str,
    question: str | None,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    max_new_tokens: int | None = None,
    row: int | None = None,
    **fields: object,  # of AnswerSettings
) -> int:
    """Answer `question`, or questions from an interactive prompt if it is None. Returns 0.

    With `row` the question is that row of the evaluation data, counted from 1, and the task has all its columns.
    Of several sources the template and the rewards are those of the first.
    `overrides` are as in `open_source`: model.path names a base model that has moved.

    Raises:
        ConfigError: the source cannot be opened, has no adapter to switch off, has no such row, or has a template with
            other columns.
    """
    if row is not None:
        _check_row_alone(row, question, fields)
    overrides = [*overrides, *([f"sampling.max_new_tokens={max_new_tokens}"] if max_new_tokens else [])]
    opened = open_source(source, overrides, config=config, notify=partial(print, file=sys.stderr))
    whole = opened.config
    rewards = make_rewards(whole.of_source(whole.source_names[0]))  # the question has the template of this source
    settings = AnswerSettings(**fields)  # type: ignore[arg-type]
    check_base(opened, settings)
    if question is not None and not question.strip():
        raise ConfigError("the question is empty; leave it out to read questions from a prompt")
    try:
        if row is not None:
            task = load_row(opened, row, settings)
            print(printable(task.prompt))
            answer_task(opened, rewards, task, settings)
        elif question is None:
            run_prompt(opened, rewards, settings)
        else:
            answer_question(opened, rewards, question, settings)
    finally:
        opened.close()
    return 0


def _check_row_alone(row: int, question: str | None, fields: Mapping[str, object]) -> None:
    """Refuse, beside --row, what the row has itself: the question, the answer, and the whole prompt."""
    given = {"QUESTION": question, "--answer": fields.get("answer"), "--raw": fields.get("raw") or None}
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"--row is {row} and {name} is given too; the row has the whole question, so leave it out"
            )


def load_row(opened: OpenedPolicy, row: int, settings: AnswerSettings) -> Task:
    """Return a row of the data that `evaluate` would answer, counted from 1, as a task with all columns.

    Raises:
        ConfigError: there is no such row.
    """
    chosen, eval_set = choose_source(opened, None)
    tasks, description = load_problems(chosen, None, None, None, eval_set)
    if row > len(tasks):
        raise ConfigError(
            f"--row is {row}; the evaluation data, {name_split(description['path'], description['split'])}, has "
            f"{quantify(len(tasks), 'row')}"
        )
    return replace(tasks[row - 1], seed=make_key("sample", settings.seed))


def run_prompt(opened: OpenedPolicy, rewards: Sequence[Reward], settings: AnswerSettings) -> None:
    """Read questions and /commands from the terminal until /quit or Ctrl-D."""
    print(f"{opened.weights}. Enter a question, or /help.")
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401  gives input() a history and line editing
    while True:
        try:
            line = input("\n> ").strip()
            if line in ("/quit", "quit", "exit"):
                return
            if line.startswith("/"):
                settings = apply_command(settings, line)
                check_base(opened, settings)
            elif line:
                answer_question(opened, rewards, line, settings)
                settings = replace(settings, seed=settings.seed + 1)  # the same question again gets other samples
        except ConfigError as error:
            print(error)
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D leaves")
        except EOFError:
            print()
            return


def check_base(opened: OpenedPolicy, settings: AnswerSettings) -> None:
    """Raise ConfigError if the base model is asked for and there is no adapter to switch off."""
    if settings.base and not opened.has_adapter:
        raise ConfigError(f"{opened.weights} has no adapter to switch off")


def apply_command(settings: AnswerSettings, line: str) -> AnswerSettings:
    """Return the settings after a /command, and print them.

    Raises:
        ConfigError: there is no such command, or its value is not allowed.
    """
    word, _, value = line.partition(" ")
    value = value.strip()
    if word == "/help":
        print(HELP)
        return settings
    if word == "/adapter" and value in ("on", "off"):
        settings = replace(settings, base=value == "off")
    elif word == "/n":
        if not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"/n is {value!r}; it must be a whole number from 1 up")
        settings = replace(settings, samples=int(value))
    elif word == "/temperature":
        settings = replace(settings, temperature=_parse_temperature(value))
    elif word == "/answer":
        settings = replace(settings, answer=value or None)
    else:
        raise ConfigError(f"unknown command {line}; /help lists the commands")
    sampling = settings.sampling
    temperature = "greedy" if sampling.greedy else f"temperature {sampling.temperature:g}"
    adapter = "off" if settings.base else "on"
    print(f"adapter {adapter}, n {settings.samples}, {temperature}, answer {settings.answer or 'not set'}")
    return settings


def _parse_temperature(value: str) -> float:
    try:
        temperature = float(value)
        AnswerSettings(temperature=temperature).sampling  # noqa: B018  raises ValueError if it is not allowed
    except ValueError:
        raise ConfigError(f"/temperature is {value!r}; it must be 0 or a number above it") from None
    return temperature


def answer_question(opened: OpenedPolicy, rewards: Sequence[Reward], question: str, settings: AnswerSettings) -> None:
    """Print the answers to a question; see `answer_task`."""
    answer_task(opened, rewards, make_task(opened, question, settings), settings)


def answer_task(opened: OpenedPolicy, rewards: Sequence[Reward], task: Task, settings: AnswerSettings) -> None:
    """Print the answers with their lengths and rewards: one answer while it is sampled, several in columns."""
    turns: list[PlayedCompletion] = []
    with opened.policy.reference() if settings.base else nullcontext():
        if opened.environments is not None:
            with show_elapsed("sampling"):
                rollouts, turns = opened.environments.generate([task], settings.samples, settings=settings.sampling)
            if settings.samples == 1:
                print(printable(format_turns(turns[0])))
        elif settings.samples == 1:
            printer = TokenPrinter(opened.tokenizer, opened.sampler.eos_ids)
            rollouts = opened.sampler.generate([task], 1, settings=settings.sampling, watch=printer)
            print(printer.rest())
        else:
            with show_elapsed("sampling"):
                rollouts = opened.sampler.generate([task], settings.samples, settings=settings.sampling)
    reward_notes = describe_rewards(rewards, task, rollouts.completions, settings.samples)
    notes = [
        [
            f"{quantify(length, 'token')}{', truncated' if truncated else ''}",
            *(describe_turns(turns[i], task) if turns else []),
            *reward_notes[i],
        ]
        for i, (length, truncated) in enumerate(
            zip(rollouts.lengths().tolist(), rollouts.truncated.tolist(), strict=True)
        )
    ]
    if settings.samples == 1:
        print(f"[{'; '.join(notes[0])}]")
    else:
        texts = [format_turns(played) for played in turns] or rollouts.completions
        print(format_columns(texts, notes, shutil.get_terminal_size((110, 24)).columns))


def format_turns(played: PlayedCompletion) -> str:
    """Return the turns of a completion and the answers to them, each below a line with its name in brackets."""
    parts = []
    for number, turn in enumerate(played.turns, 1):
        reward = "" if turn.reward is None else f", reward {turn.reward:.4g}"
        parts += [f"[turn {number}{reward}]", turn.text.strip("\n")]
        if turn.answer is not None:
            calls = f" to {quantify(turn.calls, 'tool call')}" if turn.calls else ""
            errors = f", {quantify(turn.errors, 'error')}" if turn.errors else ""
            parts += [f"[answer{calls}{errors}]", turn.answer.strip("\n")]
    return "\n".join(parts)


def describe_turns(played: PlayedCompletion, task: Task) -> list[str]:
    """Return the number of turns and calls of a completion, its environment's reward, and why it ended or failed."""
    notes = [quantify(len(played.turns), "turn")]
    notes += [quantify(played.calls, "tool call")] if played.calls else []
    rewards = [turn.reward for turn in played.turns if turn.reward is not None]
    notes += [f"environment {sum(rewards):.4g}"] if rewards else []
    notes += ["ended by an answer that does not fit (sampling.max_new_tokens)"] if played.lacks_room else []
    if played.failure is None:
        return notes
    hint = ""
    if played.failure.startswith("raised KeyError"):
        names = ", ".join(dict.fromkeys([*task.columns, "prompt"]))
        hint = (
            f"; its row has the columns {names} (--answer adds answer, --row takes a row of the data with all columns)"
        )
    return [*notes, f"the environment {played.failure}{hint}"]


def make_task(opened: OpenedPolicy, question: str, settings: AnswerSettings) -> Task:
    """Return the question as a task, in the run's prompt template or, with `raw`, as it is.

    Of several sources it is the template of the first. A template with one column other than `question` gets the
    question in that column.

    Raises:
        ConfigError: the template has other columns beside the question.
    """
    whole = opened.config
    config, columns = whole.of_source(whole.source_names[0]).data, {"question": question}
    if settings.answer is not None:
        columns["answer"] = settings.answer
    prompt = question
    if not settings.raw:
        fields = list_template_fields(config.template)
        missing = [name for name in dict.fromkeys(fields) if name not in columns]
        max_missing = 0 if "question" in fields else 1
        if len(missing) > max_missing:
            raise ConfigError(
                f"data.template also needs the columns {', '.join(missing)}; use --raw to give the whole prompt"
            )
        columns |= dict.fromkeys(missing, question)
        prompt = render_prompt(columns, config, opened.tokenizer)
    special = settings.raw or config.prompt != "chat"
    (ids,) = encode_prompts(opened.tokenizer, [prompt], add_special_tokens=special)
    return Task(0, prompt, ids, columns, seed=make_key("sample", settings.seed))


def describe_rewards(rewards: Sequence[Reward], task: Task, completions: Sequence[str], count: int) -> list[list[str]]:
    """Return for each completion a list with a description of every reward, "NAME VALUE" or "NAME not computed"."""
    computable = [r for r in rewards if not find_missing_columns(REWARDS.get(r.configured or r.name), task.columns)]
    notes: list[list[str]] = [[] for _ in completions]
    if computable:
        scores = score(computable, [task], completions, count)
        for reward in computable:
            for note, value in zip(notes, scores.by_name[reward.name].flatten().tolist(), strict=True):
                is_nan = value != value
                why = next((why for why in scores.failures if why.startswith(f"reward {reward.name} ")), None)
                note.append(f"{reward.name} {'none' if is_nan else f'{value:.4g}'}" if why is None else why)
    for reward in rewards:
        if reward not in computable:
            needed = list_needed_columns(REWARDS.get(reward.configured or reward.name))
            columns = [name for name in needed if name != "prompts"]
            word = "column" if len(columns) == 1 else "columns"
            for note in notes:
                note.append(f"{reward.name} not computed: it needs the {word} {', '.join(columns)}")
    return notes


class TokenPrinter:
    """Prints the text of one completion while its tokens are sampled, without splitting a character."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], write: Callable[[str], object] | None = None
    ) -> None:
        self.tokenizer, self.eos_ids = tokenizer, eos_ids
        self.hidden_ids = find_hidden_ids(tokenizer, eos_ids)
        self.ids: list[int] = []
        self.printed = 0  # characters
        self.write = write or (lambda text: print(text, end="", flush=True))

    def __call__(self, rows: list[int], tokens: list[int]) -> None:
        if tokens[0] in self.eos_ids:
            return
        self.ids.append(tokens[0])
        (text,) = decode_completions(self.tokenizer, [self.ids], self.hidden_ids)
        if not text.endswith("�"):  # the rest of the character comes with the next tokens
            self.write(printable(text[self.printed :]))
            self.printed = len(text)

    def rest(self) -> str:
        """Return the text that has not been printed, such as an incomplete character at the end."""
        (text,) = decode_completions(self.tokenizer, [self.ids], self.hidden_ids)
        return printable(text[self.printed :])


def format_columns(texts: Sequence[str], notes: Sequence[Sequence[str]], width: int) -> str:
    """Return the texts in columns below their notes, as many columns as fit into `width` characters."""
    gap = len(SEPARATOR)
    count = max(1, min(len(texts), (width + gap) // (MIN_COLUMN_WIDTH + gap)))
    column_width = (width + gap) // count - gap
    blocks = []
    for first in range(0, len(texts), count):
        columns = []
        for i in range(first, min(first + count, len(texts))):
            head = [f"({i + 1})", *notes[i], ""]
            body = printable(texts[i]).expandtabs().split("\n")
            columns.append([part for line in (*head, *body) for part in textwrap.wrap(line, column_width) or [""]])
        height = max(map(len, columns))
        rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
        blocks.append("\n".join(SEPARATOR.join(f"{cell:<{column_width}}" for cell in row).rstrip() for row in rows))
    return f"\n{'-' * width}\n".join(blocks)
