"""TensorBoard and Weights & Biases get what metrics.jsonl gets, offline; and no tracker ends a run."""

import json
import struct
import subprocess

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
    "key, package, shown", [("tensorboard=true", "tensorboard", "true"), ("wandb=mine", "wandb", "'mine'")]
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
