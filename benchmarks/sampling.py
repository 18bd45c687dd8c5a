"""Compare the sampler with Hugging Face generate in the same run, and with itself with parts switched off.

    python benchmarks/sampling.py [--out FILE] [WORKLOAD ...]      on a GPU: first, small, later, large, ragged,
                                                                   memory, ranks; on a CPU: cpu, tiny
    python benchmarks/sampling.py --check          every workload but first and memory, with small shapes; records nothing
    python benchmarks/sampling.py smollm2 FOLDER QUESTIONS.jsonl [FILE.gguf]

Without WORKLOAD, all workloads of this machine run. By default the model has Qwen2.5-1.5B's shape, random weights and a
LoRA of rank 16 on q, k, v and o whose B is not zero, in bf16. Every completion has its full length, because no
end-of-sequence token can be drawn.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from grpo_core.batch import Task
from grpo_core.config.sections import LoraConfig, ModelConfig
from grpo_core.model.policy import wrap
from grpo_core.sampling.sampler import Sampler

GPU = torch.cuda.is_available()
OUT = ROOT / "benchmarks" / "results" / "sampling.json"
DEVICE = torch.device("cuda" if GPU else "cpu")
VOCABULARY = 151_936
SHAPE = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
MAX_NEW = 512  # tokens; --check lowers it


class StubTokenizer:
    """Stand in for a tokenizer: texts are empty, and the end-of-sequence token can never be drawn."""

    pad_token_id, eos_token_id = 0, -1

    def batch_decode(self, rows, skip_special_tokens=True):
        return ["" for _ in rows]


def add_lora(base):
    """Return a policy: the base model with a LoRA whose B is not zero."""
    policy = wrap(base, ModelConfig(), LoraConfig(), temperature=1.0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return policy


def make_qwen():
    """Return a policy with Qwen2.5-1.5B's shape and random bf16 weights."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with DEVICE:
        base = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=VOCABULARY, **SHAPE, tie_word_embeddings=True, max_position_embeddings=32_768, bos_token_id=None,
                eos_token_id=None,
            )
        )  # fmt: skip
        policy = add_lora(base)
    torch.set_default_dtype(torch.float32)
    return policy


def make_tasks(count, length, vocabulary):
    """Return `count` tasks whose prompts are `length` random token ids."""
    generator = torch.Generator().manual_seed(0)
    return [Task(i, "", torch.randint(2, vocabulary, (length,), generator=generator).tolist(), {}, (0, 0, i)) for i in range(count)]


def synchronize():
    if GPU:
        torch.cuda.synchronize()


def measure(function, times=3):
    """Return the median seconds of `times` calls, and the result of the last call."""
    durations = []
    for _ in range(times):
        synchronize()
        start = time.perf_counter()
        result = function()
        synchronize()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations), result


def make_hf_generate(model, rows, group_size, new, **kwargs):
    """Return a function that calls model.generate for the same prompts, with `new` tokens per completion."""
    ids = torch.tensor([task.prompt_ids for task in rows], device=DEVICE)
    kwargs = {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": group_size, **kwargs}

    def run():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new, pad_token_id=0, **kwargs)
        assert out.shape == (len(rows) * group_size, ids.shape[1] + new)
        return out

    return run


