"""The `study` command: train the variants of a study with its seeds, and compare them.

Each run is a `launch` in a process of its own, so that one that fails does not end the others. A run that is finished
is skipped, and one that was stopped is resumed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from grpo_core.commands.errors import print_error
from grpo_core.commands.launch import PROGRAM
from grpo_core.config.files import dump, load, to_inline_yaml
from grpo_core.config.sections import RunConfig
from grpo_core.config.study import Study, list_differing, load_study
from grpo_core.counts import quantify
from grpo_core.distributed import ranks
from grpo_core.distributed.notices import count_signals, write_notice
from grpo_core.monitor.run_log import find_user_files
from grpo_core.report.png import draw_bands, has_matplotlib
from grpo_core.report.run_reader import read_run
from grpo_core.report.study import compare_variants, render_study
from grpo_core.report.summary import format_duration
from grpo_core.report.whole_files import write_whole
from grpo_core.schema import ConfigError, describe_exit, finite_or_none
from grpo_core.training.run_dir import describe_unwritable, holds_run

FAILED = 3  # exit code, as that of a run that could not go on
OUTPUT = "output.log"  # in a run folder: what the run printed
POLL_SECONDS = 0.2

RunKey = tuple[str, int]  # variant, seed


def run_study(path: Path, *, jobs: int = 1, dry_run: bool = False) -> int:
    """Train what is missing, `jobs` runs at once, and write and print the comparison of all that has finished.

    Return 0, FAILED if a run failed, or 128 + n if signal n stopped the study.

    Raises:
        ConfigError: the study is wrong, its folder cannot be written, or a run was made with another configuration.
    """
    study = load_study(path)
    states = {key: find_state(study, key) for key in study.runs}
    waiting = [key for key, state in states.items() if state != "finished"]
    print(f"study {study.folder}: {quantify(len(states), 'run')}, {quantify(len(waiting), 'run')} to train", flush=True)
    if dry_run:
        for key, state in states.items():
            print(f"  {study.run_folder(*key)}: {state}")
        return 0
    if waiting and (problem := describe_unwritable(study.folder, keep_parents=True)):
        raise ConfigError(f"the folder {study.folder} of the study (output_dir and name) cannot be written: {problem}")
    training = _Training(study, waiting, jobs)
    training.run()
    print("\n" + write_comparison(study), flush=True)
    for (variant, seed), reason in training.failures.items():
        print_error(f"{variant} with seed {seed} failed: {reason}; see {study.run_folder(variant, seed) / OUTPUT}")
    return 128 + training.signal if training.signal else FAILED if training.failures else 0


def find_state(study: Study, key: RunKey) -> str:
    """Return "finished", or the step that a run would start from.

    Raises:
        ConfigError: its folder holds a run of another configuration, or of another version of a user's file.
    """
    config, folder = study.runs[key], study.run_folder(*key)
    if not holds_run(folder):
        return "new"
    _check_same(folder, config)
    run = read_run(folder)
    is_evaluated = bool(run.evaluation) and run.evaluation[-1]["step"] > 0
    if is_evaluated and any((folder / "adapter").glob("*.safetensors")):
        return "finished"
    return f"stopped after {quantify(len(run.metrics), 'step')}"


def _check_same(folder: Path, config: RunConfig) -> None:
    """Refuse a run folder whose run is not the one that the study would start now."""
    remedy = f"remove {folder}, or give the study another name"
    try:
        before = load(folder / "config.yaml")
    except ConfigError as error:
        raise ConfigError(f"the run {folder} cannot be compared with the study: {error}; {remedy}") from None
    for name, (then, now) in list_differing(before, config).items():
        raise ConfigError(f"{name} is {now!r} in the study, and {then!r} in the run {folder}; {remedy}")
    for file in map(Path, sorted(find_user_files(config))):
        copy = folder / "code" / file.name
        if copy.is_file() and copy.read_bytes() != file.read_bytes():
            raise ConfigError(f"{file} has changed since the run {folder} began; {remedy}")


def write_comparison(study: Study) -> str:
    """Write study.json, study.md and, with matplotlib, study.png to the study's folder; return the text of study.md."""
    finished = {
        variant: {
            seed: study.run_folder(variant, seed)
            for seed in study.keys.seeds
            if find_state(study, (variant, seed)) == "finished"
        }
        for variant in study.keys.variants
    }
    data = compare_variants(finished, study.keys.control, study.keys.metric)
    picture = None
    if has_matplotlib() and any(finished.values()):
        picture = "study.png"
        bands = {name: figures["curve"] for name, figures in data["variants"].items()}
        draw_bands(bands, study.keys.control, study.folder / picture)
    changes = {
        name: " ".join(
            f"{key}={value if isinstance(value, str) else to_inline_yaml(value)}" for key, value in (keys or {}).items()
        )
        for name, keys in study.keys.variants.items()
    }
    text = render_study(study.keys.name, data, changes, picture)
    write_whole(study.folder / "study.json", (json.dumps(finite_or_none(data), indent=1) + "\n").encode())
    write_whole(study.folder / "study.md", text.encode())
    return text


