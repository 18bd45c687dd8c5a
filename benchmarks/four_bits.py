"""Measure weights in 4 bits on a GPU: what fits into how much memory, and the time of a step, next to bf16.

    python benchmarks/four_bits.py [--limit SECONDS] [--models FOLDER] [--keep] [ROW ...]    on a GPU
    python benchmarks/four_bits.py --check [ROW ...]       tiny shapes on a CPU, by default one row of each kind; records nothing
    python benchmarks/four_bits.py one KIND JOB.json       one side in this process; the other commands start it

Without ROW all rows are measured, the most important first. Each is one JSON line, which replaces the row of the same name in
benchmarks/results/four_bits.json. A row may take SECONDS; a training run that takes longer gives the steps that it has done by then.
The models have random weights, in folders that are made when they are first needed, and deleted after the last row that needs them
unless --keep is given: in bf16, or directly in the format of bitsandbytes, layer by layer, for shapes that would not fit on a disk.
400 tokens of the vocabulary end a completion in the rows whose completions have various lengths. A process is limited by
torch.cuda.set_per_process_memory_fraction, so a limit holds for all tensors, and not for the 0.5 GB of CUDA itself.

- `decode_7b`: the sampler, 32 and 64 rows, 128 tokens of prompt and 256 new, nf4 against bf16.
- `update_7b`: the update of 64 completions of 256 tokens, nf4 against bf16.
- `card_7b`, `card_3b`, `card_1.5b`: configs/gpu_8gb_7b.yaml and gpu_8gb_3b.yaml in 7.5 GB, and 1.5B in 3.0 GB.
- `step_1.5b`: a step of 64 completions of 256 tokens in 7.5 GB.
- `card_14b`, `card_32b`: 5 steps in 15 GB and, with configs/gpu_24gb_32b.yaml, in 23 GB.
- `two_7b`: 2 GPUs, 7.5 GB each, twice the completions, against one.
- `product`: the Triton product with several divisions among programs, against torch's product in bf16.
"""

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
OUT = ROOT / "benchmarks" / "results" / "four_bits.json"
QWEN2 = {"vocab_size": 151_936, "tie_word_embeddings": True}
QWEN3 = {"vocab_size": 151_936, "tie_word_embeddings": False, "head_dim": 128, "num_key_value_heads": 8, "hidden_size": 5120}
SHAPES = {  # model type and sizes as on the models' cards
    "1.5b": ("qwen2", QWEN2 | {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    }),
    "3b": ("qwen2", QWEN2 | {
        "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
    }),
    "7b": ("qwen2", {
        "vocab_size": 152_064, "tie_word_embeddings": False, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    }),
    "14b": ("qwen3", QWEN3 | {"intermediate_size": 17_408, "num_hidden_layers": 40, "num_attention_heads": 40}),
    "32b": ("qwen3", QWEN3 | {"intermediate_size": 25_600, "num_hidden_layers": 64, "num_attention_heads": 64}),
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
NUM_ENDS = 400
PROMPT, NEW, GROUP = 128, 256, 8
FILE_BYTES = 4e9  # of a file with weights that are made directly
CHECK = "--check" in sys.argv


# models


def make_config(name):
    """Return the configuration of a shape; with --check a tiny one of its family."""
    from transformers import AutoConfig

    kind, sizes = SHAPES[name]
    ids = {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": None, "max_position_embeddings": 32_768}
    config = AutoConfig.for_model(kind, **(sizes | (TINY if CHECK else {}) | ids))
    config.dtype = "bfloat16"
    return config


def make_base(name, quantize=False):
    """Return a model with random weights on this machine's device, its layers in bf16 or in 4 bits."""
    import torch
    from transformers import AutoModelForCausalLM

    from grpo_core.model.quantized import QuantizedLinear
    from grpo_core.model.quantized import quantize as quantize_weight
    from grpo_core.model.quantized_loading import find_quantizable

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        base = AutoModelForCausalLM.from_config(make_config(name), dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    for path in find_quantizable(base) if quantize else ():
        plain = base.get_submodule(path)
        layer = QuantizedLinear(plain.in_features, plain.out_features, plain.bias is not None, torch.bfloat16, plain.weight.device)
        layer.quantized, layer.bias = quantize_weight(plain.weight), plain.bias
        base.set_submodule(path, layer.requires_grad_(False))
    return base


def make_folder(models, name, direct, num_ends):
    """Return a folder with a model of random weights, in bf16 or directly in the format of bitsandbytes."""
    import torch
    from transformers import AutoTokenizer

    folder = models / f"{name}-{'nf4' if direct else 'bf16'}-{num_ends}"
    if (folder / "done").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if direct:
        write_quantized(name, folder)
    else:
        make_base(name).save_pretrained(folder)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    ends = list(range(1, 1 + num_ends)) if num_ends > 1 else 1
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "pad_token_id": 0}))
    AutoTokenizer.from_pretrained(ROOT / "grpo_core" / "builtin" / "tiny").save_pretrained(folder)
    (folder / "done").touch()
    return folder


