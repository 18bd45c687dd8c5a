"""Every tracker gets what metrics.jsonl gets, offline; and no tracker ends a run."""

import json
import struct
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_run import SHORT

from grpo_core.cli import main
from grpo_core.config.sections import LogConfig, RunConfig
from grpo_core.monitor import trackers
from grpo_core.monitor.trackers import Trackers

pytestmark = pytest.mark.slow


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_both_hold_what_the_metrics_hold_also_when_resumed(tmp_path, here, monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "HOME": str(tmp_path / "home"), "WANDB_DIR": ""}.items():
        monkeypatch.setenv(name, value)
    on = ["log.tensorboard=true", "log.wandb=tests", "checkpoint.every=2", "log.every=2", "engine.schedule=constant"]
    for steps, more in ((3, []), (4, ["resume=auto"])):
        words = [f"output_dir={tmp_path}", *SHORT, *on, f"trainer.num_steps={steps}", *more]
        done = here("train", "--config", "configs/tiny.yaml", *words)
        assert done.returncode == 0 and "is off for the rest of the run" not in done.stdout, done.stdout + done.stderr
    folder = tmp_path / "tiny"
    rows, (before, *_, after) = read(folder / "metrics.jsonl"), read(folder / "evaluation.jsonl")
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    numbers = {name for row in rows for name, value in row.items() if value is not None} - {"step"}
    scalars = set(events.Tags()["scalars"])
    assert {name for name in scalars if not name.startswith("evaluation/")} == numbers
    for name in ("reward", "kl", "grad_norm", "rewards/correct_answer"):
        seen = {event.step: event.value for event in events.Scalars(name)}
        assert (
            seen == {row["step"]: pytest.approx(row[name], rel=1e-5) for row in rows} and len(events.Scalars(name)) == 4
        )
    accuracy = {event.step: event.value for event in events.Scalars("evaluation/accuracy")}
    assert accuracy[0] == pytest.approx(before["accuracy"]) and accuracy[4] == pytest.approx(after["accuracy"])
    text = events.Tensors("completions/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| reward | completion |" in text and "<script" not in text
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    identity = (folder / "wandb-id.txt").read_text()
    assert len(runs) == 2 and all(run.name.endswith(identity) for run in runs)  # one run, continued
    records = wandb_rows(runs[0])
    first = {row["step"]: row["reward"] for row in records if "reward" in row}
    assert first == {row["step"]: pytest.approx(row["reward"]) for row in rows[:3]}
    assert any("evaluation/accuracy" in row for row in records)
    assert subprocess.run(["pgrep", "-f", str(folder)], capture_output=True).stdout == b""
    assert {path.name for path in (tmp_path / "home").glob("*")} <= {".cache", ".config", ".netrc"}


def wandb_rows(run):
    """The rows that were logged to an offline run, from its own file: records in blocks of 32 KiB after 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (file,) = run.glob("*.wandb")
    data, at, whole, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack_from(
            "<HB", data, at + 4
        )  # after the checksum; 1: whole, 2, 3, 4: first, middle, last
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            record, whole = wandb_internal_pb2.Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
    return rows


@pytest.mark.parametrize(
    "key, package, shown",
    [("tensorboard=true", "tensorboard", "true"), *((f"{name}=mine", name, "'mine'") for name in ("wandb", "trackio", "mlflow"))],
)
def test_a_package_that_is_not_there_is_said_before_anything_loads(key, package, shown, monkeypatch, capsys, tmp_path):
    find = trackers.importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert main(["train", "--config", str(ROOT / "configs" / "tiny.yaml"), f"output_dir={tmp_path}", f"log.{key}"]) == 2
    sentence = f"log.{package} is {shown}, but {package} is not installed: pip install -e '.[{package}]'"
    assert sentence in capsys.readouterr().err and not any(tmp_path.iterdir())


class Broken:
    calls = 0

    def log_numbers(self, row, step):
        Broken.calls += 1
        if step == 1:
            raise OSError("No space left\non device")

    def log_text(self, name, text, step):
        pass

    def close(self):
        raise AssertionError("it is off")


def test_a_tracker_that_fails_is_switched_off_and_said_once(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(trackers, "TensorBoard", lambda folder, first_step: Broken())
    both = Trackers(tmp_path, RunConfig(log=LogConfig(tensorboard=True)), "", 0, said.append)
    for step in range(4):
        both.log_metrics({"step": step, "a": 1.0, "b": None, "c": float("nan")}, step)
    both.close()
    assert said == ["warning: log.tensorboard failed and is off for the rest of the run: No space left"] and Broken.calls == 2

    def refuse(*given):
        raise RuntimeError("no network")

    monkeypatch.setattr(trackers, "WeightsAndBiases", refuse)
    both = Trackers(tmp_path, RunConfig(log=LogConfig(wandb="x")), "", 0, said.append)
    both.log_metrics({"a": 1.0}, 0)
    assert said[1:] == ["warning: log.wandb failed and is off for the rest of the run: no network"]


ROWS = [{"step": step, "reward": step / 4, "rewards/my_rewards.py:a+b": 1.0, "kl": None} for step in range(3)]


def log_in_two_parts(folder, config):
    """Log two steps with an evaluation, and in a resumed run one more."""
    said = []
    for first, rows in ((0, ROWS[:2]), (2, ROWS[2:])):
        trackers = Trackers(folder, config, "name: mine", first, said.append)
        for row in rows:
            trackers.log_metrics(row, row["step"])
        trackers.log_evaluation({"accuracy": 0.5, "eval/hard/accuracy": 0.25}, first)
        trackers.log_completions([{"reward": 1.0, "text": "a|b\nc"}], first)
        trackers.close()
    assert said == []


def test_trackio_holds_the_rows_of_a_run_that_was_resumed(tmp_path, monkeypatch, capfd):
    trackio = pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    for module in (trackio, utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "store", raising=False)
    log_in_two_parts(tmp_path, RunConfig(name="mine", log=LogConfig(trackio="tests")))
    (run,) = trackio.Api().runs("tests")
    assert run.name == f"mine-{(tmp_path / 'trackio-id.txt').read_text()}" and capfd.readouterr().out == ""
    storage = sqlite_storage.SQLiteStorage
    logged = storage.get_logs("tests", run.name, run_id=run.id)
    assert {row["step"]: row["reward"] for row in logged if "reward" in row} == {0: 0.0, 1: 0.25, 2: 0.5}
    assert [row["evaluation/accuracy"] for row in logged if "evaluation/accuracy" in row] == [0.5, 0.5]
    assert not any("kl" in row for row in logged)
    texts = [row["completions"]["_value"] for row in logged if "completions" in row]
    assert len(texts) == 2 and "| 1.0 | a\\|b<br>c |" in texts[0]


def test_mlflow_holds_the_rows_of_a_run_that_was_resumed(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    log_in_two_parts(tmp_path, RunConfig(name="mine", log=LogConfig(mlflow="tests")))
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert run.info.run_id == (tmp_path / "mlflow-id.txt").read_text()
    assert run.info.run_name == "mine" and run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "reward")
    assert [(metric.step, metric.value) for metric in history] == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert {*run.data.metrics} == {"reward", "rewards/my_rewards.py:a_b", "evaluation/accuracy", "eval/hard/accuracy"}
    text = mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/completions/000002.md")
    assert "| 1.0 | a\\|b<br>c |" in text
    assert "name: mine" in mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/config/000000.md")


def test_what_trackio_is_called_with(tmp_path, monkeypatch, capsys):
    """The calls that trackio's tests above make, held where trackio is not installed."""
    calls = []

    class Run:
        def log(self, metrics, step=None):
            calls.append((step, metrics))

    def init(project, name=None, resume="never", embed=True):
        print("* Trackio project initialized")
        calls.append((project, name, resume, embed))
        return Run()

    module = SimpleNamespace(init=init, finish=lambda: calls.append("finish"), Markdown=lambda text: {"text": text})
    monkeypatch.setitem(sys.modules, "trackio", module)
    log_in_two_parts(tmp_path, RunConfig(name="mine", log=LogConfig(trackio="tests")))
    name = f"mine-{(tmp_path / 'trackio-id.txt').read_text()}"
    assert capsys.readouterr().out == "" and len(name) == len("mine-") + 6
    assert calls.count(("tests", name, "allow", False)) == calls.count("finish") == 2
    assert calls[1] == (0, {"config": {"text": "```yaml\nname: mine\n```"}})
    assert calls[2:4] == [(step, {"reward": step / 4, "rewards/my_rewards.py:a+b": 1.0}) for step in range(2)]
    assert calls[4] == (0, {"evaluation/accuracy": 0.5, "eval/hard/accuracy": 0.25})


def test_what_mlflow_is_called_with(tmp_path, monkeypatch):
    """The calls that MLflow's test above makes, held where MLflow is not installed."""
    calls = []

    class MlflowClient:
        def create_run(self, experiment_id, run_name=None):
            calls.append(("create", experiment_id, run_name))
            return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

        def update_run(self, run_id, status=None):
            calls.append(("update", run_id, status))

        def log_batch(self, run_id, metrics=()):
            calls.append((run_id, [*metrics]))

        def log_text(self, run_id, text, artifact_file):
            calls.append((run_id, artifact_file))

        def set_terminated(self, run_id):
            calls.append(("end", run_id))

    module, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    module.MlflowClient, module.entities = MlflowClient, entities
    module.set_experiment = lambda name: SimpleNamespace(experiment_id=f"e-{name}")
    entities.Metric = lambda key, value, timestamp, step: (key, value, step)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    log_in_two_parts(tmp_path, RunConfig(name="mine", log=LogConfig(mlflow="tests")))
    first, resumed = calls[:7], calls[7:]
    assert first[0] == ("create", "e-tests", "mine") and resumed[0] == ("update", "r1", "RUNNING")
    assert first[1] == ("r1", "config/000000.md") and first[-1] == resumed[-1] == ("end", "r1")
    assert first[2] == ("r1", [("reward", 0.0, 0), ("rewards/my_rewards.py:a_b", 1.0, 0)])
    assert first[4] == ("r1", [("evaluation/accuracy", 0.5, 0), ("eval/hard/accuracy", 0.25, 0)])