class _Training:
    """The runs of a study that are trained, up to `jobs` at once."""

    def __init__(self, study: Study, waiting: list[RunKey], jobs: int) -> None:
        self.study, self.waiting, self.jobs = study, waiting, jobs
        self.failures: dict[RunKey, str] = {}
        self.signal = 0  # that stopped the study
        self._signal_times: list[float] = []
        self._signals_sent = 0
        self._running: dict[RunKey, tuple[subprocess.Popen, float, int]] = {}  # process, start, size of its log before
        self._total = len(waiting)

    def run(self) -> None:
        """Train all runs. After a signal, which is passed on, no further run starts."""
        handlers = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self._running or (self.waiting and not self.signal):
                while self.waiting and len(self._running) < self.jobs and not self.signal:
                    self._start(self.waiting.pop(0))
                time.sleep(POLL_SECONDS)
                for key in [key for key, (process, *_) in self._running.items() if process.poll() is not None]:
                    self._finish(key)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _start(self, key: RunKey) -> None:
        folder = self.study.run_folder(*key)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "config.yaml"
        if not holds_run(folder):
            file.write_text(dump(self.study.runs[key]), encoding="utf-8")
        words = ["launch", "--processes", str(self.study.keys.processes), "--config", str(file), "resume=auto"]
        with (folder / OUTPUT).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *PROGRAM, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C reaches the study only
                preexec_fn=ranks.die_with_parent,
            )
            self._running[key] = process, time.monotonic(), log.tell()
        self._print(key, "started")

    def _finish(self, key: RunKey) -> None:
        process, started, size = self._running.pop(key)
        if process.returncode == 0:
            self._print(key, f"finished in {format_duration(time.monotonic() - started)}")
        elif self.signal:
            self._print(key, "stopped")
        else:
            self.failures[key] = _find_reason(self.study.run_folder(*key) / OUTPUT, size, process.returncode)
            self._print(key, f"failed: {self.failures[key]}")

    def _print(self, key: RunKey, event: str) -> None:
        left = len(self.waiting)
        print(f"{self.study.run_folder(*key)} {event} ({left:,} of {self._total:,} waiting)", flush=True)

    def _pass_on(self, number: int, frame: object) -> None:
        """Pass a signal on; a launcher ends its processes at the second."""
        count = count_signals(self._signal_times)
        if count == self._signals_sent:
            return
        self.signal, self._signals_sent = number, count
        running = quantify(len(self._running), "run")
        write_notice(f"{signal.Signals(number).name} received; it is passed on to {running}, and no other is started")
        for process, *_ in self._running.values():
            if process.poll() is None:
                process.send_signal(number)


def _find_reason(log: Path, size: int, code: int) -> str:
    """Return why a run failed: the last message of the program in what it has printed, else its last line."""
    lines = log.read_bytes()[size:].decode(errors="replace").replace("\r", "\n").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    messages = [line.removeprefix("grpo_core: ") for line in lines if line.startswith("grpo_core: ")]
    return (messages or lines or [describe_exit(code)])[-1]