def write_quantized(name, folder):
    """Write random weights as bitsandbytes saves them: nf4 with double quantisation, one weight after another."""
    import torch
    from bitsandbytes import functional
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from grpo_core.model.quantized_loading import find_quantizable

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = make_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    in_4_bits, tied = {f"{path}.weight" for path in find_quantizable(model)}, config.tie_word_embeddings
    generator = torch.Generator(device).manual_seed(0)
    files, part, total = {}, {}, 0

    def flush():
        file = f"model-{len(set(files.values())) + 1:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        files.update(dict.fromkeys(part, file))
        part.clear()

    for key, parameter in model.named_parameters():
        if tied and key == "lm_head.weight":
            continue
        value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        value = value.normal_(0, 0.02, generator=generator) if parameter.dim() > 1 else value.fill_("norm" in key)
        if key in in_4_bits:
            packed, state = functional.quantize_4bit(value, blocksize=64, compress_statistics=True, quant_type="nf4")
            part |= {key: packed.cpu(), **{f"{key}.{k}": v.cpu() for k, v in state.as_dict(packed=True).items()}}
        else:
            part[key] = value.cpu()
        if sum(x.numel() * x.element_size() for x in part.values()) > FILE_BYTES:
            flush()
    flush()
    total = sum((folder / file).stat().st_size for file in set(files.values()))
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    ).to_dict()
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


# one side, in a process of its own


def run_training(job):
    """Train; the rows of the metrics are in the run's folder."""
    import update

    import grpo_core.training.setup as setup
    from grpo_core.training.trainer import train

    run, _ = setup.setup(update.make_config(job, Path(job["out"])))
    memory = compare_memory(run)
    (Path(job["out"]) / "memory.json").write_text(json.dumps(memory))
    train(run)
    run.log.close()
    return {"trained": sum(p.numel() for p in run.policy.parameters())}


def compare_memory(run):
    """Return the bytes that the dry run computes, and on a GPU those of the weights and of an update of one completion."""
    import torch

    from grpo_core.model.memory import _Trial
    from grpo_core.model.memory_estimate import estimate
    from grpo_core.model.update_mode import enable_gradient_checkpointing

    config, model, longest = run.config, run.policy.causal_lm, (16 if CHECK else PROMPT, run.config.sampling.max_new_tokens)
    parts = estimate(model, longest=longest, group_size=config.sampling.group_size, adapter_on_gpu=False)
    result = {"computed": {**vars(parts), "needed": parts.needed}}
    if torch.cuda.is_available():
        if config.model.gradient_checkpointing is True:  # as the estimate supposes
            enable_gradient_checkpointing(model)
            trial = _Trial(config, run.policy, longest, config.sampling.group_size)
            result["measured_update"] = trial._measure_peak(1, backward=True)
        result["measured_weights_and_adapter"] = torch.cuda.memory_allocated()
    return result


