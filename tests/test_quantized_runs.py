"""Runs whose base is in 4 bits: trained, resumed, evaluated, exported and refused through the command line."""

import json
import shutil
import sys
import weakref

import pytest
import torch
from conftest import ROOT, group_of_one
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from grpo_core.cli import main
from grpo_core.config.sections import ModelConfig
from grpo_core.model import policy, quantized_loading
from grpo_core.model.base_model import load_base_model
from grpo_core.model.quantized import dequantize, find_quantized, is_installed, is_quantized, quantize, to_plain
from grpo_core.schema import ConfigError

BASE = ROOT / "grpo_core" / "builtin" / "tiny"
CONFIG = ["--config", str(ROOT / "configs" / "tiny.yaml")]
NF4 = "model.quantize=nf4"
SHORT = [
    "evaluation.num_tasks=8", "data.limit=200", "trainer.completions_per_step=32", "sampling.max_new_tokens=24", "log.every=1",
    "trainer.num_steps=4", "checkpoint.every=2",
]  # fmt: skip
TEXT = "Question: Ada has 7 boxes with 6 pens each and 15 loose pens, and sells 20. How many pens are left?\n"
needs_package = pytest.mark.skipif(not is_installed(), reason="needs bitsandbytes")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of 4 steps in 4 bits; tests read it."""
    folder = tmp_path_factory.mktemp("runs")
    with group_of_one():
        assert main(["train", *CONFIG, f"output_dir={folder}", NF4, *SHORT]) == 0
    return folder / "tiny"


def read(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per", "peak"))} for row in rows]


def compute_logits(model, folder=BASE):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model.eval()(**tokenizer(TEXT, return_tensors="pt").to(model.device)).logits.cpu()


def load(dtype=torch.float32, **settings):
    return load_base_model(ModelConfig(**{"path": str(BASE), "quantize": "nf4", **settings}), dtype)


@needs_package
def test_a_resumed_run_is_bitwise_the_run_left_alone(run, tmp_path, here):
    cut = tmp_path / "tiny"
    shutil.copytree(run, cut)
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    shutil.rmtree(cut / "adapter")
    done = here("train", *CONFIG, f"output_dir={tmp_path}", NF4, *SHORT, "resume=auto")
    assert done.returncode == 0 and "after 2 steps" in done.stdout, done.stderr
    for name in ("metrics", "completions", "evaluation"):
        assert read(cut / f"{name}.jsonl") == read(run / f"{name}.jsonl")
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (cut, run))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@needs_package
def test_the_sampler_computes_as_the_trainer_does(run):
    assert all(row["logprob_gap"] < 1e-3 for row in read(run / "metrics.jsonl"))


@needs_package
def test_the_adapter_works_on_the_base_in_4_bits_alone(run, capsys):
    """The exported adapter, on a base that bitsandbytes quantises, as the card's code loads it."""
    assert main(["export", str(run), "--adapter", "--output", str(run.parent / "adapter_out")]) == 0
    card = (run.parent / "adapter_out" / "README.md").read_text()
    assert "The weights of the base's layers were in 4 bits (nf4 with double quantisation) in training." in card
    assert 'bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True' in card
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    ours, whole = (compute_logits(PeftModel.from_pretrained(base, run / "adapter")) for base in (load(), plain))
    to_plain(base := load(), torch.float32)
    torch.testing.assert_close(ours, compute_logits(PeftModel.from_pretrained(base, run / "adapter")), atol=1e-4, rtol=1e-4)
    assert (ours - whole).abs().max() > 0.01


@needs_package
def test_the_merged_model_has_the_dequantised_weights(run, capsys):
    assert main(["export", str(run), "--output", str(run.parent / "merged_out")]) == 0
    folder, out = run.parent / "merged_out", capsys.readouterr().out
    gap = json.loads((folder / "export.json").read_text())["gap"]
    assert 0 < gap["relative"] < 1e-3 and gap["same_token"] == 1 and f"relative {gap['relative']:.2g}" in out
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    want = compute_logits(PeftModel.from_pretrained(load(), run / "adapter"))
    torch.testing.assert_close(compute_logits(merged, folder), want, atol=1e-3, rtol=1e-3)
    card = (folder / "README.md").read_text()
    assert "in 4 bits (nf4 with double quantisation) in training, which were then dequantised" in card


@needs_package
def test_a_run_in_4_bits_is_evaluated_and_asked(run, tmp_path, capsys):
    assert main(["evaluate", str(run), "--limit", "8", "--samples", "2", "--output", str(tmp_path / "e")]) == 0
    assert main(["sample", str(run), TEXT]) == 0


