"""Files of a run on a disk that is full now and then: no row is torn, none is lost once there is room again."""

import json
from dataclasses import replace

import pytest
from test_loop import make_run, rows

from grpo_core.config.sections import CheckpointConfig
from grpo_core.distributed import signals
from grpo_core.training import checkpoint
from grpo_core.training.job import close_at_end
from grpo_core.training.trainer import train


class Full:
    """A disk that takes `room` bytes of the run's .jsonl files and no more."""

    def __init__(self, monkeypatch, room):
        self.room, real = room, open

        class File:
            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.file.close()

            def tell(self):
                return self.file.tell()

            def truncate(self, size):
                return self.file.truncate(size)

            def write(file, content):
                if self.room <= 0:
                    raise OSError(28, "No space left on device")
                written = file.file.write(content[: self.room])  # what fits is written, as a real disk does
                self.room -= written
                return written

        monkeypatch.setattr(
            "grpo_core.monitor.run_log.open", lambda path, *how, **more: File(real(path, *how, **more)), raising=False
        )


def test_no_row_is_torn_and_all_come_when_there_is_room(tmp_path, monkeypatch, capsys):
    train(make_run(tmp_path / "whole", num_steps=6))
    disk = Full(monkeypatch, 5000)
    run = make_run(tmp_path / "full", num_steps=6)
    real = run.engine.step

    def step():
        disk.room = disk.room if len(seen) < 4 else 10**9  # room again in the fifth step
        seen.append(0)
        for name in ("metrics", "completions"):
            path = tmp_path / "full" / f"{name}.jsonl"
            for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
                assert line.endswith("\n") and json.loads(line)
        return real()

    seen = []
    run.engine.step = step
    train(run)
    assert (
        capsys.readouterr().out.count("cannot be written (No space left on device); its rows are kept and written later")
        == 1
    )
    for name in ("metrics", "completions"):
        one, other = rows(tmp_path / "full", name), rows(tmp_path / "whole", name)
        assert [row["step"] for row in one] == [row["step"] for row in other]
    assert rows(tmp_path / "full", "completions") == rows(tmp_path / "whole", "completions")


def test_no_checkpoint_stands_for_rows_that_are_not_there(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path, num_steps=2)
    Full(monkeypatch, 100)
    with pytest.raises(Exception, match="the last checkpoint could not be written"):
        train(run)
    assert "the checkpoint after 2 steps could not be written (No space left on device)" in capsys.readouterr().out
    assert checkpoint.list_checkpoints(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("steps_taken", [0, 1, 2])
def test_an_interrupted_run_does_not_claim_a_checkpoint_that_could_not_be_written(tmp_path, monkeypatch, capsys, steps_taken):
    run, asked, write = make_run(tmp_path, num_steps=3), [], checkpoint._write
    run = replace(run, config=replace(run.config, checkpoint=CheckpointConfig(every=1)))

    def full(folder, name, *rest):
        if name == f"step-{steps_taken:06d}":
            raise OSError(28, "No space left on device")
        write(folder, name, *rest)

    monkeypatch.setattr(checkpoint, "_write", full)
    monkeypatch.setattr(signals, "received_signal", lambda: asked.append(0) or 15 * (len(asked) == 2 + steps_taken))
    with pytest.raises(signals.Interrupted) as interrupted, close_at_end(run):
        train(run)
    assert not interrupted.value.is_saved and interrupted.value.exit_code == 143
    where = f"resume={tmp_path} continues the run from step-000001" if steps_taken == 2 else "no checkpoint has been written"
    out = capsys.readouterr().out
    assert f"stopped by SIGTERM without a checkpoint of its last step; {where}" in out
    assert "the run continues" not in out and "after writing a checkpoint" not in out
