"""The run's numbers for those who watch them elsewhere: TensorBoard and Weights & Biases, each switched on by one key.

A tracker that fails in the middle of a run is switched off with a warning; the run goes on.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from grpo_core.config.sections import RunConfig
from grpo_core.schema import ConfigError, finite_or_none, first_line, printable

SHOWN = 4  # completions at a time
ID = "wandb-id.txt"


class Tracker(Protocol):
    """Where numbers go. `step` is the step's number in metrics.jsonl, or the steps taken before an evaluation."""

    def numbers(self, row: Mapping[str, float], step: int) -> None: ...

    def text(self, name: str, text: str, step: int) -> None: ...

    def close(self) -> None: ...


def check(config: RunConfig) -> None:
    """Raise ConfigError where a tracker is asked for whose package is not there."""
    for key, value, package in (
        ("log.tensorboard", config.log.tensorboard, "tensorboard"),
        ("log.wandb", config.log.wandb, "wandb"),
    ):
        if value and importlib.util.find_spec(package) is None:
            shown = "true" if value is True else repr(value)
            raise ConfigError(f"{key} is {shown}, but {package} is not installed: pip install -e '.[{package}]'")


class Trackers:
    """All that are switched on. `say` is told when one fails, once."""

    def __init__(self, folder: Path, config: RunConfig, written: str, first_step: int, say: Callable[[str], None]):
        self._say = say
        self._trackers: dict[str, Tracker] = {}
        makers: dict[str, Callable[[], Tracker]] = {}
        if config.log.tensorboard:
            makers["tensorboard"] = lambda: TensorBoard(folder, first_step)
        if config.log.wandb:
            project = config.log.wandb
            makers["wandb"] = lambda: WeightsAndBiases(folder, project, config.name)
        for name, make in makers.items():
            self._try(name, lambda make=make, name=name: self._trackers.__setitem__(name, make()))
        self._each(lambda tracker: tracker.text("config", f"```yaml\n{written}\n```", first_step))

    def metrics(self, row: Mapping[str, Any], step: int) -> None:
        """A row of metrics.jsonl under its own names."""
        numbers = _numbers(row)
        self._each(lambda tracker: tracker.numbers(numbers, step))

    def evaluation(self, row: Mapping[str, Any], step: int) -> None:
        """A row of evaluation.jsonl, its names below evaluation/."""
        numbers = {f"evaluation/{name}": value for name, value in _numbers(row).items()}
        self._each(lambda tracker: tracker.numbers(numbers, step))

    def completions(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """The first few completions of a step, as a table."""
        lines = ["| reward | completion |", "|---|---|"]
        for row in rows[:SHOWN]:
            text = printable(row["text"]).replace("<", "&lt;").replace("|", "\\|").replace("\n", "<br>")
            lines.append(f"| {row['reward']} | {text} |")
        self._each(lambda tracker: tracker.text("completions", "\n".join(lines), step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._trackers = {}

    def _each(self, work: Callable[[Tracker], None]) -> None:
        for name, tracker in [*self._trackers.items()]:
            self._try(name, lambda tracker=tracker: work(tracker))

    def _try(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # of many kinds: the network, the disk, the tracker's own
            self._trackers.pop(name, None)
            self._say(f"warning: log.{name} is off from here on: {first_line(error)}")


class TensorBoard:
    """Event files in <run folder>/tensorboard."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what a resumed run takes again is purged from what it wrote before
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)

    def numbers(self, row: Mapping[str, float], step: int) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of a project; what else it needs to know, WANDB_MODE and its neighbours in the environment say."""

    def __init__(self, folder: Path, project: str, name: str) -> None:
        import wandb

        known = folder / ID
        if not known.exists():
            known.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        settings = wandb.Settings(silent=True, console="off")
        self._run = wandb.init(
            project=project, name=name, id=known.read_text().strip(), dir=str(folder), resume="allow", settings=settings
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._html = wandb.Html

    def numbers(self, row: Mapping[str, float], step: int) -> None:
        self._run.log({**row, "step": step})

    def text(self, name: str, text: str, step: int) -> None:
        shown = text.replace("&", "&amp;").replace("<", "&lt;")
        self._run.log({name: self._html(f"<pre>{shown}</pre>", inject=False), "step": step})

    def close(self) -> None:
        self._run.finish()


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a row, without its step."""
    finite = finite_or_none(dict(row))
    return {name: float(value) for name, value in finite.items() if isinstance(value, int | float) and name != "step"}
