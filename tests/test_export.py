"""The `export` command: what others load is what was trained, and the card tells the truth about it."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT
from forkserver import interpreter
from peft import PeftModel
from peft.tuners.lora.model import LoraModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_core.cli import main
from grpo_core.commands import export, model_card
from grpo_core.commands.export import compare
from grpo_core.commands.open_policy import open_source
from grpo_core.config.sections import LoraConfig, ModelConfig
from grpo_core.model.policy import load_policy
from grpo_core.schema import ConfigError

pytestmark = pytest.mark.slow
BASE = ROOT / "grpo_core" / "builtin" / "tiny"
TEXT = "Question: Ada has 7 boxes with 6 pens each and 15 loose pens, and sells 20. How many pens are left?\n"


@pytest.fixture
def run(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "tiny")
    return tmp_path / "tiny"


def logits(model, tokenizer):
    with torch.no_grad():
        return model.eval()(**tokenizer(TEXT, return_tensors="pt")).logits


def test_the_merged_model_is_base_and_adapter(run, capsys):
    assert main(["export", str(run)]) == 0
    out = capsys.readouterr().out
    folder = run / "export"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    before = logits(base, tokenizer)
    adapted = logits(PeftModel.from_pretrained(base, run / "adapter"), tokenizer)
    assert merged.dtype == torch.float32 and not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged, tokenizer), adapted, atol=1e-3, rtol=1e-4)
    assert (logits(merged, tokenizer) - before).abs().max() > 0.5  # it is not the base
    told = json.loads((folder / "export.json").read_text())["gap"]
    assert 0 < told["relative"] < 1e-5 and told["same_token"] == 1 and f"relative {told['relative']:.2g}" in out
    assert f"relative {told['relative']:.2g}" in (folder / "README.md").read_text()
    assert main(["export", str(run), "--dtype", "bf16"]) == 0  # in the place of the first
    rounded = json.loads((folder / "export.json").read_text())["gap"]
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert 1e-4 < rounded["relative"] < 0.03 and rounded["kl"] > told["kl"]


def test_a_merge_that_went_wrong_is_refused(run, capsys, monkeypatch):
    merge = LoraModel.merge_and_unload

    def wrong(self, *given, **named):
        model = merge(self, *given, **named)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(1.1)
        return model

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    assert main(["export", str(run)]) == 3
    captured = capsys.readouterr()
    assert "but fp32 explains 0.001 at most; not exported" in captured.err and "model: " not in captured.out
    assert not (run / "export").exists()


@pytest.mark.parametrize("tokens", [{"lm_head": [3, 5]}, {"embed_tokens": [3, 5], "lm_head": [7, 40]}, [3, 5]], ids=str)
def test_trained_tokens_of_a_tied_model_are_merged_and_compared(tokens, tmp_path):
    """Tokens of the head alone untie it; the embeddings of these tokens are in no text, so they are compared as well."""
    lora = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=tokens)
    policy = load_policy(ModelConfig(), lora, dtype=torch.float32, temperature=1.0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    policy.save(tmp_path / "adapter")
    opened = open_source(str(tmp_path / "adapter"), ["model.path=builtin:tiny", "model.precision=fp32"])
    named = tokens if isinstance(tokens, list) else sorted(i for ids in tokens.values() for i in ids)
    rows = export.choose_rows(opened)
    assert rows[-1].tolist() == named
    gaps = export.write_merged(opened, tmp_path / "merged", "fp32", rows)
    assert max(gap.relative for gap in gaps) < 1e-5
    merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), torch.tensor([[3, 5, 7, 40, 9, 3]])
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, plain.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    assert merged.config.tie_word_embeddings is isinstance(tokens, list)


CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM


class OwnConfig(Qwen2Config):
    model_type = "own"


class OwnModel(Qwen2ForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_code_of_its_own_is_exported(tmp_path, capsys):
    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "base" / "own_code.py").write_text(CODE)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    names = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": names}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    words = ["export", str(tmp_path / "base"), "--output", str(tmp_path / "out")]
    assert main([*words, "model.trust_remote_code=true"]) == 0
    out = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    torch.testing.assert_close(logits(model, tokenizer), logits(base, tokenizer))
    assert type(model).__name__ == "OwnModel" and (out / "README.md").read_text().count("trust_remote_code=True") == 2


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
def test_an_export_that_fails_leaves_no_files(error, tmp_path, monkeypatch):
    def fail(opened, folder, *others):
        (folder / "model.safetensors").touch()
        raise error

    monkeypatch.setattr(export, "write_merged", fail)
    with pytest.raises(ConfigError if error is OSError else error):
        export.run_export(str(BASE), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_written_model_that_cannot_be_loaded_is_a_sentence(tmp_path, monkeypatch):
    opened = open_source(str(BASE), ["model.precision=fp32"])
    monkeypatch.setattr(export, "apply_umask", lambda *files: files[0].write_bytes(b"broken"))
    with pytest.raises(ConfigError, match="the written model cannot be loaded: SafetensorError: .*; not exported"):
        export.write_merged(opened, tmp_path / "out", "fp32", export.choose_rows(opened))


def test_the_gap_of_known_logits():
    one = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    other = one + torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    gap = compare([one[:1], one[1:]], [other[:1], other[1:]])
    p, q = one.softmax(1), other.softmax(1)
    assert gap.largest == 2 and gap.same_token == 0.5 and gap.tokens == 2
    assert gap.relative == pytest.approx(2 / (2 + 14 / 3) ** 0.5)
    assert gap.kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()))
    assert compare([one], [one]).relative == 0


def test_the_adapter_is_pefts(run):
    assert main(["export", str(run), "--adapter", "--output", str(run.parent / "out")]) == 0
    settings = json.loads((run.parent / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "grpo_core/builtin/tiny"
    tokenizer = AutoTokenizer.from_pretrained(run.parent / "out")
    ours, theirs = (
        logits(
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), folder),
            tokenizer,
        )
        for folder in (run / "adapter", run.parent / "out")
    )
    assert torch.equal(ours, theirs)


def test_a_wrong_merge_that_bf16_would_hide_is_refused(run, capsys, monkeypatch):
    merge = LoraModel.merge_and_unload

    def wrong(self, *given, **named):
        model = merge(self, *given, **named)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(1.02)
        return model

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    assert main(["export", str(run), "--dtype", "bf16"]) == 3
    captured = capsys.readouterr()
    assert "but fp32 explains 0.001 at most; not exported" in captured.err
    assert 1e-3 < float(re.search(r"merged model .fp32.* relative (\S+),", captured.out)[1]) < export.MAX_ROUNDING_GAP["bf16"]


@pytest.mark.parametrize("kind", ["--merged", "--adapter"])
def test_the_cards_code_runs_and_answers_as_the_run_does(run, kind, environment):
    assert main(["export", str(run), kind]) == 0
    folder = run / ("export-adapter" if kind == "--adapter" else "export")
    card = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.S)[1].replace('"."', repr(str(folder)))
    done = subprocess.run(
        [interpreter(), "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    opened = open_source(str(run))
    from grpo_core.commands.sample import AnswerSettings, make_task

    task = make_task(opened, "What is 12 + 30?", AnswerSettings())
    assert ("base = \"grpo_core/builtin/tiny\"  # put the folder of the base model here" in code) is (kind == "--adapter")
    assert done.stdout.strip() == opened.sampler.generate([task], 1, greedy=True).completions[0].strip()


def test_the_card_tells_what_the_run_was(run, capsys):
    assert main(["evaluate", str(run), "--limit", "6", "--samples", "2"]) == 0
    assert "evaluating on 6 problems of builtin:word_problems (test)\n" in capsys.readouterr().out
    text = (run / "config.yaml").read_text().replace("path: builtin:word_problems", f"path: {run}/my_rows.jsonl")
    (run / "my_rows.jsonl").write_text('{"question": "q?", "answer": "1"}\n' * 50)
    (run / "config.yaml").write_text(text)
    assert main(["export", str(run)]) == 0
    card = (run / "export" / "README.md").read_text()
    assert str(run) not in card and str(ROOT) not in card and "- data: my_rows.jsonl, split train" in card
    result = json.loads((run / "evaluate" / "evaluate.json").read_text())
    last = json.loads((run / "evaluation.jsonl").read_text().splitlines()[-1])
    assert f"after (12 steps): accuracy {last['accuracy']:.1%} ({last['correct']} of 16" in card
    assert f"| greedy | {result['base']['greedy']['value']:.1%}"[:-1] + " % (" in card
    assert f"{result['paired']['won']} problems won" in card
    assert "answers of up to 48 tokens, and 2 samples per problem at temperature 1, with 95 % intervals" in card
    assert "- steps: 12 of 32 completions" in card and "-min(r A, clip(r, 1 - 0.2, 1 + 0.2) A)" in card
    assert card.startswith("---\n") and "library_name: transformers\n" in card and "base_model:" not in card


def test_an_evaluation_of_another_kind_is_not_on_the_card(run):
    """Neither other data, which has a folder of its own, nor answers that were cut off earlier than in the run."""
    (run.parent / "other.jsonl").write_text('{"question": "q?", "answer": "1"}\n' * 3)
    assert main(["evaluate", str(run), "--samples", "0", "--data", str(run.parent / "other.jsonl"), "--no-base"]) == 0
    assert (run / "evaluate-other" / "evaluate.json").exists() and not (run / "evaluate").exists()
    assert main(["evaluate", str(run), "--samples", "0", "--limit", "4", "--max-new-tokens", "3", "--no-base"]) == 0
    assert main(["export", str(run), "--adapter"]) == 0
    card = (run / "export-adapter" / "README.md").read_text()
    assert "- after (12 steps): accuracy" in card and "| greedy |" not in card


def test_an_evaluation_of_a_checkpoint_is_on_its_card_and_no_other(run):
    assert main(["evaluate", str(run / "checkpoints" / "step-000006"), "--samples", "0", "--limit", "4", "--no-base"]) == 0
    assert (run / "evaluate-step-000006" / "evaluate.json").exists() and not (run / "evaluate").exists()
    for source, on_card in ((run / "checkpoints" / "step-000006", True), (run, False)):
        folder = run.parent / f"card-{on_card}"
        assert main(["export", str(source), "--adapter", "--output", str(folder)]) == 0
        assert ("| greedy |" in (folder / "README.md").read_text()) is on_card


def test_attack_the_tokens_on_a_checkpoints_card_are_those_until_then(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for source, steps in ((run / "checkpoints" / "step-000006", 6), (run, 12)):
        folder = run.parent / f"card-{steps}"
        assert main(["export", str(source), "--adapter", "--output", str(folder)]) == 0
        tokens = sum(row["tokens"] for row in rows[:steps])
        assert f"- tokens: {tokens:,.0f} in " in (folder / "README.md").read_text()


def test_nothing_is_written_by_a_dry_run_and_nothing_else_is_overwritten(run, capsys):
    before = sorted(run.rglob("*"))
    assert main(["export", str(run), "--dry-run", "--push", "me/tiny"]) == 0
    out = capsys.readouterr().out
    assert sorted(run.rglob("*")) == before and "and https://huggingface.co/me/tiny:" in out and "library_name" in out
    size = float(re.search(r"model.safetensors +(\S+) MB in fp32", out)[1])
    assert main(["export", str(run)]) == 0
    assert (run / "export" / "model.safetensors").stat().st_size / 1e6 == pytest.approx(size, rel=0.01)
    mine = run.parent / "mine"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    assert main(["export", str(run), "--output", str(mine)]) == 2
    assert "holds files that are not an export" in capsys.readouterr().err and (mine / "thesis.txt").exists()
    assert main(["export", str(run), "--output", str(mine / "thesis.txt")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


def test_what_cannot_be_exported(run, capsys):
    assert main(["export", "builtin:tiny", "--adapter"]) == 2
    assert "is a whole model and has no adapter" in capsys.readouterr().err


class Hub:
    calls = []  # noqa: RUF012

    def create_repo(self, repository, **given):
        self.calls.append(("create", repository, given))

    def upload_folder(self, **given):
        self.calls.append(("upload", given))


def test_pushing(run, capsys, monkeypatch):
    assert main(["export", str(run), "--adapter", "--push", "me/tiny"]) == 2  # the tests are offline
    err = capsys.readouterr().err
    assert "--push me/tiny: the upload failed (" in err and "hf auth login" in err and len(err.splitlines()) == 1
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert main(["export", str(run), "--adapter", "--push", "me/tiny", "--private"]) == 0
    (create, upload) = Hub.calls
    assert create == ("create", "me/tiny", {"private": True, "exist_ok": True})
    assert upload[1]["folder_path"] == run / "export-adapter" and upload[1]["ignore_patterns"] == [export.MARK]


@pytest.mark.parametrize("template, prompt", {
    "Question: {question}\n": "Question: What is 12 + 30?\n", "{prompt}": "What is 12 + 30?", "{problem}\n\\boxed{{}}": "What is 12 + 30?\n\\boxed{}",
    "{a} and {b}": None, "go on": None,
}.items())  # fmt: skip
def test_the_example_of_a_card_stands_in_the_only_column_of_the_template(template, prompt):
    assert model_card._fill_with_example(template) == prompt
