"""`train --dry-run`: what it says is what the run then does, and every shipped configuration can be looked at so."""

import json
import re
import shutil

import pytest
from conftest import ROOT

from grpo_core.cli import main
from grpo_core.config.files import load
from grpo_core.model.quantized import is_installed
from grpo_core.schema import ConfigError

pytestmark = pytest.mark.slow
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SMALL = [  # in place of what a hub has
    "model.path=builtin:tiny", "data.path=builtin:word_problems", "data.subset=null", "data.eval_split=null",
    "sampling.max_new_tokens=16", "data.limit=2000", "data.max_prompt_tokens=256", "lora.target_modules=all-linear",
]  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_loaded_and_shown(path, tmp_path, monkeypatch, capsys, tiny_run):
    monkeypatch.chdir(tmp_path)
    config = load(path)
    assert config.name == path.stem
    if "tiny_sft" in path.stem:
        return
    if config.model.quantize and not is_installed():
        pytest.skip("needs bitsandbytes")
    needs = [f"teacher.adapter={tiny_run / 'adapter'}"] if config.teacher.adapter else []  # that of a finished run
    assert main(["launch", "--processes", "2", "--config", str(path), "--dry-run", *SMALL, *needs]) == 0
    out = capsys.readouterr().out
    trainer, sampling = config.trainer, config.sampling
    prompts = trainer.completions_per_step // 2 // sampling.group_size
    assert (
        f"{trainer.completions_per_step:,} completions per step = 2 processes × {prompts} prompts × {sampling.group_size}" in out
    )
    assert f"    ({config.loss.name})" in out and (f"({config.advantage.name})" in out or not config.rewards)
    reward = "reward " if config.rewards else ""
    assert f"({sampling.group_size})  {reward}" in out and f"({sampling.group_size + 1})" not in out
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("path", [path for path in CONFIGS if "base:" in path.read_text()], ids=lambda path: path.stem)
def test_a_configuration_on_a_base_is_a_short_difference(path):
    keys = [line for line in path.read_text().splitlines() if re.match(r"\s*[\w-]+:", line)]
    assert len(keys) <= 25 and load(path) != load(ROOT / "configs" / "gsm8k_qwen2.5_1.5b.yaml")


def test_what_it_says_is_what_the_run_does(tiny_run, capsys):
    given = ["trainer.num_steps=12", "trainer.completions_per_step=64", f"output_dir={tiny_run.parent}"]
    assert main(["train", "--config", str(ROOT / "configs" / "tiny.yaml"), "--dry-run", *given]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in (tiny_run / "completions.jsonl").read_text().splitlines()]
    group = [row for row in rows if row["step"] == 0][:8]
    shown = re.findall(r"^  \((\d)\)  reward (\S+) \(.*\), (\d+) tokens", out, re.M)
    assert [(int(i), float(reward), int(length)) for i, reward, length in shown] == [
        (row["sample"] + 1, row["reward"], row["length"]) for row in group
    ]
    assert group[0]["prompt"].strip() in out and "64 completions per step = 1 process × 8 prompts × 8" in out
    assert "12 steps = 0.0048 epochs of 20,000 prompts" in out and "12 optimizer steps in total" in out
    assert "which already holds a run (set resume=auto" in out
    assert "116,736 trained parameters" in out and "0.47 MB gradients" in out  # 4 bytes each
    assert (
        "at most 9.44 MB keys and values while sampling 64 completions of 48 + 48 tokens" in out
    )  # 2 × 2 × 96 × 4 bytes
    assert "in the update of one completion of 96 tokens" in out and out.count("a card with 6 GB suffices") == 1


def test_a_mistake_is_said_before_the_weights_load(capsys):
    assert main(["launch", "--processes", "3", "--config", str(ROOT / "configs" / "tiny.yaml"), "--dry-run"]) == 2
    assert "must be a multiple of sampling.group_size × processes" in capsys.readouterr().err


