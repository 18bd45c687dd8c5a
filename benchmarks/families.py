"""Time the sampler at the shapes of model families, next to vLLM, on a GPU.

    python benchmarks/families.py [--sides ours,warm,vllm] [--together N] [--limit SECONDS] [SHAPE ...]    on a GPU; vllm==0.22.1
    python benchmarks/families.py --steps                 a whole training step of Qwen3.5-0.8B's shape and of Qwen3-0.6B's
    python benchmarks/families.py --check                 tiny shapes on a CPU, ours alone; records nothing
    python benchmarks/families.py side SIDE SHAPE         one side in this process, which waits for a line; the others start it

Each model has random weights in bf16. A row is the median time of a token step: 32 and 256 completions of 256 tokens, groups of 8,
from prompts of 128 random tokens, temperature 1, every completion to its full length, with the log-probs of the sampled tokens. Ours
applies a LoRA of rank 16 on q, k, v and o (whichever of them the model has) in every step; vLLM has none, as trainers give it merged
weights, and no prefix caching. The sides of N shapes start together, because a start takes minutes; then they measure one after
another. `ours` begins with an empty Triton cache, `warm` repeats its first call in a new process with that cache. The floor of a
mixture of experts is the time to read each weight that a token step needs, at the bandwidth of a copy on the same card: of the
experts, those that were chosen.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
OUT = ROOT / "benchmarks" / "results" / "families.json"
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1"}
COMMON = {"max_position_embeddings": 32_768, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
QWEN3_5 = {
    "vocab_size": 248_320, "head_dim": 256, "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4, "tie_word_embeddings": True,
}  # fmt: skip
# name -> (model type, class, sizes as on the model's card)
SHAPES = {
    "gemma3_1b": ("gemma3_text", "Gemma3ForCausalLM", {
        "vocab_size": 262_144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512, "query_pre_attn_scalar": 256, "tie_word_embeddings": True,
    }),
    "qwen3_5_0.8b": ("qwen3_5_text", "Qwen3_5ForCausalLM", QWEN3_5 | {
        "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2,
        "linear_num_value_heads": 16,
    }),
    "qwen3_5_4b": ("qwen3_5_text", "Qwen3_5ForCausalLM", QWEN3_5 | {
        "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4,
        "linear_num_value_heads": 32,
    }),
    "lfm2_1.2b": ("lfm2", "Lfm2ForCausalLM", {
        "vocab_size": 65_536, "hidden_size": 2048, "intermediate_size": 12_288, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "full_attn_idxs": [2, 5, 8, 10, 12, 14], "conv_L_cache": 3, "norm_eps": 1e-5,
        "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True, "tie_word_embeddings": True,
    }),
    "granite4_h_1b": ("granitemoehybrid", "GraniteMoeHybridForCausalLM", {
        "vocab_size": 100_352, "hidden_size": 1536, "intermediate_size": 4096, "shared_intermediate_size": 4096,
        "num_hidden_layers": 40, "num_attention_heads": 12, "num_key_value_heads": 4, "num_local_experts": 0,
        "num_experts_per_tok": 0, "mamba_n_heads": 48, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1,
        "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 256, "position_embedding_type": "nope",
        "layer_types": ["attention" if i % 10 == 5 else "mamba" for i in range(40)], "tie_word_embeddings": True,
    }),
    "phi4_mini": ("phi3", "Phi3ForCausalLM", {
        "vocab_size": 200_064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 24,
        "num_key_value_heads": 8, "partial_rotary_factor": 0.75, "tie_word_embeddings": True,
    }),
    "smollm3_3b": ("smollm3", "SmolLM3ForCausalLM", {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 4, "tie_word_embeddings": True,
    }),
    "olmo3_7b": ("olmo3", "Olmo3ForCausalLM", {
        "vocab_size": 100_278, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "sliding_window": 4096,
    }),
    "qwen3_8b": ("qwen3", "Qwen3ForCausalLM", {
        "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    }),
    "qwen3_30b_a3b": ("qwen3_moe", "Qwen3MoeForCausalLM", {
        "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "tie_word_embeddings": False,
    }),
    "gpt_oss_20b": ("gpt_oss", "GptOssForCausalLM", {
        "vocab_size": 201_088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128,
        "tie_word_embeddings": False,
    }),
    "qwen3_0.6b": ("qwen3", "Qwen3ForCausalLM", {
        "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    }),
    "starcoder2_3b": ("starcoder2", "Starcoder2ForCausalLM", {
        "vocab_size": 49_152, "hidden_size": 3072, "intermediate_size": 12_288, "num_hidden_layers": 30, "num_attention_heads": 24,
        "num_key_value_heads": 2, "sliding_window": 4096, "tie_word_embeddings": True,
    }),
    "pythia_2.8b": ("gpt_neox", "GPTNeoXForCausalLM", {
        "vocab_size": 50_304, "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 32, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    }),
    "granite3_2b": ("granite", "GraniteForCausalLM", {
        "vocab_size": 49_155, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": True,
    }),
}  # fmt: skip
PROMPT, NEW, GROUP, ROWS, TIMES = 128, 256, 8, (32, 256), 2
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "query_key_value")
# shape -> what the time is a ratio to, and the ratio to reach for the numbers of ROWS
REACH = {
    "gemma3_1b": ("vllm", 0.7, 0.5), "qwen3_5_0.8b": ("vllm", 1.0, 0.8), "qwen3_5_4b": ("vllm", 1.0, 0.8),
    "lfm2_1.2b": ("vllm", 1.2, 1.0), "granite4_h_1b": ("vllm", 1.2, 1.0), "phi4_mini": ("vllm", 0.9, 0.8),
    "smollm3_3b": ("vllm", 0.9, 0.8), "olmo3_7b": ("qwen3_8b", 1.5, 1.5), "qwen3_30b_a3b": ("floor", 1.6, None),
    "gpt_oss_20b": ("floor", 1.6, None), "starcoder2_3b": ("10 ms", 1.0, None), "pythia_2.8b": ("10 ms", 1.0, None),
}  # fmt: skip
PEERS = {"vllm": "vLLM 0.22.1, without LoRA", "floor": "the time to read the weights", "10 ms": "10 ms"}
STEP = {"completions": 64, "width": 256, "prompt": 128, "steps": 4}


def make_config(name, check=False):
    """Return the configuration of a shape; with `check` a tiny one of its family."""
    from transformers import AutoConfig

    kind, architecture, sizes = SHAPES[name]
    tiny = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96} if check else {}
    config = AutoConfig.for_model(kind, **COMMON | sizes | tiny)
    config.architectures, config.dtype = [architecture], "bfloat16"
    return config


def make_prompts(count, vocabulary):
    """Return `count` prompts of random token ids."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, min(vocabulary, 60_000), (count, PROMPT), generator=generator).tolist()


