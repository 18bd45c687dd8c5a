"""What a run starts from: its own configuration without a checkpoint, or an earlier checkpoint that `resume` names."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from test_loop import make_run

from grpo_core.config.files import dump, load, load_job
from grpo_core.config.paths import split_resume
from grpo_core.data.forms import recognise
from grpo_core.schema import ConfigError
from grpo_core.scoring.kept_answers import KeptAnswers
from grpo_core.training import checkpoint
from grpo_core.training.resume import look_up_start
from grpo_core.training.run_dir import describe_later, discard_later

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny.yaml"
GSM8K = ROOT / "tests" / "fixtures" / "formats" / "gsm8k.jsonl"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The default configuration is configs/tiny.yaml."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.chdir(ROOT)


@pytest.fixture
def own(tmp_path):
    """The config.yaml of a run that was ended before its first checkpoint."""
    config = load(TINY, ["name=mine", f"output_dir={tmp_path}", "seed=7", "lora.r=4"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text(dump(config))
    return tmp_path / "mine" / "config.yaml"


def job(tmp_path, *words, path=None, **options):
    """The configuration of a job, and the sentences about it."""
    notes = []
    config = load_job(path, [f"output_dir={tmp_path}", *words], notify=notes.append, recognise=recognise, **options)
    return config, notes


@pytest.mark.parametrize("how", ["auto", "force"])
def test_without_a_checkpoint_and_a_file_a_run_starts_with_its_own_configuration(own, tmp_path, how):
    config, notes = job(tmp_path, "name=mine", f"resume={how}", "lora.alpha=9")
    assert (config.seed, config.lora.r, config.lora.alpha, config.resume) == (7, 4, 9, how)
    assert notes == [f"{tmp_path}/mine has no checkpoint to resume from; it is started anew with its own config.yaml"]


def test_without_a_checkpoint_a_file_that_is_named_counts_and_a_sentence_says_so(own, tmp_path):
    config, notes = job(tmp_path, "name=mine", "resume=auto", path=TINY)
    assert (config.seed, config.lora.r) == (0, 16)
    assert notes == [f"{tmp_path}/mine has no checkpoint to resume from; it is started anew with {TINY}, not its own config.yaml"]
    config, notes = job(tmp_path, "name=mine", "resume=auto", path=own)
    assert (config.seed, notes) == (7, [])


def test_a_name_without_a_run_says_with_which_file_it_is_started(tmp_path):
    for path in (None, TINY):
        config, notes = job(tmp_path, "name=new", "resume=auto", path=path, default=TINY)
        assert config.seed == 0 and notes == [f"{tmp_path}/new holds no run to resume; it is started with configs/tiny.yaml"]


def test_a_configuration_that_is_not_named_is_named_in_a_line(tmp_path):
    for default, supervised in ((None, False), (ROOT / "configs" / "tiny_sft.yaml", True)):
        _, notes = job(tmp_path, default=default, supervised=supervised)
        assert notes == [f"no --config is given, so the configuration is {'configs/tiny_sft.yaml' if default else 'configs/tiny.yaml'}"]
    assert job(tmp_path, path=TINY)[1] == []


def test_other_data_of_a_run_without_a_checkpoint_is_recognised_and_the_same_is_not(own, tmp_path):
    data = f"data.path={GSM8K}"
    config, notes = job(tmp_path, "name=mine", "resume=auto", data)
    assert config.seed == 7 and config.data.template == "{question}" and "the form of GSM8K" in notes[1]
    own.write_text(dump(replace(config, resume=None, data=replace(config.data, template="Q: {question}"))))
    config, notes = job(tmp_path, "name=mine", "resume=auto", data)
    assert config.data.template == "Q: {question}" and len(notes) == 1


# --- back to an earlier checkpoint


@pytest.fixture
def run(tmp_path):
    """A run with the checkpoints 1 to 4, of which 3 is the best, and what it has written after each step."""
    made = make_run(tmp_path / "runs" / "cc")
    config = load(TINY, ["name=cc", f"output_dir={tmp_path}/runs", "trainer.num_steps=9", "checkpoint.keep=9"])
    made = replace(made, config=config)
    (made.folder / "config.yaml").write_text(dump(config))
    kept = KeptAnswers(made.folder / "judge")
    (made.folder / "batches").mkdir()
    for step in range(4):
        kept.step = step
        kept.add(f"q{step}", "Score: 1")
        (made.folder / "batches" / f"step-{step:06d}-rank-0.json").touch()
        (made.folder / "batches" / f"step-{step:06d}-rank-0.safetensors").touch()
        assert checkpoint.save(made, step + 1, made.control)
    kept.close()
    (made.folder / "checkpoints" / "best").symlink_to("step-000003")
    (made.folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(4)))
    return made


@pytest.mark.parametrize("name, step", [("step-000002", 2), ("best", 3), ("step-000004", 4)])
def test_resume_takes_the_checkpoint_that_it_names(run, name, step, monkeypatch):
    named = run.folder / "checkpoints" / name
    monkeypatch.chdir(run.folder.parent)
    for resume in (named, f"cc/checkpoints/{name}", f"{named}/"):
        config = load_job(None, [f"resume={resume}"])
        start = look_up_start(config)
        assert (config.name, config.resume, start.step, start.goes_back) == ("cc", str(resume), step, True)
        assert start.folder.resolve() == run.folder and start.checkpoint.name == f"step-{step:06d}"
    for resume in (run.folder, "auto"):
        start = look_up_start(load_job(None, [f"resume={resume}", "name=cc", f"output_dir={run.folder.parent}"]))
        assert (start.step, start.goes_back) == (4, False)
    monkeypatch.chdir(run.folder / "checkpoints" / "step-000002")
    assert look_up_start(load_job(None, ["resume=."])).step == 2


def test_a_checkpoint_that_is_none_or_damaged_is_refused(run):
    folder = run.folder / "checkpoints"
    with pytest.raises(ConfigError, match=r"must be auto, force, null, or the folder of a run or of one of its checkpoints, of which .*/checkpoints holds step-000001, step-000002,"):
        load_job(TINY, [f"resume={folder}/step-000007"])
    for name in ("batches", "checkpoints/.step-000002.part", "checkpoints"):
        assert split_resume(str(run.folder / name)) is None
    (folder / "step-000002" / "meta.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"step-000002', but that checkpoint is damaged \(meta.json does not match its checksum\); name another"):
        look_up_start(load_job(None, [f"resume={folder}/step-000002"]))
    with pytest.raises(ConfigError, match="a resumed run keeps both"):
        load_job(None, [f"resume={folder}/step-000001", "name=other"])


def test_what_comes_after_the_checkpoint_is_discarded_and_named(run):
    later = "the checkpoints step-000003, step-000004"
    assert describe_later(run.folder, 2) == [later]
    assert discard_later(run.folder, 2) == [later, "the link checkpoints/best", "2 saved batches", "2 answers of the judge"]
    assert sorted(os.listdir(run.folder / "checkpoints")) == ["step-000001", "step-000002"]
    assert len(os.listdir(run.folder / "batches")) == 4
    answers = KeptAnswers(run.folder / "judge")
    assert [answers.get(f"q{step}") for step in range(4)] == ["Score: 1", "Score: 1", None, None]
    assert discard_later(run.folder, 2) == describe_later(run.folder, 2) == []


def test_what_cannot_be_removed_is_a_sentence(run, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("grpo_core.training.run_dir.shutil.rmtree", refuse)
    with pytest.raises(ConfigError, match="step-000004, which comes after 2 steps, cannot be removed: Permission denied"):
        discard_later(run.folder, 2)


@pytest.mark.slow
def test_a_run_goes_back_and_takes_the_same_steps_again(tmp_path, here):
    small = ["evaluation.num_tasks=4", "data.limit=200", "trainer.completions_per_step=16", "sampling.max_new_tokens=8", "engine.schedule=constant"]
    words = ["--config", TINY, *small, f"output_dir={tmp_path}", "name=back", "checkpoint.every=1", "checkpoint.keep=9", "trainer.num_steps=4"]
    assert here("train", *words).returncode == 0

    def rows():
        return [json.loads(line)["reward"] for line in (tmp_path / "back" / "metrics.jsonl").read_text().splitlines()]

    before, resume = rows(), f"resume={tmp_path}/back/checkpoints/step-000002"
    preview = here("train", resume, "--dry-run")
    assert "would be discarded: the checkpoints step-000003, step-000004, rows, saved batches" in preview.stdout, preview.stderr
    refused = here("train", resume, "seed=1")
    assert refused.returncode == 2 and rows() == before
    done = here("train", resume)
    assert done.returncode == 0, done.stderr
    assert "discarded, because resume names this checkpoint: the checkpoints step-000003, step-000004, the rows of 2 steps" in done.stdout
    assert f"run {tmp_path}/back: loading" in done.stdout and rows() == before
