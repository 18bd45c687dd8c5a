"""Who writes a run folder, what a run continues from, and what stays in the folder."""

import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_loop import make_run, not_finite, rows, with_objective

from grpo_core.batch import Task
from grpo_core.commands import evaluate, export
from grpo_core.config.files import dump, load, load_job
from grpo_core.config.sections import CheckpointConfig, EvaluationConfig
from grpo_core.distributed import signals
from grpo_core.monitor import run_lock
from grpo_core.monitor.file_modes import apply_umask
from grpo_core.monitor.run_log import RunLog
from grpo_core.schema import ConfigError
from grpo_core.training import checkpoint, run_dir, saved_batches
from grpo_core.training.resume import find_and_lock_start
from grpo_core.training.trainer import train

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"


@pytest.fixture
def run(tmp_path):
    """A run with two checkpoints and its config.yaml; the tests chdir to the folder that holds runs/."""
    made = make_run(tmp_path / "runs" / "cc")
    config = load(TINY, ["name=cc", f"output_dir={tmp_path}/runs", "seed=5", "engine.learning_rate=0.003", "trainer.num_steps=9"])
    made = replace(made, config=config)
    for step in (1, 2):
        assert checkpoint.save(made, step, made.control)
    (made.folder / "config.yaml").write_text(dump(config))
    (made.folder / "metrics.jsonl").write_text('{"step": 0}\n')
    return made


@pytest.fixture
def living():
    """Another process that runs."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def lock_of(process, **fields):
    """What the lock of a process holds."""
    known = {"host": socket.gethostname(), "since": "2026-11-28 10:00:00+00:00", "started": run_lock._identify(process)}
    return json.dumps({"process": process, **known, **fields})


@pytest.fixture(autouse=True)
def released():
    yield
    run_lock.release()


@pytest.mark.parametrize("words", [["resume=auto"], ["resume=force"], ["resume=FOLDER"], ["overwrite=true"], []])
@pytest.mark.parametrize("job", ["train", "sft"])
def test_n2_a_second_start_into_a_live_run_is_refused_and_touches_nothing(run, living, words, job):
    (run.folder / "lock.json").write_text(lock_of(living.pid))
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    words = [word.replace("FOLDER", str(run.folder)) for word in words]
    config = load_job(TINY, ["name=cc", f"output_dir={run.folder.parent}", *words])
    with pytest.raises(ConfigError, match=f"cc is being written by process {living.pid} on {socket.gethostname()} since 2026-11-28"):
        find_and_lock_start(config, job)
    assert before == {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}


def test_n2_a_stale_lock_is_taken_over_and_given_back(run, living):
    config = load_job(None, [f"resume={run.folder}"])
    ended = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    zombie = lock_of(ended.pid)
    ended.kill()
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # a zombie: nobody has asked for its exit code
    boot = run_lock._identify(living.pid).split()[0]
    reused = lock_of(living.pid, started=f"{boot} 7")  # the number belongs to a later process now
    for stale in (zombie, lock_of(10**9, started=""), reused, lock_of(os.getpid()), "", "{}", '{"process": 3}', "[1]"):
        (run.folder / "lock.json").write_text(stale)
        with run_lock.released_at_end():
            assert find_and_lock_start(config).step == 2
            lock = json.loads((run.folder / "lock.json").read_text())
            assert lock["process"] == os.getpid() and lock["host"] == socket.gethostname()
        assert not (run.folder / "lock.json").exists()
    ended.wait()


def test_n2_another_host_is_believed_and_the_file_is_named(run):
    (run.folder / "lock.json").write_text(lock_of(1, host="elsewhere"))
    with pytest.raises(ConfigError, match=r"process 1 on elsewhere since .* or delete .*cc/lock.json if it has ended"):
        find_and_lock_start(load_job(None, [f"resume={run.folder}"]))


@pytest.mark.slow
def test_n2_two_starts_at_once_have_one_winner_and_a_refused_start_leaves_no_folder(tmp_path, run):
    code = (
        "import sys, time; from pathlib import Path; from grpo_core.monitor import run_lock\n"
        "try:\n    run_lock.acquire(Path(sys.argv[1]))\n    print('mine', flush=True); input()\n"
        "except ValueError as error:\n    print('refused', flush=True)"
    )
    new = tmp_path / "runs" / "new"
    new.mkdir()
    (new / "lock.json").write_text(lock_of(10**9, started="gone"))  # stale
    both = [subprocess.Popen([sys.executable, "-c", code, new], stdin=-1, stdout=-1, text=True) for _ in range(2)]
    try:
        assert sorted(process.stdout.readline() for process in both) == ["mine\n", "refused\n"]
    finally:
        for process in both:
            process.communicate("\n")
    with run_lock.released_at_end(), pytest.raises(ZeroDivisionError):
        find_and_lock_start(load_job(TINY, ["name=fresh", f"output_dir={tmp_path}/runs"]))
        assert (tmp_path / "runs" / "fresh" / "lock.json").exists()
        1 / 0  # noqa: B018  as where the data turn out to be missing
    assert not (tmp_path / "runs" / "fresh").exists()


class Other:
    """A process that calls `work` when it is started, and answers with what it returned, or with its ConfigError."""

    def __init__(self, work):
        start, self._start = os.pipe()
        answer, sender = os.pipe()
        self.number, self.answer = os.fork(), os.fdopen(answer)
        if self.number == 0:
            os.close(self._start)
            os.read(start, 1)
            try:
                text = str(work())
            except ConfigError as error:
                text = str(error)
            os.write(sender, f"{text}\n".encode())
            os._exit(0)  # without the exit handlers of pytest
        os.close(sender)
        os.close(start)

    def start(self):
        os.write(self._start, b".")

    def read(self, seconds=20.0):
        """Return its answer; empty if there is none after this time."""
        return self.answer.readline() if select.select([self.answer], [], [], seconds)[0] else ""

    def wait(self):
        os.close(self._start)
        os.waitpid(self.number, 0)


def test_n2_the_choice_and_the_writing_of_the_lock_are_one_step(tmp_path, monkeypatch):
    """FAULTS N2: a process that starts between another's look at the folder and its lock waits, and is refused."""
    own_check, here, folder = run_lock.check_not_written, os.getpid(), tmp_path / "run"
    other = Other(lambda: run_lock.acquire(folder))  # before the lock, whose handle it would inherit

    def check_while_another_starts(folder):
        own_check(folder)
        if os.getpid() == here:
            other.start()
            assert other.read(0.4) == ""

    monkeypatch.setattr(run_lock, "check_not_written", check_while_another_starts)
    try:
        run_lock.acquire(folder)
        assert f"{folder} is being written by process {here} on {socket.gethostname()} since" in other.read()
    finally:
        other.wait()
    assert json.loads((folder / "lock.json").read_text())["process"] == here