def test_a_base_may_stand_on_a_base_and_not_on_itself(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 3\nloss: {kl_coef: 0.5, average: token}\nengine: {deepspeed: ds.json}\n")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.yaml").write_text("base: ../a.yaml\npreset: dr_grpo\nloss: {kl_coef: 0.25}\n")
    (tmp_path / "sub" / "c.yaml").write_text("base: b.yaml\nname: c\n")
    config = load(tmp_path / "sub" / "c.yaml", ["seed=4"])
    # the file over its preset over its base: kl_coef is b's, the average the preset's
    assert (config.seed, config.loss.kl_coef, config.loss.average, config.name) == (4, 0.25, "constant", "c")
    assert config.engine.deepspeed == {
        "zero_optimization": {"stage": 1}
    }  # the file beside the configuration that names it
    (tmp_path / "a.yaml").write_text("base: sub/c.yaml\n")
    with pytest.raises(ConfigError, match="is its own base"):
        load(tmp_path / "a.yaml")
    (tmp_path / "d.yaml").write_text("base: nowhere.yaml\n")
    with pytest.raises(ConfigError, match="cannot read .*nowhere.yaml"):
        load(tmp_path / "d.yaml")


@pytest.fixture
def half_run(tiny_run, tmp_path):
    """Copy the short run as it was after 6 of its 12 steps."""
    folder = tmp_path / "runs" / "tiny"
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("step-000012", "adapter"))
    return folder


def dry_run(*words):
    return main(["train", "--config", str(ROOT / "configs" / "tiny.yaml"), "--dry-run", *words])


def test_attack_4_a_dry_run_of_a_resumed_run_shows_its_next_step(half_run, capsys):
    files = sorted(half_run.rglob("*"))
    rows = [json.loads(line) for line in (half_run / "completions.jsonl").read_text().splitlines()]
    group = [row for row in rows if row["step"] == 6][:8]
    for words in ([f"resume={half_run}"], ["resume=auto", f"output_dir={half_run.parent}"]):
        assert dry_run(*words) == 0
        out = capsys.readouterr().out
        shown = re.findall(r"^  \((\d)\)  reward (\S+) \(.*\), (\d+) tokens", out, re.M)
        assert [(int(i), float(reward), int(length)) for i, reward, length in shown] == [
            (row["sample"] + 1, row["reward"], row["length"]) for row in group
        ]
        assert f"resumed from {half_run}/checkpoints/step-000006 after 6 steps: 6 steps are left" in out
        assert "First prompt of step 7," in out and group[0]["prompt"].strip() in out
        assert f"the run folder would be {half_run}, and the run in it would be continued." in out
    assert sorted(half_run.rglob("*")) == files


@pytest.mark.parametrize("word, sentence", [
    ("lora.r=4", "because the configuration differs: lora.r (16 in the checkpoint, 4 now)"),
    ("trainer.num_steps=5", "trainer.num_steps is 5, but the run in {} has taken 6 steps"),
])  # fmt: skip
def test_attack_4_a_dry_run_refuses_to_resume_what_train_refuses(half_run, capsys, word, sentence):
    assert dry_run(f"resume={half_run}", word) == 2
    assert sentence.format(half_run) in capsys.readouterr().err


def test_attack_4_a_dry_run_of_a_finished_a_replaced_or_a_running_run(tiny_run, half_run, capsys, monkeypatch):
    assert dry_run(f"resume={tiny_run}") == 0
    out = capsys.readouterr().out
    assert "after 12 steps: there are no more to take" in out and "First prompt" not in out and "One group" not in out
    assert dry_run("overwrite=true", f"output_dir={half_run.parent}") == 0
    assert f"{half_run}, and the run in it would be replaced." in capsys.readouterr().out

    def refuse(folder):
        raise ConfigError(f"{folder} is being written")

    monkeypatch.setattr("grpo_core.monitor.run_lock.check_not_written", refuse)
    for word in ("overwrite=true", "resume=auto"):
        assert dry_run(word, f"output_dir={half_run.parent}") == 2
        assert "is being written" in capsys.readouterr().err