def run_decode(job):
    """Return the milliseconds of a token step for each number of rows."""
    import sampling
    import torch

    from grpo_core.config.sections import LoraConfig, ModelConfig
    from grpo_core.model.policy import wrap
    from grpo_core.sampling.sampler import Sampler

    base = make_base(job["shape"], job["side"] == "nf4")
    policy = wrap(base, ModelConfig(), LoraConfig(), temperature=1.0)
    with torch.no_grad():
        for key, parameter in policy.model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.02)
    result, new, prompt = {}, *((4, 16) if CHECK else (NEW, PROMPT))
    for rows in job["rows"]:
        notes = []
        sampler = Sampler(policy.causal_lm, sampling.StubTokenizer(), max_new_tokens=new, notify=notes.append)
        tasks = sampling.make_tasks(max(1, rows // GROUP), prompt, base.config.vocab_size)
        seconds, _ = sampling.measure(lambda: sampler.generate(tasks, min(rows, GROUP)), 1)  # noqa: B023
        first, (seconds, _) = seconds, sampling.measure(lambda: sampler.generate(tasks, min(rows, GROUP)))  # noqa: B023
        reserved = torch.cuda.max_memory_reserved() / 1e9 if sampling.GPU else None
        result[str(rows)] = {
            "ms": 1e3 * seconds / new, "first_call_seconds": first, "decoder": sampler.decoder_name, "notes": notes[-2:],
            "reserved_gb": reserved,
        }  # fmt: skip
    return result


def run_product(job):
    """Return microseconds of products of the 7B shape, with the best division among programs that was tried."""
    import torch
    import torch.nn.functional as F

    from grpo_core.model.quantized import quantize
    from grpo_core.sampling.kernels import four_bit_kernels as kernels

    results, deadline = [], time.time() + job["limit"] - 60
    for label, outputs, inputs in (("gate_up", 37_888, 3584), ("down", 3584, 18_944), ("qkv", 4608, 3584), ("o", 3584, 3584)):
        count = math.ceil(3e8 / (outputs * inputs / 2))  # copies, so that no weight is in the cache when it is read
        plain = [torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        weights = [quantize(weight) for weight in plain]
        for rows in (32, 64, 16, 1):
            x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
            result = {
                "weight": label, "rows": rows, "bf16_us": time_replay(F.linear, [(x, weight) for weight in plain]),
                "as_set_us": time_replay(kernels.multiply, [(x, weight, None, None) for weight in weights]),
            }  # fmt: skip
            if label in ("gate_up", "down"):
                times = tune(x, weights, deadline)
                best = sorted(((t, tuple(settings)) for settings, t in times.items()), key=lambda pair: pair[0])[:6]
                result |= {"tried": len(times), "best": [[round(t, 1), str(settings)] for t, settings in best]}
            results.append(result)
            print(json.dumps(result), file=sys.stderr, flush=True)
    return results


def tune(x, weights, deadline):
    """Return the microseconds of the Triton product by its settings, of which one after another is improved."""
    from grpo_core.sampling.kernels import four_bit_kernels as kernels

    times, best = {}, kernels.Settings()
    for field, values in CHOICES.items():
        choices = [best._replace(**{field: value}) for value in values]
        for settings in choices:
            if settings in times or time.time() > deadline:
                continue
            try:
                times[settings] = time_replay(kernels.multiply, [(x, weight, None, None, settings) for weight in weights])
            except Exception as error:  # it needs more shared memory than there is
                print(settings, str(error)[:200], file=sys.stderr)
                times[settings] = math.inf
        best = min(choices, key=lambda settings: times.get(settings, math.inf))
    return times


CHOICES = {
    "lookup": ("gather", "load", "select"), "stages": (2, 3, 4, 5), "outputs": (32, 64, 128), "blocks": (1, 2, 4), "warps": (2, 4, 8),
    "splits": (None, 1, 2, 4, 8),
}  # fmt: skip


def time_replay(function, arguments):
    """Return the microseconds of a call in a CUDA graph that calls the function with each of these arguments."""
    import torch

    for words in arguments:
        function(*words)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for words in arguments:
            function(*words)
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(arguments))
    return statistics.median(times)


KINDS = {"train": run_training, "decode": run_decode, "product": run_product}


def start(kind, job, limit, processes=1):
    """Run one side in processes of its own; return its result, None if it ran out of time, and the end of its errors."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job, default=str))
        words = [sys.executable, __file__, "one", kind, str(file), *(["--check"] if CHECK else [])]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
        shared["LOCAL_WORLD_SIZE"] = str(processes)
        started = []
        for rank in range(processes):
            environment = {**os.environ, **(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})}
            with open(Path(folder) / f"{rank}.out", "wb") as out, open(Path(folder) / f"{rank}.err", "wb") as err:
                started.append(subprocess.Popen(words, stdout=out, stderr=err, env=environment))
        deadline = time.time() + limit
        try:
            codes = [process.wait(max(1.0, deadline - time.time())) for process in started]
        except subprocess.TimeoutExpired:
            codes = [None]
        for process in started:
            process.kill()
            process.wait()
        errors = "\n".join((Path(folder) / f"{rank}.err").read_text()[-3000:] for rank in range(processes))
        lines = (Path(folder) / "0.out").read_text().splitlines()
        result = json.loads(lines[-1]) if codes == [0] * processes and lines else None
        return result, "" if result is not None else "ran out of time" if codes == [None] else errors


# rows


class Rows:
    """The rows by name, and what they share: the folder of models and the limit of time."""

    def __init__(self, models, limit):
        self.models, self.limit = models, limit

    def decode_7b(self):
        rows = [8] if CHECK else [32, 64]
        sides = {side: start("decode", {"side": side, "shape": "7b", "rows": rows}, self.limit / 2) for side in ("nf4", "bf16")}
        ours, peer = (sides[side][0] or {} for side in ("nf4", "bf16"))
        first = str(rows[0])
        return make_row(
            "a token step of Qwen2.5-7B's shape, 32 rows, 128 tokens of prompt and 256 new", ours.get(first, {}).get("ms"), "ms",
            "at most 1.0 of bf16", lambda value, other: value <= other, peer.get(first, {}).get("ms"), "bf16 on the same card",
            {"nf4": ours, "bf16": peer, "errors": [error for _, error in sides.values() if error]},
        )  # fmt: skip

    def update_7b(self):
        sides = {
            side: self.train("7b", {"steps": 4}, overrides=[f"model.quantize={quantize}"], limit=self.limit / 2)
            for side, quantize in (("nf4", "nf4"), ("bf16", "null"))
        }
        ours, peer = (sides[side].get("phases", {}).get("seconds/update") for side in ("nf4", "bf16"))
        return make_row(
            "the update of Qwen2.5-7B's shape, 64 completions of 256 tokens", ours, "s", "at most 1.3 of bf16",
            lambda value, other: value <= 1.3 * other, peer, "bf16 on the same card", sides,
        )  # fmt: skip

    def card_7b(self):
        return self.card("7b", "gpu_8gb_7b", 7.5, 20, 768)

    def card_3b(self):
        return self.card("3b", "gpu_8gb_3b", 7.5, 20, 2048)

    def card_1_5b(self):
        return self.card("1.5b", "gpu_8gb_3b", 3.0, 20, 1024)

    def card_14b(self):
        return self.card("14b", "gpu_24gb_32b", 15.0, 5, 256, direct=True)

    def card_32b(self):
        return self.card("32b", "gpu_24gb_32b", 23.0, 5, 256, direct=True)

    def step_1_5b(self):
        run = self.train("1.5b", {"steps": 6}, cap=7.5, overrides=["model.quantize=nf4"])
        ours, memory = run.get("seconds"), run.get("reserved_gb")
        return make_row(
            "a step of Qwen2.5-1.5B's shape in 7.5 GB, 64 completions of 256 tokens", ours, "s",
            "at most a fifth of Unsloth's time, in less than its 4.98 GB",
            lambda value, other: 5 * value <= other and memory is not None and memory < 4.98, 14.0,
            "Unsloth 2026.10.9, the same shape in 7.5 GB, measured by itself", run,
        )  # fmt: skip

    def two_7b(self):
        import torch

        if not CHECK and torch.cuda.device_count() < 2:
            return make_row("2 GPUs", None, "s", "at most 1.08 of the time of one", None, detail={"errors": "this machine has no second GPU"})
        sides = [
            self.train("7b", {"steps": 4}, config="gpu_8gb_7b", cap=7.5, processes=count, limit=self.limit / 2, overrides=[
                "sampling.max_new_tokens=256", f"trainer.completions_per_step={64 * count}",
            ]) for count in (1, 2)
        ]  # fmt: skip
        return make_row(
            "a step of Qwen2.5-7B's shape on 2 GPUs, 7.5 GB each, 128 completions of 256 tokens", sides[1].get("seconds"), "s",
            "at most 1.08 of the time of one GPU with 64", lambda value, other: value <= 1.08 * other, sides[0].get("seconds"),
            "one GPU, 64 completions", {"one": sides[0], "two": sides[1]},
        )  # fmt: skip

    def product(self):
        if CHECK:  # the kernel needs a GPU
            return make_row("products of Qwen2.5-7B's shape", None, "us", None, None)
        result, error = start("product", {"limit": self.limit}, self.limit)
        first = result[0] if result else {}
        return make_row(
            "x Wᵀ for gate and up of Qwen2.5-7B's shape, 32 rows", first.get("as_set_us"), "us", None, None, first.get("bf16_us"),
            "torch's product in bf16", {"products": result, "errors": error},
        )  # fmt: skip

    def card(self, shape, config, cap, steps, new, direct=False):
        """Train a configuration in a limited process, with completions of all lengths up to `new` tokens."""
        num_ends = NUM_ENDS if new > NEW else 1
        run = self.train(
            shape, {"steps": steps, "num_ends": num_ends}, config=config, cap=cap, direct=direct,
            overrides=[f"sampling.max_new_tokens={new}"],
        )  # fmt: skip
        return make_row(
            f"configs/{config}.yaml with the shape of {shape} in {cap} GB, 64 completions of up to {new} tokens", run.get("seconds"), "s",
            f"{steps} steps, never out of memory", lambda value, _: run["steps"] == steps and not run["errors"], detail=run,
        )  # fmt: skip

    def train(self, shape, sizes, config="gsm8k_qwen2.5_1.5b", cap=None, direct=False, overrides=(), processes=1, limit=None):
        """Train, and return the median seconds of a step after the first, those of its phases, and memory."""
        import update
        from transformers import AutoTokenizer

        num_ends = sizes.get("num_ends", 1)
        folder = make_folder(self.models, shape, direct, num_ends)
        out = Path(tempfile.mkdtemp())
        data = update.make_prompts(out / "prompts.jsonl", AutoTokenizer.from_pretrained(folder), 32 if CHECK else PROMPT, 256)
        common = [
            "data.subset=null", f"rewards=[{{name: '{ROOT / 'benchmarks' / 'update.py'}:pseudo_reward'}}]", "lora.dropout=0",
            "engine.learning_rate=1e-5", f"trainer.num_steps={sizes['steps']}", "trainer.completions_per_step=64",
        ]  # fmt: skip
        common += ["sampling.max_new_tokens=256"] if config.startswith("gsm8k") else []
        common += ["engine.deepspeed=ds_zero2.json"] if cap is None else []
        small = ["trainer.num_steps=2", f"trainer.completions_per_step={8 * processes}", "sampling.max_new_tokens=6"] if CHECK else []
        job = {
            "model": folder, "data": data, "config": f"configs/{config}.yaml", "out": out, "cap_gb": cap,
            "overrides": [*common, *overrides, *small],
        }  # fmt: skip
        result, error = start("train", job, limit or self.limit, processes)
        file, memory = out / "bench" / "metrics.jsonl", out / "memory.json"
        memory = json.loads(memory.read_text()) if memory.exists() else None
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        shutil.rmtree(out)
        return {**summarize(rows), **(result or {}), "before_the_run": memory, "errors": error}


def summarize(rows):
    """Return the medians over the steps after the first, and the greatest memory."""
    if not rows:
        return {"steps": 0}
    later = rows[1:] or rows
    phases = {key for row in later for key in row if key.startswith("seconds/")}
    return {
        "steps": len(rows), "seconds": statistics.median(row["seconds"] for row in later),
        "phases": {key: statistics.median(row.get(key, 0.0) for row in later) for key in sorted(phases)},
        "memory": {key: max(row.get(key, 0.0) for row in rows) for key in rows[-1] if key.startswith("memory_gb/")},
        "reserved_gb": max(row.get("reserved_memory_gb", 0.0) for row in rows), "allocated_gb": max(row["peak_memory_gb"] for row in rows),
        "memory_retries": sum(row.get("memory_retries", 0) for row in rows), "longest": max(row["length_max"] for row in rows),
        "tokens_per_step": statistics.median(row["tokens"] for row in later),
        "logprob_gap": max(row.get("logprob_gap", 0.0) for row in rows),
        "all_seconds": [round(row["seconds"], 2) for row in rows],
    }  # fmt: skip


def make_row(what, ours, unit, reach, met, peer=None, peer_name=None, detail=None):
    """Return a row without its name; `met` is a function of our number and the peer's."""
    ratio = ours / peer if ours and peer else None
    is_met = None if met is None or ours is None or (peer_name and not peer) else bool(met(ours, peer))
    return {
        "what": what, "ours": ours, "unit": unit, "peer": peer, "peer_name": peer_name, "ratio": ratio, "reach": reach, "met": is_met,
        "detail": detail,
    }  # fmt: skip


ROWS = {  # name -> the folders that it uses, by name
    "decode_7b": "", "update_7b": "7b-bf16-1", "card_7b": "7b-bf16-400", "card_1.5b": "1.5b-bf16-400", "card_3b": "3b-bf16-400",
    "step_1.5b": "1.5b-bf16-1", "product": "", "card_14b": "14b-nf4-1", "card_32b": "32b-nf4-1", "two_7b": "7b-bf16-1",
}  # fmt: skip
CHECKED = ["decode_7b", "update_7b", "card_32b"]  # one of each kind


def stamp(names):
    """Return hardware, versions, command and date, which every row has."""
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} cores"
    packages = ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")
    return {
        "hardware": card, "versions": {name: version(name) for name in packages}, "date": datetime.date.today().isoformat(),
        "command": " ".join(["python benchmarks/four_bits.py", *names]),
    }  # fmt: skip


def main():
    """Measure, print and store the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep the folders of models")
    parser.add_argument("--limit", type=float, default=540, help="seconds of a row")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "four_bits_models")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("rows", nargs="*", metavar="ROW", choices=[*ROWS, []])
    options = parser.parse_args()
    import update

    with tempfile.TemporaryDirectory() as folder:
        rows, names = Rows(Path(folder) if CHECK else options.models, options.limit), options.rows or CHECKED if CHECK else options.rows or [*ROWS]
        for i, name in enumerate(names):
            begin = time.time()
            row = {"bench": f"four_bits/{name}", **getattr(rows, name.replace(".", "_"))(), **stamp(options.rows)}
            print(json.dumps(row | {"took_seconds": round(time.time() - begin)}), flush=True)
            if not CHECK:
                update.record(options.out, row)
            elif row["ours"] is None:
                sys.exit(f"{name} has no number")
            if ROWS[name] not in [ROWS[later] for later in names[i + 1 :]] and not options.keep and ROWS[name]:
                shutil.rmtree(rows.models / ROWS[name], ignore_errors=True)


def run_one(kind, job):
    """Compute one side in this process, limited in its memory if the job says so, and print the result."""
    import torch

    if torch.cuda.is_available() and job.get("cap_gb"):
        device = int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_per_process_memory_fraction(job["cap_gb"] * 1e9 / torch.cuda.get_device_properties(device).total_memory, device)
    print(json.dumps(KINDS[kind](job)))
    sys.stdout.flush()
    os._exit(0)  # at a normal exit, process groups and engines may wait for each other


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        run_one(sys.argv[2], json.loads(Path(sys.argv[3]).read_text()))
    else:
        main()