def make_policy(name, check=False):
    """Return a policy with random weights in bf16 and a LoRA of rank 16 that changes the logits."""
    import sampling
    import torch
    from transformers import AutoModelForCausalLM

    from grpo_core.config.sections import LoraConfig, ModelConfig
    from grpo_core.model.policy import wrap

    torch.manual_seed(0)
    attention = {} if "gpt_oss" in name else {"attn_implementation": "sdpa"}
    with sampling.DEVICE:
        base = AutoModelForCausalLM.from_config(make_config(name, check), dtype=torch.bfloat16, **attention).eval()
    linears = {module.rpartition(".")[2] for module, _ in base.named_modules()}
    policy = wrap(base, ModelConfig(), LoraConfig(target_modules=[x for x in TARGETS if x in linears]), temperature=1.0)
    with torch.no_grad():
        for key, parameter in policy.model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.02)
    return policy


def run_ours(name, emit, wait, check=False, row_counts=ROWS, times=TIMES):
    """Sample with grpo_core; emit the milliseconds of a token step for each number of rows."""
    import sampling
    import torch

    from grpo_core.batch import Task
    from grpo_core.sampling.sampler import Sampler

    policy, new = make_policy(name, check), 8 if check else NEW
    model = policy.causal_lm
    wait()
    for rows in (8,) if check else row_counts:
        notes, routers = [], policy.routers if rows == min(ROWS) else None
        sampler = Sampler(model, sampling.StubTokenizer(), max_new_tokens=new, notify=notes.append)
        prompts = make_prompts(rows // GROUP, model.config.vocab_size)
        tasks = [Task(i, "", ids, {}, (0, 0, i)) for i, ids in enumerate(prompts)]
        seconds = [timed(lambda: sampler.generate(tasks, GROUP)) for _ in range(1 + times)]  # noqa: B023
        floor = {}
        if routers is not None and times == TIMES:
            recorder = Sampler(model, sampling.StubTokenizer(), max_new_tokens=new, routers=routers)
            floor = find_floor(model, recorder.generate(tasks, GROUP).routed_experts)
        emit(
            rows=rows, ms_per_step=1e3 * statistics.median(seconds[1:]) / new, first_call_seconds=seconds[0], later_seconds=seconds[-1],
            decoder=sampler.decoder_name, reserved_gb=torch.cuda.max_memory_reserved() / 1e9 if sampling.GPU else None, notes=notes[-2:],
            **floor,
        )  # fmt: skip


def run_warm(name, emit, wait):
    """Repeat the first call of `run_ours` in this process, with the kernels that it has compiled."""
    run_ours(name, emit, wait, row_counts=ROWS[:1], times=1)


def find_floor(model, experts):
    """Return the time to read the weights of a token step; `experts` [B, C, L, k] are those that were chosen."""
    import torch

    embedding = model.get_input_embeddings().weight
    sizes = {key: p.numel() * p.element_size() for key, p in model.named_parameters() if p is not embedding or model.config.tie_word_embeddings}
    in_experts = sum(size for key, size in sizes.items() if ".experts." in key)
    experts = experts[:, :-1].long()  # the last token is not read by the model
    number = getattr(model.config, "num_experts", None) or model.config.num_local_experts
    chosen = torch.nn.functional.one_hot(experts, number).amax(dim=(0, 3)).sum(dim=-1)  # [C - 1, L]
    gigabytes = (sum(sizes.values()) - in_experts + in_experts * chosen.float().mean().item() / number) / 1e9
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = statistics.median(timed(lambda: target.copy_(source)) for _ in range(9))
    bandwidth = 2 * source.numel() / seconds / 1e9
    return {
        "experts_chosen": chosen.float().mean().item(), "experts": number, "gb_read": gigabytes, "copy_gb_per_second": bandwidth,
        "floor_ms": 1e3 * gigabytes / bandwidth,
    }  # fmt: skip


def run_step(name, emit, wait):
    """Train whole steps with grpo_core; emit the median seconds of each phase."""
    import sampling
    import torch
    import update
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    with sampling.DEVICE:
        model = AutoModelForCausalLM.from_config(make_config(name), dtype=torch.bfloat16)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(ROOT / "grpo_core" / "builtin" / "tiny").save_pretrained(folder / "model")
    linears = {module.rpartition(".")[2] for module, _ in model.named_modules()}
    del model
    wait()
    targets = [x for x in TARGETS if x in linears]
    emit(**update.run_ours(update.gpu_job(folder, **STEP, overrides=[f"lora.target_modules={targets}"])))


def timed(call):
    """Return the seconds of a call."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def register_for_vllm(name):
    """Let vLLM 0.22.1 read the text models and layer names of transformers that it does not know."""
    if name.startswith("qwen3_5"):
        from vllm import ModelRegistry
        from vllm.model_executor.models import config as settings
        from vllm.model_executor.models import qwen3_5
        from vllm.model_executor.models.interfaces import IsHybrid

        whole = qwen3_5.Qwen3_5ForConditionalGeneration
        hooks = ("get_mamba_state_dtype_from_config", "get_mamba_state_shape_from_config", "get_mamba_state_copy_func")
        members = {hook: classmethod(getattr(whole, hook).__func__) for hook in hooks}
        text_model = type("TextModel", (qwen3_5.Qwen3_5ForCausalLM, IsHybrid), members)
        ModelRegistry.register_model("Qwen3_5ForCausalLM", text_model)
        settings.MODELS_CONFIG_MAP["Qwen3_5ForCausalLM"] = settings.Qwen3_5ForConditionalGenerationConfig
    if name.startswith("granite4"):
        from vllm.model_executor.models import granitemoehybrid

        kinds = granitemoehybrid.ALL_DECODER_LAYER_TYPES
        kinds.update(linear_attention=kinds["mamba"], full_attention=kinds["attention"])


def run_vllm(name, emit, wait):
    """Sample with vLLM; emit the milliseconds of a token step for each number of rows, and the seconds of its start."""
    config = make_config(name)
    if name.startswith("lfm2"):  # names that vLLM reads
        config.conv_dim = config.conv_dim_out = config.block_dim = config.hidden_size
        config.block_ff_dim = config.intermediate_size
    folder = tempfile.mkdtemp()
    config.save_pretrained(folder)
    register_for_vllm(name)
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    extra = {"gdn_prefill_backend": "triton"} if name.startswith("qwen3_5") else {}
    llm = LLM(
        model=folder, dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True, gpu_memory_utilization=0.1, kv_cache_memory_bytes=10 * 2**30, seed=0,
        max_model_len=1024, max_num_seqs=max(ROWS), disable_log_stats=True, enable_prefix_caching=False, **extra,
    )  # fmt: skip
    emit(start_seconds=time.perf_counter() - start)
    wait()
    settings = SamplingParams(n=GROUP, temperature=1.0, max_tokens=NEW, ignore_eos=True, detokenize=False, logprobs=0)
    for rows in ROWS:
        prompts = [{"prompt_token_ids": ids} for ids in make_prompts(rows // GROUP, config.vocab_size)]
        seconds = [timed(lambda: llm.generate(prompts, settings, use_tqdm=False)) for _ in range(1 + TIMES)]  # noqa: B023
        emit(rows=rows, ms_per_step=1e3 * statistics.median(seconds[1:]) / NEW)


SIDES = {"ours": run_ours, "warm": run_warm, "vllm": run_vllm, "step": run_step}


def run_side(side, name):
    """Run one side in this process, and print its results as JSON lines; it measures when a line comes in."""

    def wait():
        print("READY", flush=True)
        sys.stdin.readline()

    SIDES[side](name, lambda **values: print("RESULT", json.dumps({"shape": name, "side": side} | values), flush=True), wait)
    sys.stdout.flush()
    os._exit(0)  # at a normal exit, engines may wait for their processes


class Side:
    """A side of one shape in a process of its own, which measures when it is told to."""

    def __init__(self, side, name, folder):
        self.side, self.name, self.log = side, name, folder / f"{name}-{side}.log"
        environment = os.environ | (IN_PROCESS if side == "vllm" else {"TRITON_CACHE_DIR": str(folder / name)})
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "side", side, name], stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True,
                env=environment,
            )  # fmt: skip

    def output(self):
        return self.log.read_text(errors="replace")

    def is_starting(self):
        return self.process.poll() is None and "READY" not in self.output()

    def measure(self, limit):
        """Let it measure; return its results, and the end of its output if it failed."""
        try:
            self.process.communicate("\n", timeout=limit)
            code = self.process.returncode
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.process.kill()
            code = self.process.wait() or "time limit"
        results = [json.loads(line.removeprefix("RESULT ")) for line in self.output().splitlines() if line.startswith("RESULT ")]
        return results + ([{"shape": self.name, "side": self.side, "failed": code, "output": self.output()[-1500:]}] if code else [])


def run_together(names, sides, limit):
    """Start the sides of several shapes together, then let them measure one after another; print and return the results."""
    with tempfile.TemporaryDirectory() as folder:
        started, results = [Side(side, name, Path(folder)) for name in names for side in sides], []
        end = time.perf_counter() + limit
        while any(side.is_starting() for side in started) and time.perf_counter() < end:
            time.sleep(1)
        for side in started:
            for result in side.measure(limit if not side.is_starting() else 1):
                results.append(result)
                print(json.dumps(result), flush=True)
        return results


def stamp(command):
    """Return what a row says of the machine, the versions, the command and the day."""
    import torch

    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
        "command": f"python benchmarks/families.py {command}", "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def to_row(name, rows, results):
    """Return the row of benchmarks/results for one shape and number of rows, from the results of its sides; None without any."""
    sides = {result["side"]: result for result in results if result["shape"] == name and result.get("rows") == rows}
    detail = dict(sides.get("ours", {}))
    if not detail:
        return None
    detail |= {f"warm_{key}": sides["warm"][key] for key in ("first_call_seconds", "later_seconds") if "warm" in sides}
    peer_name, *reaches = REACH.get(name, ("vllm", None, None))
    reach, ours = reaches[ROWS.index(rows)], detail["ms_per_step"]
    peers = {
        "vllm": sides.get("vllm", {}).get("ms_per_step"), "floor": detail.get("floor_ms"), "10 ms": 10.0,
        "qwen3_8b": next((r["ms_per_step"] for r in results if (r["shape"], r["side"], r.get("rows")) == ("qwen3_8b", "ours", rows)), None),
    }  # fmt: skip
    peer = peers[peer_name]
    return {
        "bench": f"families/decode/{name}/{rows}", "what": f"a token step of {rows} rows, prompt {PROMPT}, {NEW} new tokens",
        "ours": ours, "peer": peer, "peer_name": PEERS.get(peer_name, f"grpo_core, {peer_name}"), "ratio": ours / peer if peer else None,
        "unit": "ms", "reach": reach and f"at most {reach}", "met": ours <= reach * peer if peer and reach else None,
        **stamp(name), "detail": detail,
    }  # fmt: skip


def to_update_row(results):
    """Return the row of the update of Qwen3.5-0.8B's shape, as a ratio to that of Qwen3-0.6B's."""
    sides = {result["shape"]: result for result in results if "phases" in result}
    ours, peer = (sides[name]["phases"]["seconds/update"] for name in ("qwen3_5_0.8b", "qwen3_0.6b"))
    return {
        "bench": "families/update/qwen3_5_0.8b", "what": "the update of {completions} completions of {width} tokens, prompt {prompt}".format(**STEP),
        "ours": ours, "peer": peer, "peer_name": "grpo_core, qwen3_0.6b", "ratio": ours / peer, "unit": "s", "reach": "at most 2",
        "met": ours <= 2 * peer, **stamp("--steps"), "detail": sides,
    }  # fmt: skip


def load():
    """Return the stored rows by name."""
    return {row["bench"]: row for row in json.loads(OUT.read_text())} if OUT.exists() else {}


def keep(rows):
    """Put the rows in the place of earlier ones of the same name."""
    stored = load() | {row["bench"]: row for row in rows if row}
    OUT.write_text("[\n" + ",\n".join(json.dumps(stored[name]) for name in sorted(stored)) + "\n]\n")


def main():
    """Run the shapes; print each result when it is there, and store a row for each shape and number of rows."""
    if sys.argv[1:2] == ["side"]:
        return run_side(*sys.argv[2:4])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--sides", default="ours,warm,vllm", help="comma-separated: ours, warm, vllm")
    parser.add_argument("--together", type=int, default=1, metavar="N", help="shapes whose sides start at the same time")
    parser.add_argument("--limit", type=int, default=200, help="seconds for the start, and for what one side measures")
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.check:
        return run_ours("gemma3_1b", lambda **values: print(json.dumps(values)), lambda: None, check=True)
    if options.steps:
        return keep([to_update_row(run_together(["qwen3_0.6b", "qwen3_5_0.8b"], ["step"], options.limit))])
    names = options.shapes or list(SHAPES)
    for start in range(0, len(names), options.together):
        batch = names[start : start + options.together]
        results = run_together(batch, options.sides.split(","), options.limit)
        keep([to_row(name, rows, results) for name in batch for rows in ROWS])
    return None


if __name__ == "__main__":
    main()