@needs_package
@pytest.mark.parametrize("double", [True, False])
def test_the_weights_depend_on_the_files_alone(tmp_path, double):
    """Not on the dtype of the run: they are quantised from the values of the files, which are in float32 here."""
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1 + 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    plain.save_pretrained(tmp_path)
    models = [load(dtype, path=str(tmp_path), double_quant=double) for dtype in (torch.float32, torch.bfloat16)]
    for name in find_quantized(models[0]):
        want = quantize(plain.get_submodule(name).weight.to(models[0].device), double)
        for model in models:
            layer = model.get_submodule(name)
            assert torch.equal(layer.weight, want.packed), name
            pairs = zip(layer.scales.tensors(), want.scales.tensors(), strict=True)
            assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    names = {name.rpartition(".")[2] for name in find_quantized(models[0])}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert models[1].lm_head.weight.dtype == models[1].model.layers[0].input_layernorm.weight.dtype == torch.bfloat16


@needs_package
def test_loading_holds_one_whole_weight_at_a_time(monkeypatch):
    alive, most = [], []

    def counted(weight, double):
        alive.append(weakref.ref(weight))
        most.append(sum(x().numel() for x in alive if x() is not None))
        return quantize(weight, double)

    monkeypatch.setattr(quantized_loading, "quantize", counted)
    model = load()
    sizes = [layer.in_features * layer.out_features for layer in find_quantized(model).values()]
    assert len(most) == len(sizes) == 14 and max(most) == max(sizes)


@needs_package
@pytest.mark.parametrize("kind, double", [("nf4", True), ("nf4", False), ("fp4", False)])
def test_a_folder_that_bitsandbytes_has_quantised_is_used_as_it_is(tmp_path, kind, double, monkeypatch, capsys):
    from bitsandbytes import functional

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.float32
    )
    theirs = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, quantization_config=settings, device_map="cpu")
    theirs.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path)
    model = load(path=str(tmp_path), quantize=None)
    layers = find_quantized(model)
    assert len(layers) == 14 and not getattr(model, "is_loaded_in_4bit", False)
    for name, layer in layers.items():
        weight = theirs.get_submodule(name).weight
        assert torch.equal(layer.weight.view(-1).cpu(), weight.data.view(-1)) and layer.quantized.scales.kind == kind
        want = functional.dequantize_4bit(weight.data, weight.quant_state)
        torch.testing.assert_close(dequantize(layer.quantized, torch.float32).cpu(), want, atol=1e-6, rtol=1e-5)
    assert quantized_loading.describe_quantization(model) == (f"{kind} with double quantisation" if double else kind)
    words = ["train", *CONFIG, f"model.path={tmp_path}", f"output_dir={tmp_path / 'runs'}", *SHORT, "trainer.num_steps=1"]
    if kind == "nf4" and double:
        with group_of_one():
            assert main(words) == 0
        loads = []
        monkeypatch.setattr(policy, "load_base_model", lambda *words: loads.append(words))
        assert main([*words, "lora.r=0", "loss.kl_coef=0", "overwrite=true"]) == 2 and not loads
        assert f"whose weights are {kind} with double quantisation, but lora.r is 0" in capsys.readouterr().err
    else:
        other = "false" if double else "true"
        with pytest.raises(ConfigError, match=f"already quantised .{kind}.*but model.quantize is nf4 and model.double_quant is {other}"):
            load(path=str(tmp_path), double_quant=not double)


@needs_package
def test_a_dry_run_counts_the_bytes_of_4_bits(here, tmp_path):
    done = here("train", *CONFIG, f"output_dir={tmp_path}", NF4, *SHORT, "--dry-run")
    assert done.returncode == 0, done.stderr
    model = load()
    size = sum(layer.quantized.bytes for layer in find_quantized(model).values())
    size += sum(4 * p.numel() for p in model.parameters() if p.is_floating_point())
    assert "products in nf4 with double quantisation" in done.stdout, done.stdout
    assert not (tmp_path / "tiny").exists() and is_quantized(model) and size < 4e6


@needs_package
@pytest.mark.parametrize("words, sentence", [
    ([NF4, "lora.r=0", "loss.kl_coef=0"], "model.quantize is nf4, but lora.r is 0; weights in 4 bits are frozen, so set lora.r above 0"),
    ([NF4, "lora.use_dora=true"], "model.quantize is nf4, but lora.use_dora is true, which needs whole weights; set it to false"),
    (["model.double_quant=false"], "model.double_quant is false, but model.quantize is null, so nothing is quantised"),
    (["model.quantize=int8"], "model.quantize is 'int8'"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_a_sentence(words, sentence, here, tmp_path):
    done = here("train", *CONFIG, f"output_dir={tmp_path}", *words)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_without_bitsandbytes_a_sentence_says_how_to_install_it(here, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    done = here("train", *CONFIG, f"output_dir={tmp_path}", NF4, *SHORT)
    assert done.returncode == 2 and not (tmp_path / "tiny").exists()
    assert done.stderr.strip().splitlines()[-1].endswith(
        "model.quantize is nf4, which needs bitsandbytes, which is not installed: pip install -e '.[four_bit]'"
    )
    with pytest.raises(ConfigError, match="needs bitsandbytes"):
        load()


def test_values_of_quantised_weights_are_finite():
    pytest.importorskip("bitsandbytes")
    weight = torch.zeros(4, 64)
    assert torch.equal(dequantize(quantize(weight), torch.float32), weight)