def report(workload, ours, unit, peer=None, ratio=None, reach="", met=True, **detail):
    """Print one row and add it to OUT."""
    hardware = torch.cuda.get_device_name() if GPU else f"{os.cpu_count()} cores, {platform.machine()}"
    row = {
        "bench": "sampling", "workload": workload, "ours": round(ours, 3), "unit": unit, "peer": peer and round(peer, 3),
        "ratio": ratio and round(ratio, 2), "reach": reach, "met": bool(met), "hardware": hardware,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "date": datetime.date.today().isoformat(), **({"detail": detail} if detail else {}),
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    with OUT.open("a") as file:
        file.write(json.dumps(row) + "\n")


def make_sampler(policy, new, **kwargs):
    return Sampler(policy.causal_lm, StubTokenizer(), max_new_tokens=new, **kwargs)


def limit(new):
    """Return the new tokens of a completion: `new`, or fewer in a check."""
    return min(new, MAX_NEW)


def small(policy):
    """Measure 4 prompts × 8 completions: prompts of 128 tokens, 256 new tokens."""
    rows, sampler = make_tasks(4, 128, VOCABULARY), make_sampler(policy, limit(256))
    sampler.generate(rows, 8)
    seconds, rollouts = measure(lambda: sampler.generate(rows, 8), times=5)
    assert rollouts.completion_mask.all() and rollouts.completion_ids.shape == (32, limit(256))
    step, peer = 1000 * seconds / 256, measure(make_hf_generate(policy.causal_lm, rows, 8, limit(256)), times=1)[0]
    report("32 rows, prompt 128, 256 new", step, "ms a token step, prefill included", 1000 * peer / 256, peer / seconds, "<= 2.5", step <= 2.5)
    report("32 rows, prompt 128, 256 new, against generate", seconds, "s", peer, peer / seconds, ">= 15 times", peer / seconds >= 15)


def once(policy):
    """Print the seconds that the first call of this process takes more than the second."""
    rows, sampler = make_tasks(4, 128, VOCABULARY), make_sampler(policy, limit(256))
    first_seconds, later_seconds = (measure(lambda: sampler.generate(rows, 8), times=1)[0] for _ in range(2))
    print(first_seconds - later_seconds)


def first():
    """Measure the first call of a process: with an empty Triton cache on disk, and with the kernels in the cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "once"]
        for workload in ("first call of a process, kernels never compiled on this machine", "first call of a process"):
            process = subprocess.run(command, env={**os.environ, "TRITON_CACHE_DIR": cache}, stdout=subprocess.PIPE, text=True, check=True)
            extra = float(process.stdout.split()[-1])
            report(workload, extra, "s more than later ones", reach="<= 2", met=extra <= 2)


def later(policy):
    """Measure the first calls with further shapes: rows and prompt length differ from earlier calls."""
    sampler, extra = make_sampler(policy, limit(256)), []
    sampler.generate(make_tasks(4, 128, VOCABULARY), 8)
    for count in (6, 12, 24):
        rows = make_tasks(count, 96, VOCABULARY)
        first_seconds, later_seconds = (measure(lambda rows=rows: sampler.generate(rows, 8), times=1)[0] for _ in range(2))
        extra.append(first_seconds - later_seconds)
    report("first call of another shape", max(extra), "s more than later ones", reach="<= 0.5", met=max(extra) <= 0.5, each=extra)


def large(policy):
    """Measure 32 prompts × 8 completions: prompts of 128 tokens, 512 new tokens."""
    rows, sampler = make_tasks(32, 128, VOCABULARY), make_sampler(policy, limit(512))
    sampler.generate(rows, 8)
    seconds, _ = measure(lambda: sampler.generate(rows, 8))
    step, rate = 1000 * seconds / 512, 256 * 512 / seconds
    peer = 1000 * measure(make_hf_generate(policy.causal_lm, rows, 8, limit(64)), times=1)[0] / 64
    report("256 rows, prompt 128, 512 new", step, "ms a token step, prefill included", peer, peer / step, "<= 4", step <= 4, peer_tokens=64)
    report("256 rows, prompt 128, 512 new", rate, "tokens/s", reach=">= 64000", met=rate >= 64_000)


def ragged(policy):
    """Measure what dropping ended rows saves; lengths are geometric with a quarter of the maximum as mean."""
    draws = torch.rand(1024, generator=torch.Generator().manual_seed(0))
    limits = (draws.log() / torch.log1p(torch.tensor(-1 / 128))).ceil().long().clamp(1, limit(512))
    rows, many, sampler = make_tasks(32, 128, VOCABULARY), make_tasks(128, 128, VOCABULARY), make_sampler(policy, limit(512))

    def run(compact, **kwargs):
        sampler.generate(rows, 8)
        sampler._decoders["fused"].compact = compact
        sampler.generate(rows, 8, **kwargs)
        return measure(lambda: sampler.generate(rows, 8, **kwargs))[0]

    ours, uncompacted, to_the_end = run(True, limits=limits[:256]), run(False, limits=limits[:256]), run(True)
    detail = {"mean_length": float(limits[:256].float().mean()), "longest": int(limits[:256].max())}
    workload = "256 rows, geometric lengths, mean a quarter of 512, against "
    report(workload + "no compaction", ours, "s", uncompacted, uncompacted / ours, ">= 1.5 times", uncompacted / ours >= 1.5, **detail)
    report(workload + "every row decoded to the longest", ours, "s", to_the_end, to_the_end / ours, ">= 1.5 times", to_the_end / ours >= 1.5, **detail)
    sampler.rows_at_once = 256
    sampler.generate(many, 8, limits=limits)
    refilled = measure(lambda: sampler.generate(many, 8, limits=limits))[0]
    report("1,024 rows of such lengths, 256 at once, refilled, against four waves", refilled, "s", 4 * uncompacted, 4 * uncompacted / refilled, ">= 1.5 times", 4 * uncompacted / refilled >= 1.5)


def memory(policy):
    """Measure the GPU memory of a call beyond the weights and its keys and values."""
    rows = make_tasks(32, 128, VOCABULARY)
    torch.cuda.empty_cache()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    sampler = make_sampler(policy, limit(512))
    torch.cuda.reset_peak_memory_stats()
    sampler.generate(rows, 8)
    cache = 28 * 2 * 2 * 128 * 2 * (32 * 128 + 256 * 512)
    extra = (torch.cuda.max_memory_allocated() - before - cache) / 2**30
    extra_reserved = (torch.cuda.max_memory_reserved() - reserved - cache) / 2**30
    torch.cuda.empty_cache()
    between_calls = (torch.cuda.memory_allocated() - before) / 2**30
    report("GPU memory beyond weights and cache, 256 rows", extra, "GiB allocated", reach="<= 0.3", met=extra <= 0.3, reserved=extra_reserved, held_between_calls=between_calls)


def compare_halves(name, sampler, rows):
    """Report the share of completions that stay equal when the rows are decoded in two halves, as on two ranks."""
    whole, again = sampler.generate(rows, 8), sampler.generate(rows, 8)
    parts = [sampler.generate(part, 8) for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :])]
    width = whole.completion_ids.shape[1]
    ids = torch.cat([torch.nn.functional.pad(part.completion_ids, (0, width - part.completion_ids.shape[1])) for part in parts])
    equal = ids == whole.completion_ids
    equal_tokens, is_repeatable = equal.cumprod(dim=1).sum(dim=1).float().mean().item(), torch.equal(whole.completion_ids, again.completion_ids)
    share = equal.all(dim=1).float().mean().item()
    report(f"completions equal when decoded in halves, {name}", share, "share", met=is_repeatable, tokens=width, equal_tokens_before_a_difference=equal_tokens, same_call_again_is_bitwise_equal=is_repeatable)


def ranks(policy):
    """Compare halves under random weights: the distribution over 151,936 tokens is nearly flat, so any rounding changes a draw."""
    rows, sampler = make_tasks(32, 128, VOCABULARY), make_sampler(policy, limit(256))
    compare_halves("random weights, bf16", sampler, rows)
    rollouts = sampler.generate(rows[:4], 8)
    gap = (policy.logprobs(rollouts) - rollouts.rollout_logprobs).abs()
    report("log-probs against a teacher-forced forward, bf16", gap.mean().item(), "nats, mean", max=gap.max().item())


def smollm2(folder, questions, gguf=None):
    """Measure real weights on the first 64 questions of a GSM8K file as chats: greedy, 256 new tokens."""
    kwargs = {"gguf_file": gguf} if gguf else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **kwargs).to(DEVICE).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    questions = [json.loads(line)["question"] for line in Path(questions).read_bytes().splitlines()[:64]]
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True) for q in questions]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    rows = [Task(i, "", row, {}) for i, row in enumerate(ids)]
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in ids], device=DEVICE)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=DEVICE)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "float32")):
        sampler = Sampler(model.to(dtype), StubTokenizer(), max_new_tokens=256)
        sampler.generate(rows, 1, greedy=True)
        seconds, rollouts = measure(lambda sampler=sampler: sampler.generate(rows, 1, greedy=True), times=5)
        peer, out = measure(lambda: model.generate(padded, attention_mask=mask, min_new_tokens=256, max_new_tokens=256, do_sample=False, pad_token_id=0), times=1)
        share = (out[:, width:] == rollouts.completion_ids).all(dim=1).float().mean().item()
        aim = ("<= 0.6", seconds <= 0.6) if name == "bf16" else ("", True)
        report(f"SmolLM2-135M, 64 GSM8K prompts greedy, 256 new, {name}", seconds, "s", peer, peer / seconds, *aim, rows_equal_to_generate=share)
        seeded = [Task(row.index, "", row.prompt_ids, {}, (0, 0, row.index)) for row in rows[:32]]
        compare_halves(f"SmolLM2-135M at temperature 1, {name}", sampler, seeded)


def cpu():
    """Measure a model of 100M weights on a CPU: 4 prompts × 8 completions, prompts of 64 tokens, 48 new tokens, float32."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32_000, hidden_size=640, intermediate_size=1792, num_hidden_layers=16, num_attention_heads=10,
            num_key_value_heads=5, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    policy = add_lora(base.eval())
    rows, sampler = make_tasks(4, 64, 32_000), make_sampler(policy, 48)
    torch.manual_seed(0)
    pairs = [(measure(lambda: sampler.generate(rows, 8), 1)[0], measure(make_hf_generate(policy.causal_lm, rows, 8, 48), 1)[0]) for _ in range(4)][1:]
    seconds, peer = (statistics.median(x) for x in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    size = sum(p.numel() for p in base.parameters()) / 1e6
    report(f"CPU, {size:.0f}M model, 4 × 8 rows, prompt 64, 48 new", seconds, "s", peer, ratio, ">= 1.7 times", ratio >= 1.7)


def tiny():
    """Measure tiny.yaml's sampling: the built-in policy, 16 prompts × 8 completions that end by themselves."""
    folder = ROOT / "grpo_core" / "builtin" / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy = wrap(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ModelConfig(), LoraConfig(target_modules="all-linear"), temperature=1.0)
    questions = [f"Question: Tom has {i + 2} pens and buys {i % 5 + 1} more. How many pens has he now?\n" for i in range(16)]
    rows = [Task(i, q, tokenizer(q)["input_ids"], {}, (0, 0, i)) for i, q in enumerate(questions)]
    sampler = Sampler(policy.causal_lm, tokenizer, max_new_tokens=48)
    width = max(len(row.prompt_ids) for row in rows)
    ids = torch.tensor([[0] * (width - len(row.prompt_ids)) + row.prompt_ids for row in rows])
    mask = torch.tensor([[0] * (width - len(row.prompt_ids)) + [1] * len(row.prompt_ids) for row in rows])

    def peer():
        return policy.causal_lm.generate(ids, attention_mask=mask, max_new_tokens=48, do_sample=True, top_k=0, num_return_sequences=8)

    pairs = [(measure(lambda: sampler.generate(rows, 8), 1)[0], measure(peer, 1)[0]) for _ in range(8)][1:]
    ratio = statistics.median(b / a for a, b in pairs)
    seconds, peer_seconds = (statistics.median(x) for x in zip(*pairs, strict=True))
    report("CPU, tiny.yaml's sampling, 128 rows, float32", seconds, "s", peer_seconds, ratio, ">= 2.5 times", ratio >= 2.5)


def check():
    """Run the workloads of a GPU with a small model and short completions, on this machine; nothing is recorded."""
    global OUT, VOCABULARY, SHAPE, MAX_NEW
    OUT, VOCABULARY, MAX_NEW = Path(os.devnull), 64, 4
    SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    policy = make_qwen()
    for workload in (small, once, later, large, ragged, ranks):
        workload(policy)


def main():
    global OUT
    workloads = [first, small, later, large, ragged, memory, ranks] if GPU else [cpu, tiny]
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--check", action="store_true", help="run small shapes and record nothing")
    parser.add_argument("workloads", nargs="*")
    options = parser.parse_args()
    if options.check:
        return check()
    OUT, names = options.out, options.workloads
    if names[:1] == ["smollm2"]:
        return smollm2(*names[1:])
    chosen = [f for f in (*workloads, *([once] if GPU else [])) if (f.__name__ in names) or (not names and f in workloads)]
    if unknown := set(names) - {f.__name__ for f in chosen}:
        parser.error(f"unknown workload {', '.join(sorted(unknown))}; this machine has {', '.join(f.__name__ for f in workloads)}, smollm2")
    policy = None
    for workload in chosen:
        if workload in (first, cpu, tiny):
            workload()
        else:
            policy = policy or make_qwen()
            workload(policy)
    return None


if __name__ == "__main__":
    main()
