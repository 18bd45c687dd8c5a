"""Send the metrics of a run to TensorBoard, Weights & Biases, trackio and MLflow, each switched on by one key.

A tracker that fails during a run is switched off with a warning, and the run continues.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from grpo_core.config.sections import RunConfig
from grpo_core.schema import ConfigError, finite_or_none, first_line, printable

MAX_COMPLETIONS = 4  # of one step
ID_FILE = "{name}-id.txt"  # in the run folder, so that a resumed run continues the same run of the tracker
NOT_IN_MLFLOW_NAMES = re.compile(r"[^\w\-. :/]", re.ASCII)


class Tracker(Protocol):
    """A service that receives numbers and texts.

    `step` is the step of metrics.jsonl, or the number of steps taken before an evaluation.
    """

    def log_numbers(self, row: Mapping[str, float], step: int) -> None: ...

    def log_text(self, name: str, text: str, step: int) -> None: ...

    def close(self) -> None: ...


def check_installed(config: RunConfig) -> None:
    """Check that the packages of the configured trackers are installed.

    Raises:
        ConfigError: a package is missing.
    """
    for key, value, package in (
        ("log.tensorboard", config.log.tensorboard, "tensorboard"),
        ("log.wandb", config.log.wandb, "wandb"),
        ("log.trackio", config.log.trackio, "trackio"),
        ("log.mlflow", config.log.mlflow, "mlflow"),
    ):
        if value and importlib.util.find_spec(package) is None:
            written = "true" if value is True else repr(value)
            raise ConfigError(f"{key} is {written}, but {package} is not installed: pip install -e '.[{package}]'")


class Trackers:
    """The trackers that a run has switched on. `say` prints a warning when one of them fails."""

    def __init__(self, folder: Path, config: RunConfig, written: str, first_step: int, say: Callable[[str], None]):
        """`written` is the text of config.yaml, which every tracker gets."""
        self._say = say
        self._trackers: dict[str, Tracker] = {}
        makers: dict[str, Callable[[], Tracker]] = {}
        if config.log.tensorboard:
            makers["tensorboard"] = lambda: TensorBoard(folder, first_step)
        if project := config.log.wandb:
            makers["wandb"] = lambda: WeightsAndBiases(folder, project, config.name)
        if trackio_project := config.log.trackio:
            makers["trackio"] = lambda: Trackio(folder, trackio_project, config.name)
        if experiment := config.log.mlflow:
            makers["mlflow"] = lambda: MLflow(folder, experiment, config.name)
        for name, make in makers.items():
            self._try(name, lambda make=make, name=name: self._trackers.__setitem__(name, make()))
        self._each(lambda tracker: tracker.log_text("config", f"```yaml\n{written}\n```", first_step))

    def log_metrics(self, row: Mapping[str, Any], step: int) -> None:
        """Send a row of metrics.jsonl, under its own names."""
        numbers = _finite_numbers(row)
        self._each(lambda tracker: tracker.log_numbers(numbers, step))

    def log_evaluation(self, row: Mapping[str, Any], step: int) -> None:
        """Send a row of evaluation.jsonl; its names are prefixed with evaluation/, except those of named sets."""
        numbers = {
            name if name.startswith("eval/") else f"evaluation/{name}": value
            for name, value in _finite_numbers(row).items()
        }
        self._each(lambda tracker: tracker.log_numbers(numbers, step))

    def log_completions(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Send the first MAX_COMPLETIONS completions of a step as a table."""
        lines = ["| reward | completion |", "|---|---|"]
        for row in rows[:MAX_COMPLETIONS]:
            text = printable(row["text"]).replace("<", "&lt;").replace("|", "\\|").replace("\n", "<br>")
            lines.append(f"| {row['reward']} | {text} |")
        self._each(lambda tracker: tracker.log_text("completions", "\n".join(lines), step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._trackers = {}

    def _each(self, work: Callable[[Tracker], None]) -> None:
        for name, tracker in [*self._trackers.items()]:
            self._try(name, lambda tracker=tracker: work(tracker))

    def _try(self, name: str, work: Callable[[], None]) -> None:
        """Call `work`; if it fails, switch the tracker `name` off."""
        try:
            work()
        except Exception as error:  # of many types: network, disk, the tracker's own
            self._trackers.pop(name, None)
            self._say(f"warning: log.{name} failed and is off for the rest of the run: {first_line(error)}")


class TensorBoard:
    """A tracker that writes event files to <run folder>/tensorboard."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # a resumed run repeats the steps after its checkpoint, so their old events are purged
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)

    def log_numbers(self, row: Mapping[str, float], step: int) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def log_text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A tracker that logs to a run of a W&B project; WANDB_MODE and the like are read from the environment."""

    def __init__(self, folder: Path, project: str, name: str) -> None:
        import wandb

        run_id = _read_id(folder, "wandb") or _write_id(folder, "wandb", uuid.uuid4().hex[:12])
        settings = wandb.Settings(silent=True, console="off")
        self._run = wandb.init(
            project=project, name=name, id=run_id, dir=str(folder), resume="allow", settings=settings
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._html = wandb.Html

    def log_numbers(self, row: Mapping[str, float], step: int) -> None:
        self._run.log({**row, "step": step})

    def log_text(self, name: str, text: str, step: int) -> None:
        escaped = text.replace("&", "&amp;").replace("<", "&lt;")
        self._run.log({name: self._html(f"<pre>{escaped}</pre>", inject=False), "step": step})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A tracker that logs to a run of a trackio project; TRACKIO_DIR and the like are read from the environment.

    trackio continues a run by its name, so the name gets an ending that no other run folder has.
    """

    def __init__(self, folder: Path, project: str, name: str) -> None:
        import trackio

        ending = _read_id(folder, "trackio") or _write_id(folder, "trackio", uuid.uuid4().hex[:6])
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(project=project, name=f"{name}-{ending}", resume="allow", embed=False)
        self._trackio = trackio

    def log_numbers(self, row: Mapping[str, float], step: int) -> None:
        self._run.log(dict(row), step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        self._run.log({name: self._trackio.Markdown(text)}, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()


class MLflow:
    """A tracker that logs to a run of an MLflow experiment; MLFLOW_TRACKING_URI and the like are read as MLflow does.

    Texts are artifacts of the run. Characters that MLflow does not allow in a metric's name are written as _.
    """

    def __init__(self, folder: Path, experiment: str, name: str) -> None:
        import mlflow
        from mlflow.entities import Metric

        for logger in ("mlflow", "alembic"):
            logging.getLogger(logger).setLevel(logging.WARNING)
        experiment_id = mlflow.set_experiment(experiment).experiment_id
        self._client, self._metric = mlflow.MlflowClient(), Metric
        self._run_id = _read_id(folder, "mlflow")
        if self._run_id:
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            run_id = self._client.create_run(experiment_id, run_name=name).info.run_id
            self._run_id = _write_id(folder, "mlflow", run_id)

    def log_numbers(self, row: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        names = {name: NOT_IN_MLFLOW_NAMES.sub("_", name) for name in row}
        metrics = [self._metric(names[name], value, now, step) for name, value in row.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def log_text(self, name: str, text: str, step: int) -> None:
        self._client.log_text(self._run_id, text, f"{name}/{step:06d}.md")

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def _read_id(folder: Path, name: str) -> str | None:
    """Return what identifies the run of the tracker `name` that this run folder has logged to; None if it has none."""
    path = folder / ID_FILE.format(name=name)
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def _write_id(folder: Path, name: str, identity: str) -> str:
    (folder / ID_FILE.format(name=name)).write_text(identity, encoding="utf-8")
    return identity


def _finite_numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a row, without its step."""
    finite = finite_or_none(dict(row))
    return {name: float(value) for name, value in finite.items() if isinstance(value, int | float) and name != "step"}
