"""Time the sampler at the shapes of model families, next to vLLM, on a GPU.

    python benchmarks/families.py [--sides ours,vllm] [--limit SECONDS] [SHAPE ...]     on a GPU, with vllm==0.22.1 for its side
    python benchmarks/families.py --check                                      tiny shapes on a CPU, ours alone; records nothing
    python benchmarks/families.py side ours|vllm SHAPE                         one side in this process; the first command starts it

Each model has random weights in bf16. A row is the median time of a token step: 32 and 256 completions of 256 tokens, groups of 8,
from prompts of 128 random tokens, temperature 1, every completion to its full length, with the log-probs of the sampled tokens. Ours
applies a LoRA of rank 16 on q, k, v and o (whichever of them the model has) in every step; vLLM has none, as trainers give it merged
weights, and no prefix caching.
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
    "granite3_2b": ("granite", "GraniteForCausalLM", {
        "vocab_size": 49_155, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": True,
    }),
}  # fmt: skip
PROMPT, NEW, GROUP, ROWS, TIMES = 128, 256, 8, (32, 256), 2
REACH = {  # of vLLM's time, for the numbers of ROWS
    "gemma3_1b": (0.7, 0.5), "qwen3_5_0.8b": (1.0, 0.8), "qwen3_5_4b": (1.0, 0.8), "lfm2_1.2b": (1.2, 1.0), "granite4_h_1b": (1.2, 1.0),
    "phi4_mini": (0.9, 0.8), "smollm3_3b": (0.9, 0.8),
}  # fmt: skip


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


def run_ours(name, check, emit):
    """Sample with grpo_core; emit the milliseconds of a token step for each number of rows."""
    import sampling
    import torch
    from transformers import AutoModelForCausalLM

    from grpo_core.batch import Task
    from grpo_core.config.sections import LoraConfig, ModelConfig
    from grpo_core.model.policy import wrap
    from grpo_core.sampling.sampler import Sampler

    torch.manual_seed(0)
    config, notes, new = make_config(name, check), [], 8 if check else NEW
    with sampling.DEVICE:
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **({} if "gpt_oss" in name else {"attn_implementation": "sdpa"})).eval()
    linears = {module.rpartition(".")[2] for module, _ in base.named_modules()}
    targets = [x for x in ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj") if x in linears]
    policy = wrap(base, ModelConfig(), LoraConfig(target_modules=targets), temperature=1.0)
    with torch.no_grad():
        for key, parameter in policy.model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.02)
    weights = sum(p.numel() * p.element_size() for p in base.parameters())
    emit(weights_gb=weights / 1e9)
    for rows in (8,) if check else ROWS:
        sampler = Sampler(policy.causal_lm, sampling.StubTokenizer(), max_new_tokens=new, notify=notes.append)
        tasks = [Task(i, "", ids, {}, (0, 0, i)) for i, ids in enumerate(make_prompts(rows // GROUP, config.vocab_size))]
        seconds = [timed(lambda: sampler.generate(tasks, GROUP)) for _ in range(1 + TIMES)]  # noqa: B023
        emit(
            rows=rows, ms_per_step=1e3 * statistics.median(seconds[1:]) / new, first_call_seconds=seconds[0],
            decoder=sampler.decoder_name, reserved_gb=torch.cuda.max_memory_reserved() / 1e9 if sampling.GPU else None, notes=notes[-2:],
        )  # fmt: skip


def timed(call):
    """Return the seconds of a call."""
    import torch

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


def run_vllm(name, check, emit):
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
        model=folder, dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True, gpu_memory_utilization=0.7, seed=0,
        max_model_len=1024, max_num_seqs=max(ROWS), disable_log_stats=True, enable_prefix_caching=False, **extra,
    )  # fmt: skip
    emit(start_seconds=time.perf_counter() - start)
    settings = SamplingParams(n=GROUP, temperature=1.0, max_tokens=NEW, ignore_eos=True, detokenize=False, logprobs=0)
    for rows in ROWS:
        prompts = [{"prompt_token_ids": ids} for ids in make_prompts(rows // GROUP, config.vocab_size)]
        seconds = [timed(lambda: llm.generate(prompts, settings, use_tqdm=False)) for _ in range(1 + TIMES)]  # noqa: B023
        emit(rows=rows, ms_per_step=1e3 * statistics.median(seconds[1:]) / NEW)


def run_side(side, name, check=False):
    """Run one side in this process, and print its results as JSON lines."""
    {"ours": run_ours, "vllm": run_vllm}[side](
        name, check, lambda **values: print("RESULT", json.dumps({"shape": name, "side": side} | values), flush=True)
    )


def start_side(side, name, limit):
    """Run one side in its own process; return its results, and the end of its output if it failed."""
    command = [sys.executable, __file__, "side", side, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=os.environ | IN_PROCESS)
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        output, code = str(error.stdout or b""), "time limit"
    results = [json.loads(line.removeprefix("RESULT ")) for line in output.splitlines() if line.startswith("RESULT ")]
    if code != 0:
        results.append({"shape": name, "side": side, "failed": code, "output": output[-1500:]})
    return results


def to_row(name, rows, results):
    """Return the row of benchmarks/results for one shape and number of rows, from the results of both sides."""
    import torch

    sides = {result["side"]: result for result in results if result["shape"] == name and result.get("rows") == rows}
    ours, peer = (sides.get(side, {}).get("ms_per_step") for side in ("ours", "vllm"))
    reach = REACH.get(name, (None, None))[ROWS.index(rows)]
    return {
        "bench": f"families/decode/{name}/{rows}", "what": f"a token step of {rows} rows, prompt {PROMPT}, {NEW} new tokens",
        "ours": ours, "peer": peer, "peer_name": "vLLM 0.22.1, without LoRA", "ratio": ours / peer if ours and peer else None,
        "unit": "ms", "reach": reach and f"at most {reach} of vLLM", "met": ours <= reach * peer if ours and peer and reach else None,
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
        "command": f"python benchmarks/families.py {name}", "date": datetime.date.today().isoformat(), "detail": sides.get("ours"),
    }  # fmt: skip


def keep(rows):
    """Put the rows in the place of earlier ones of the same name."""
    stored = {row["bench"]: row for row in json.loads(OUT.read_text())} if OUT.exists() else {}
    stored |= {row["bench"]: row for row in rows}
    OUT.write_text("[\n" + ",\n".join(json.dumps(stored[name]) for name in sorted(stored)) + "\n]\n")


def main():
    """Run the shapes; print each result when it is there, and store a row for each shape and number of rows."""
    if sys.argv[1:2] == ["side"]:
        return run_side(*sys.argv[2:4])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--sides", default="ours,vllm")
    parser.add_argument("--limit", type=int, default=200, help="seconds for one side of one shape")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.check:
        return run_side("ours", "gemma3_1b", check=True)
    for name in options.shapes or SHAPES:
        results = [row for side in options.sides.split(",") for row in start_side(side, name, options.limit)]
        for result in results:
            print(json.dumps(result), flush=True)
        keep([to_row(name, rows, results) for rows in ROWS])


if __name__ == "__main__":
    main()
