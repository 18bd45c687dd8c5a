"""The `sample` command: put a question to a policy and watch it answer; without one, as many as you like."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from grpo_core.batch import SamplingParams, Task
from grpo_core.commands.open_policy import Opened, open_source
from grpo_core.data.prompts import render_prompt, template_fields
from grpo_core.monitor.progress import working
from grpo_core.objective.rewards import REWARDS
from grpo_core.schema import ConfigError, printable
from grpo_core.scoring.reward_call import missing_columns, needed_columns
from grpo_core.scoring.scoring import Reward, score
from grpo_core.training.prepare import make_rewards

NARROWEST = 28  # characters of a column
HELP = """\
/adapter on|off   the policy, or the base model that it was trained from
/n 4              so many answers side by side, with their rewards; 1: one, streamed
/temperature 0.7  of the answers; 0: greedy
/answer 18        the right answer, for rewards that read it; /answer alone forgets it
/quit             or Ctrl-D; Ctrl-C ends an answer"""


@dataclass(frozen=True)
class Asking:
    """How the next question is answered."""

    samples: int = 1
    temperature: float | None = None  # None: greedy for one answer, 1 for several
    answer: str | None = None
    base: bool = False
    raw: bool = False
    seed: int = 0

    @property
    def settings(self) -> SamplingParams:
        """As the sampler takes them."""
        chosen = self.temperature if self.temperature is not None else float(self.samples > 1)
        return SamplingParams(chosen) if chosen else SamplingParams(greedy=True)


def run_sample(
    source: str,
    question: str | None,
    config: Path | None = None,
    *,
    max_new_tokens: int | None = None,
    **asking: object,  # the fields of Asking
) -> int:
    """Answer `question`, or open a prompt.

    Raises:
        ConfigError: what cannot be opened, or a question that the run's template has no place for.
    """
    longest = [f"sampling.max_new_tokens={max_new_tokens}"] if max_new_tokens else []
    opened = open_source(source, longest, config=config, say=partial(print, file=sys.stderr))
    how, rewards = Asking(**asking), make_rewards(opened.config)  # type: ignore[arg-type]
    check_base(opened, how)
    if question is not None:
        if not question.strip():
            raise ConfigError("the question is empty; without one, a prompt opens")
        ask(opened, rewards, question, how)
        return 0
    print(f"{opened.weights}. A question, or /help.")
    with suppress(ImportError):  # not everywhere
        import readline  # noqa: F401  gives input() its history and its editing
    while True:
        try:
            if (line := input("\n> ").strip()) in ("/quit", "quit", "exit"):
                return 0
            if line.startswith("/"):
                how = changed(how, line)
                check_base(opened, how)
            elif line:
                ask(opened, rewards, line, how)
                how = replace(how, seed=how.seed + 1)  # the same question again is another draw
        except ConfigError as error:
            print(error)
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D leaves")
        except EOFError:
            print()
            return 0


def check_base(opened: Opened, how: Asking) -> None:
    """Raise ConfigError where there is no adapter to switch off."""
    if how.base and not opened.has_adapter:
        raise ConfigError(f"{opened.weights} has no adapter to switch off")


def changed(how: Asking, line: str) -> Asking:
    """`how` after a /command, which says what it has done.

    Raises:
        ConfigError: no such command, or not with this value.
    """
    word, _, value = line.partition(" ")
    value = value.strip()
    try:
        if word == "/help":
            print(HELP)
            return how
        if word == "/adapter" and value in ("on", "off"):
            how = replace(how, base=value == "off")
        elif word == "/n":
            if int(value) < 1:
                raise ValueError
            how = replace(how, samples=int(value))
        elif word == "/temperature":
            how = replace(how, temperature=float(value))
            how.settings  # noqa: B018  raises where it means nothing
        elif word == "/answer":
            how = replace(how, answer=value or None)
        else:
            raise ConfigError(f"{line} is nothing known here; /help lists what is")
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        wanted = "a whole number from 1 up" if word == "/n" else "0 or a number above it"
        raise ConfigError(f"{word} {value}: it must be {wanted}") from error
    shown = "greedy" if how.settings.greedy else f"temperature {how.settings.temperature:g}"
    print(f"adapter {'off' if how.base else 'on'}, n {how.samples}, {shown}, answer {how.answer or 'not given'}")
    return how


def ask(opened: Opened, rewards: Sequence[Reward], question: str, how: Asking) -> None:
    """Print the answers: one as it is drawn, several beside each other; and what the rewards say of them."""
    task = task_of(opened, question, how)
    with opened.policy.reference() if how.base else nullcontext():
        if how.samples == 1:
            watch = Stream(opened.tokenizer, opened.sampler.eos_ids)
            rollouts = opened.sampler.generate([task], 1, settings=how.settings, watch=watch)
            print(watch.rest())
        else:
            with working("sampling"):
                rollouts = opened.sampler.generate([task], how.samples, settings=how.settings)
    told = told_rewards(rewards, task, rollouts.completions, how.samples)
    notes = [
        [f"{length} tokens{', cut off' if cut else ''}", *told[i]]
        for i, (length, cut) in enumerate(zip(rollouts.lengths().tolist(), rollouts.truncated.tolist(), strict=True))
    ]
    if how.samples == 1:
        print(f"[{'; '.join(notes[0])}]")
    else:
        print(side_by_side(rollouts.completions, notes, shutil.get_terminal_size((110, 24)).columns))


def task_of(opened: Opened, question: str, how: Asking) -> Task:
    """The question in the run's template, as training's prompts are; or as it is.

    Raises:
        ConfigError: the template wants more than a question.
    """
    config, columns = opened.config.data, {"question": question}
    if how.answer is not None:
        columns["answer"] = how.answer
    prompt = question
    if not how.raw:
        fields = [name for name in dict.fromkeys(template_fields(config.template)) if name not in columns]
        if len(fields) > int("question" not in template_fields(config.template)):
            raise ConfigError(f"data.template also wants {', '.join(fields)}; --raw takes the question as the prompt")
        columns |= dict.fromkeys(fields, question)
        prompt = render_prompt(columns, config, opened.tokenizer)
    special = how.raw or config.prompt != "chat"
    ids = opened.tokenizer([prompt], add_special_tokens=special)["input_ids"][0]
    return Task(0, prompt, ids, columns, seed=(how.seed, 0, 0))


def told_rewards(rewards: Sequence[Reward], task: Task, completions: Sequence[str], count: int) -> list[list[str]]:
    """What each reward says of each completion, in words; "not told" where it reads what is not there."""
    able = [r for r in rewards if not missing_columns(REWARDS.get(r.name), task.columns)]
    words: list[list[str]] = [[] for _ in completions]
    if able:
        scores = score(able, [task], completions, count)
        for reward in able:
            for i, value in enumerate(scores.by_name[reward.name].flatten().tolist()):
                words[i].append(f"{reward.name} {'none' if value != value else f'{value:.4g}'}")
    for reward in rewards:
        if reward not in able:
            needs = ", ".join(name for name in needed_columns(REWARDS.get(reward.name)) if name != "prompts")
            for word in words:
                word.append(f"{reward.name} not told: it reads {needs}")
    return words


class Stream:
    """Prints a completion's text as its tokens come; whole characters only."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], write: Callable[[str], object] | None = None
    ) -> None:
        self.tokenizer, self.eos_ids, self.ids, self.shown = tokenizer, eos_ids, [], 0
        self.write = write or (lambda text: print(text, end="", flush=True))

    def __call__(self, rows: list[int], tokens: list[int]) -> None:
        if tokens[0] in self.eos_ids:
            return
        self.ids.append(tokens[0])
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("�"):  # a character of which a part is still to come
            self._show(text)

    def rest(self) -> str:
        """What has not been shown: half a character at the end."""
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        return printable(text[self.shown :])

    def _show(self, text: str) -> None:
        self.write(printable(text[self.shown :]))
        self.shown = len(text)


def side_by_side(texts: Sequence[str], notes: Sequence[Sequence[str]], width: int) -> str:
    """The texts in columns, as many beside each other as `width` characters allow, each under its notes."""
    beside = max(1, min(len(texts), (width + 3) // (NARROWEST + 3)))
    column = (width + 3) // beside - 3
    blocks = []
    for first in range(0, len(texts), beside):
        cells = []
        for i in range(first, min(first + beside, len(texts))):
            head = [f"({i + 1})", *notes[i], ""]
            body = printable(texts[i]).expandtabs().split("\n")
            lines = [part for line in (*head, *body) for part in textwrap.wrap(line, column) or [""]]
            cells.append(lines)
        height = max(map(len, cells))
        rows = zip(*(cell + [""] * (height - len(cell)) for cell in cells), strict=True)
        blocks.append("\n".join(" | ".join(f"{cell:<{column}}" for cell in row).rstrip() for row in rows))
    return f"\n{'-' * width}\n".join(blocks)