def test_n2_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path):
    """FAULTS N2: a killed process holds neither the file system's lock nor the right to the folder."""
    other = Other(lambda: [run_lock.acquire(tmp_path / "run"), os.kill(os.getpid(), signal.SIGKILL)])
    other.start()
    other.wait()
    assert other.read() == "" and json.loads((tmp_path / "run" / "lock.json").read_text())["process"] == other.number
    run_lock.acquire(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "lock.json").read_text())["process"] == os.getpid()


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS])
def test_n2_a_file_system_that_cannot_lock_is_said_and_the_run_is_locked_all_the_same(tmp_path, monkeypatch, capsys, living, number):
    def refuse(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    run_lock.acquire(tmp_path / "run")
    printed = "".join(capsys.readouterr())
    assert f"the file system of {tmp_path}/run cannot lock files ({os.strerror(number)}); do not start two runs" in printed
    assert json.loads((tmp_path / "run" / "lock.json").read_text())["process"] == os.getpid()
    run_lock.release()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock.json").write_text(lock_of(living.pid))
    with pytest.raises(ConfigError, match=f"is being written by process {living.pid}"):
        run_lock.acquire(tmp_path / "run")


def test_n2_a_folder_that_cannot_be_locked_or_written_is_a_sentence(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for place in (run_lock.os, "open"), (run_lock.os, "replace"):
        with monkeypatch.context() as patch, pytest.raises(ConfigError, match=f"the run folder {tmp_path}/run .* cannot be written: Read-only"):
            patch.setattr(*place, refuse)
            run_lock.acquire(tmp_path / "run")


def test_n2_every_writer_of_a_run_folder_respects_the_lock(run, living, tmp_path):
    (run.folder / "lock.json").write_text(lock_of(living.pid))
    sentence = f"is being written by process {living.pid} on"
    with pytest.raises(ConfigError, match=f"--output is .*cc/export, but .*cc {sentence}"):
        export.run_export(str(run.folder))
    for output in (run.folder / "adapter", run.folder / "a" / "b"):
        with pytest.raises(ConfigError, match=sentence):
            export.run_export("builtin:tiny", output=output)
        with pytest.raises(ConfigError, match=f"sft.output is .*, but .* {sentence}"):
            run_dir.check_writable(output, "sft.output")
        with pytest.raises(ConfigError, match=sentence):
            evaluate._make_folder(output)
    (run.folder / "lock.json").unlink()
    with pytest.raises(ConfigError, match="is the folder of a run"):
        evaluate._make_folder(run.folder)  # its completions.jsonl would be replaced
    evaluate._make_folder(run.folder / "evaluate")


def test_n2_overwrite_keeps_the_lock_and_what_a_link_points_to(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").touch()
    (run.folder / "batches").symlink_to(other)
    run_lock.acquire(run.folder)
    run_lock.empty_folder(run.folder)
    assert [path.name for path in run.folder.iterdir()] == ["lock.json"] and (other / "precious").exists()


def test_s6_overwrite_of_a_run_folder_that_is_a_link(run):
    link = run.folder.with_name("link")
    link.symlink_to(run.folder)
    with pytest.raises(ConfigError, match="link is a symbolic link; remove the link"):
        find_and_lock_start(load_job(TINY, ["name=link", f"output_dir={run.folder.parent}", "overwrite=true"]))
    assert (run.folder / "metrics.jsonl").exists()


def test_n9_a_run_continues_from_its_own_config(run, tmp_path):
    own = load(run.folder / "config.yaml", [])
    place = f"output_dir={tmp_path}/runs"
    for words in ([f"resume={run.folder}"], ["resume=auto", "name=cc", place], ["resume=force", "name=cc", place]):
        said = []
        config = load_job(None, words, notify=said.append)
        assert replace(config, resume=None) == own and config.resume == words[0].partition("=")[2] and said == []
        assert find_and_lock_start(config).step == 2
    config = load_job(None, [f"resume={run.folder}", "trainer.num_steps=20", "log.every=1"])
    assert (config.trainer.num_steps, config.log.every, config.seed) == (20, 1, 5) and find_and_lock_start(config).step == 2


def test_n9_what_may_not_change_is_refused_by_key_and_force_names_it(run):
    words = ["seed=6", "lora.r=4", "trainer.num_steps=20"]
    with pytest.raises(ConfigError, match=r"lora.r \(16 in the checkpoint, 4 now\), seed \(5 in the checkpoint, 6 now\)"):
        find_and_lock_start(load_job(None, [f"resume={run.folder}", *words]))
    config = load_job(None, ["resume=force", "name=cc", f"output_dir={run.folder.parent}", *words])
    assert [key.split()[0] for key in find_and_lock_start(config).overridden] == ["lora.r", "seed"]


def test_n9_a_config_beside_it_says_which_run_and_its_other_keys_are_named(run, tmp_path):
    file, said = tmp_path / "other.yaml", []
    file.write_text(f"name: cc\noutput_dir: {tmp_path}/runs\nresume: auto\nseed: 7\ntrainer: {{num_steps: 9, max_restarts: 2}}\nlog: {{every: 3}}\n")
    config = load_job(file, ["log.every=4"], notify=said.append)
    assert (config.seed, config.trainer.max_restarts, config.log.every) == (5, 0, 4)
    (sentence,) = said
    assert sentence.endswith(f"{file} has other values of seed, trainer.max_restarts, which do not count")
    assert load_job(file, ["resume=null"]).seed == 7 and load_job(file, ["name=new"]).seed == 7  # new runs
    with pytest.raises(ConfigError, match="unknown key sead"):
        load_job(None, [f"resume={run.folder}", "sead=3"])
    with pytest.raises(ConfigError, match="a run is continued or removed, not both"):
        load_job(None, [f"resume={run.folder}", "overwrite=true"])


def test_n9_a_moved_or_renamed_run_goes_on_where_it_lies(run, tmp_path):
    moved = run.folder.rename(tmp_path / "runs" / "moved")
    start = find_and_lock_start(load_job(None, ["resume=auto", "name=moved", f"output_dir={tmp_path}/runs"]))
    assert start.folder == moved and start.step == 2


@pytest.mark.parametrize("words, sentence", [
    (["name=other"], "name is 'other', but resume is"),
    (["output_dir=elsewhere"], "output_dir is 'elsewhere', but resume is"),
    (["name=cc", "output_dir=elsewhere"], "output_dir is 'elsewhere', but resume is"),
])  # fmt: skip
@pytest.mark.parametrize("supervised", [False, True])
def test_attack_5_a_resumed_run_keeps_its_name(run, words, sentence, supervised):
    with pytest.raises(ConfigError, match=sentence):
        load_job(None, [f"resume={run.folder}", *words], supervised=supervised)
    assert load(run.folder / "config.yaml", []).name == "cc"


def test_attack_5_the_runs_own_name_is_accepted_and_its_folder_says_it(run, tmp_path, monkeypatch):
    for words in (["name=cc"], [f"output_dir={tmp_path}/runs"], ["name=cc", f"output_dir={tmp_path}/runs/../runs/"]):
        config = load_job(None, [f"resume={run.folder}", *words])
        assert (config.name, config.output_dir) == ("cc", f"{tmp_path}/runs")
    moved = run.folder.rename(tmp_path / "runs" / "moved")
    config = load_job(None, [f"resume={moved}"])
    assert (config.name, config.output_dir) == ("moved", f"{tmp_path}/runs")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_job(None, ["resume=~/runs/moved"]).name == "moved"
    monkeypatch.chdir(moved)
    config = load_job(None, ["resume=."])
    assert (config.name, config.output_dir) == ("moved", f"{tmp_path}/runs")


@pytest.mark.parametrize("given", ["folder", "auto", "force"])
def test_attack_5_config_yaml_never_holds_another_name_than_its_folders(run, given):
    """A program that builds its configuration with `load_config` does not take that of the run."""
    words = [f"resume={run.folder}", "name=other"] if given == "folder" else [f"resume={given}", "name=cc", f"output_dir={run.folder.parent}"]
    config = load(TINY, words)
    RunLog(run.folder, config, 2, 9).close()
    written = load(run.folder / "config.yaml", [])
    assert (written.name, written.output_dir) == ("cc", str(run.folder.parent))


def test_n9_values_that_only_fit_the_runs_own_config_are_accepted(run, tmp_path):
    config = load(TINY, ["lora.r=0", "loss.kl_coef=0", "name=cc", f"output_dir={tmp_path}/runs"])
    (run.folder / "config.yaml").write_text(dump(config))
    assert load_job(None, [f"resume={run.folder}", "lora.r=0"]).loss.kl_coef == 0


def test_n9_without_a_checkpoint_auto_starts_anew_with_the_file(run, tmp_path):
    for path in (run.folder / "checkpoints").iterdir():
        path.rename(tmp_path / path.name)
    assert load_job(TINY, ["resume=auto", "name=cc", f"output_dir={tmp_path}/runs"]).seed != 5


def test_n9_sft_does_not_continue_a_run_of_train(run):
    with pytest.raises(ConfigError, match="cannot resume from .* with sft, because it belongs to a run of train"):
        find_and_lock_start(load_job(None, [f"resume={run.folder}"]), "sft")


def test_n9_a_checkpoint_older_than_a_key_resumes(run):
    meta = run.folder / "checkpoints" / "step-000002" / "meta.json"
    content = json.loads(meta.read_text())
    del content["config"]["sampling"]["dynamic_attempts"], content["job"]
    meta.write_text(json.dumps(content))
    config = load(run.folder / "config.yaml", [])
    assert checkpoint.read_meta(meta.parent, config)[1] == []


EVALUATED = EvaluationConfig(every=2, num_tasks=3)


def evaluated_run(folder, start_step=0, num_steps=6, every=1):
    """A run on fakes that evaluates after every second step."""
    run = make_run(
        folder, num_steps, change=lambda config: replace(config, evaluation=EVALUATED, checkpoint=CheckpointConfig(every, 9))
    )
    return replace(run, start_step=start_step, eval_tasks=[Task(i, "p", [5, 6], {}, seed=(1, i)) for i in range(3)])


@pytest.mark.parametrize("event", ["signal", "failure"])
def test_fault_18_an_evaluation_missed_at_an_interrupt_is_made_up_for(tmp_path, monkeypatch, event):
    from grpo_core.monitor.alerts import Alerts

    run, steps = evaluated_run(tmp_path), []
    if event == "signal":
        monkeypatch.setattr(signals, "received_signal", lambda: steps.append(0) or 15 * (len(steps) == 2 + 4))  # 2 before the loop
    else:
        monkeypatch.setattr(Alerts, "check_failed_rewards", lambda self: steps.append(0) or ("it failed" if len(steps) == 4 else None))
    with pytest.raises((signals.Interrupted, signals.RunFailed)):
        train(run)
    monkeypatch.undo()
    assert [row["step"] for row in rows(tmp_path, "evaluation")] == [0, 2]
    train(replace(run, start_step=4))
    assert [row["step"] for row in rows(tmp_path, "evaluation")] == [0, 2, 4, 6]
    train(replace(run, start_step=6))  # a finished run: nothing is evaluated twice
    train(replace(run, start_step=4, num_steps=4))
    assert [row["step"] for row in rows(tmp_path, "evaluation")] == [0, 2, 4, 6]


def skipping_run(folder, keep, every=1):
    """A run on fakes whose gradient is not finite from step 2 on."""
    def change(config):
        return replace(config, checkpoint=CheckpointConfig(every, keep))

    run = make_run(folder, num_steps=9, tokens_per_micro_batch=10_000, max_skipped_steps=4, change=change)
    return with_objective(run, loss_fn=not_finite(range(2, 9)), learns_from_ties=True)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_fault_19_the_good_checkpoint_stays_and_is_what_resume_takes(tmp_path, keep):
    run = skipping_run(tmp_path, keep)
    with pytest.raises(signals.RunFailed, match="a checkpoint of the state before them is in"):
        train(run)
    newest = checkpoint.list_checkpoints(tmp_path / "checkpoints")[-1]
    assert newest.name == "step-000002" and checkpoint.describe_damage(newest) is None


def test_fault_19_amid_skipped_steps_the_newest_good_one_is_not_pruned(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(signals, "received_signal", lambda: 15 * (file.exists() and len(rows(tmp_path)) == 5))
    with pytest.raises(signals.Interrupted):
        train(skipping_run(tmp_path, keep=1))
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == ["step-000002", "step-000005"]


def test_fault_19_the_one_just_written_is_not_pruned_for_damaged_ones_after_it(tmp_path):
    run = make_run(tmp_path, change=lambda config: replace(config, checkpoint=CheckpointConfig(0, 1)))
    folder = tmp_path / "checkpoints"
    assert checkpoint.save(run, 6, run.control)
    (folder / "step-000006" / "meta.json").write_text("{}")
    assert checkpoint.save(run, 4, run.control)  # resumed from an older one
    assert [path.name for path in checkpoint.list_checkpoints(folder)] == ["step-000004"]


def test_s6_pruning_a_checkpoint_that_is_a_link_deletes_the_link_only(tmp_path, capsys):
    run = make_run(tmp_path / "run", change=lambda config: replace(config, checkpoint=CheckpointConfig(0, 1)))
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoint.save(run, 1, run.control)
    (folder / "step-000001").rename(tmp_path / "elsewhere")
    (folder / "step-000001").symlink_to(tmp_path / "elsewhere")
    assert checkpoint.save(run, 2, run.control) and "warning" not in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["step-000002"] and (tmp_path / "elsewhere" / "meta.json").exists()


def test_fault_20_a_loss_scale_at_its_minimum_stays_there(monkeypatch):
    from deepspeed.runtime.fp16 import loss_scaler

    from grpo_core.training.engine import _stay_at_minimum

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)
    scaler = loss_scaler.DynamicLossScaler(4.0, 10, 1.0, delayed_shift=1, consecutive_hysteresis=False)
    _stay_at_minimum(scaler)
    scales = [scaler.update_scale(True) or scaler.cur_scale for _ in range(4)]
    assert scales == [2.0, 1.0, 1.0, 1.0]


@pytest.fixture
def exporting(monkeypatch):
    """The sources that `export` opens: none may be, where the place of its output is refused."""
    opened = []
    monkeypatch.setattr(export, "open_source", lambda source, *args, **options: opened.append(source))
    yield opened
    assert opened == []


@pytest.mark.parametrize("options", [{}, {"adapter": True}, {"output": "here"}])
def test_s6_export_over_a_symbolic_link_leaves_its_target_alone(run, tmp_path, exporting, options):
    target = tmp_path / "target"
    target.mkdir()
    (target / export.MARK).write_text("{}")  # it even is an export
    link = tmp_path / "link" if options.get("output") else run.folder / ("export-adapter" if options else "export")
    options = {**options, **({"output": link} if options.get("output") else {})}
    for points_to in (target, tmp_path / "nowhere"):
        link.symlink_to(points_to)
        with pytest.raises(ConfigError, match=f"--output {link} is a symbolic link"):
            export.run_export(str(run.folder), **options)
        link.unlink()
    assert (target / export.MARK).exists()


def test_n7_an_older_export_on_a_disk_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    folder = tmp_path / "export"
    export._make_empty_folder(folder)

    def refuse(path, *args, **options):
        raise OSError(30, "Read-only file system", str(path))

    for module, function in ((export.shutil, "rmtree"), (export.Path, "mkdir")):
        with monkeypatch.context() as patch:
            patch.setattr(module, function, refuse)
            with pytest.raises(ConfigError, match="export cannot be written: Read-only file system"):
                export._make_empty_folder(folder)
    assert not list(folder.glob("*"))  # the second time the older one was gone already


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_n21_files_have_the_mode_that_the_umask_asks_for(tmp_path, umask):
    previous = os.umask(umask)
    try:
        run = make_run(tmp_path / "run")
        assert checkpoint.save(run, 1, run.control)
        (tmp_path / "batches").mkdir()
        assert saved_batches.write_files(tmp_path / "batches", 0, {"x": torch.ones(2)}, {}) is None
        run.policy.save(tmp_path / "adapter")
        run_lock.acquire(tmp_path / "run")
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    finally:
        os.umask(previous)
    assert "adapter_model.safetensors" in modes and "tensors.safetensors" in modes and "lock.json" in modes
    assert set(modes.values()) == {0o666 & ~umask}, {name: oct(mode) for name, mode in modes.items()}


def test_n21_the_umask_is_read_without_proc_too(tmp_path, monkeypatch):
    def unreadable(self, **options):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "read_text", unreadable)
    file = tmp_path / "file"
    file.touch(0o600)
    previous = os.umask(0o027)
    try:
        apply_umask(file)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(previous)
    assert file.stat().st_mode & 0o777 == 0o640


def test_n12_a_moved_base_model_is_named_for_sample_and_export_too(monkeypatch):
    from grpo_core.cli import main
    from grpo_core.commands import sample

    calls = []

    def open_source(source, overrides=(), **options):
        calls.append(list(overrides))
        raise ConfigError("opened")

    for module in (sample, export, evaluate):
        monkeypatch.setattr(module, "open_source", open_source)
    words = ["model.path=/moved", "data.system=be brief"]
    for command in (["sample", "RUN"], ["sample", "RUN", "What is model.path=?"], ["export", "RUN"], ["evaluate", "RUN"]):
        assert main([*command, *words]) == 2
    assert [call[:2] for call in calls] == 4 * [words] and calls[2][2:] == ["model.precision=fp32"]


def write_evaluation(folder, samples, figures):
    """Write the files of an evaluation with these names of figures."""
    result = {"policy": {name: {"value": 0.5} for name in figures}, "sampling": {"samples": samples}}
    evaluate._write_files(folder, result, f"table {samples}", [{"sample": samples}])


def test_n17_a_second_evaluation_without_samples_keeps_the_first_beside_it(tmp_path, capsys):
    write_evaluation(tmp_path, 8, ["greedy", "pass@8", "maj@8"])
    write_evaluation(tmp_path, 0, ["greedy"])
    assert "the earlier evaluation with 8 samples is kept in" in capsys.readouterr().out
    write_evaluation(tmp_path, 0, ["greedy"])
    kept = json.loads((tmp_path / "evaluate-8-samples.json").read_text())
    assert "pass@8" in kept["policy"] and "pass@8" not in (tmp_path / "evaluate.json").read_text()
    assert (tmp_path / "evaluate-8-samples.txt").read_text() == "table 8\n" and len(list(tmp_path.iterdir())) == 6
    write_evaluation(tmp_path, 2, ["greedy", "pass@2"])
    write_evaluation(tmp_path, 4, ["greedy", "pass@2", "pass@4"])  # it has every figure of the one before
    assert not (tmp_path / "evaluate-2-samples.json").exists()
    (tmp_path / "evaluate.json").write_text("[]")  # none of ours
    write_evaluation(tmp_path, 0, ["greedy"])


def test_s1_a_group_whose_advantages_are_all_zero_is_tied_for_gdpo_too():
    """FAULTS S1: truncation leaves out the completions that differ, so the components of the others are equal."""
    from types import SimpleNamespace

    from grpo_core.objective.advantages import ADVANTAGES
    from grpo_core.training.rollouts import _tied

    objective = SimpleNamespace(advantage_fn=ADVANTAGES.get("gdpo"), min_group_std=0.0)
    first = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    scores = SimpleNamespace(by_name={"a": first, "b": first.clone()}, weights=(1.0, 1.0))
    rewards = 2 * first
    rewards[0, 2] = rewards[2, 1:] = torch.nan  # left out: what is left is equal, unequal, a single one
    assert _tied(objective, rewards, scores).tolist() == [True, False, True]
    assert _tied(objective, 2 * first, scores).tolist() == [False, False, False]


def test_n18_a_signal_is_acknowledged_at_once(monkeypatch):
    written = []
    monkeypatch.setattr(signals.os, "write", lambda file, text: written.append((file, text.decode())))
    monkeypatch.setattr(signals, "_received", 0)
    with signals.handle_signals():
        os.kill(os.getpid(), 2)
        assert signals.received_signal() == 2
    ((file, text),) = written
    assert file == 2 and "SIGINT received; the run stops before its next step, with a checkpoint" in text


def test_n18_progress_in_a_log_file_is_sparse(monkeypatch, capsys):
    from grpo_core.monitor import progress

    monkeypatch.setattr(progress, "LOG_DELAY", 0.05)
    with progress.show_elapsed("loading the model"), progress.progress_bar(9, "evaluating", "task") as bar:
        bar.update(4)
        time.sleep(1.0)
    # runs of other tests that were never closed may print lines of their own
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("step")]
    assert {line.rpartition(",")[0] for line in lines} == {"loading the model", "evaluating: 4 of 9 tasks"}
    assert 4 <= len(lines) <= 10  # after 0.05, 0.1, 0.2, 0.4 and 0.8 s
    time.sleep(0.2)
    assert "loading" not in capsys.readouterr().err and progress.LOG_DELAY < 10


def test_n18_the_first_step_shows_its_phase_in_a_log_file(tmp_path, monkeypatch):
    run = make_run(tmp_path, num_steps=4)
    try:
        assert run.log._describe_progress() is None  # a line has just been printed
        run.log._last_line -= 60
        with run.log.phase("sample"):
            assert run.log._describe_progress() == "step 1 of 4: sample"
        with run.log.phase("evaluate"):  # which has a count of its own
            assert run.log._describe_progress() is None
    finally:
        run.log.close()


def test_n18_the_first_line_comes_before_the_imports(run, monkeypatch, capsys):
    from grpo_core.commands import train as command

    monkeypatch.delenv("GRPO_CORE_FOLDER_NOTE", raising=False)
    monkeypatch.setattr(command, "run_job", lambda job, config: 0)
    assert command.run_train(None, [f"resume={run.folder}"]) == 0
    assert capsys.readouterr().out == f"run {run.folder}: loading\n"
    monkeypatch.setenv("GRPO_CORE_FOLDER_NOTE", "note")  # the launcher has printed it
    assert command.run_train(None, [f"resume={run.folder}"]) == 0 and capsys.readouterr().out == ""
