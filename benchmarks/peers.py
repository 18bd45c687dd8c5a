"""Compare the sampler with vLLM, and a whole training step with TRL that samples with vLLM.

    python benchmarks/peers.py [--out FILE] [--limit SECONDS] [decode] [step]    on a GPU, with vllm==0.22.1, trl==1.16.0
    python benchmarks/peers.py --check                                           tiny shapes on a CPU; records nothing
    python benchmarks/peers.py side NAME JOB.json                                one side in this process; the other commands start it

The model has Qwen2.5-1.5B's shape and random weights in bf16; both sides load it from the same folder. Every side prints its
results as JSON lines. If a side fails or takes longer than --limit, its row is missing; the other workload still runs.

decode  32 completions of 256 tokens from 4 prompts of 128 random tokens, temperature 1, every completion to its full length, the
        log-probs of the sampled tokens returned. grpo_core applies a LoRA of rank 16 on q, k, v and o in every step. vLLM has no
        LoRA, because trainers give it merged weights, and may reuse the keys and values of earlier prompts (prefix caching, its
        default).
step    sampling, reward, reference and update of 32 such completions, kl_coef 0.04, one optimizer step, the same LoRA. TRL runs vLLM
        in its own process (colocate) and has one micro-batch of 32. By default TRL weights every completion by the ratio of its own
        probability to vLLM's (sequence_mask, 0 above 3), so grpo_core does the same; the row also has both times without it.
"""

import argparse
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
OUT = ROOT / "benchmarks" / "results" / "peers.json"
CORRECTION = "loss.rollout_correction.name=sequence_mask"
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1"}
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}


# --- the sides, each in a process of its own -------------------------------------------------------------------------


def prepare(job, emit):
    """Write the model and the prompts to job["folder"]; emit the job of the training step."""
    import update

    shape = {"completions": job["rows"], "width": job["new"], "prompt": job["prompt"]}
    emit(job=update.gpu_job(Path(job["folder"]), **shape, steps=6, trl_steps=6))


def make_prompts(job):
    """Return job["rows"] / job["group"] prompts of job["prompt"] random token ids."""
    import torch

    generator = torch.Generator().manual_seed(0)
    count = job["rows"] // job["group"]
    return torch.randint(2, job["vocabulary"], (count, job["prompt"]), generator=generator).tolist()


def emit_times(call, job, emit):
    """Emit the seconds of job["times"] calls. A first call, not counted, builds graphs and compiles kernels."""
    import torch

    for i in range(1 + job["times"]):
        start = time.perf_counter()
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if i:
            emit(seconds=time.perf_counter() - start)
    return result


def decode_ours(job, emit):
    """Sample with grpo_core; emit the seconds of every call and the GPU memory."""
    import sampling
    import torch
    from transformers import AutoModelForCausalLM

    from grpo_core.batch import Task

    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).to(sampling.DEVICE).eval()
    base.generation_config.eos_token_id = base.config.eos_token_id = None  # no completion ends before its length
    torch.manual_seed(0)
    sampler = sampling.make_sampler(sampling.add_lora(base), job["new"])
    tasks = [Task(i, "", ids, {}, (0, 0, i)) for i, ids in enumerate(make_prompts(job))]
    rollouts = emit_times(lambda: sampler.generate(tasks, job["group"]), job, emit)
    assert rollouts.completion_mask.all() and rollouts.rollout_logprobs.shape == (job["rows"], job["new"])
    if sampling.GPU:
        emit(reserved_gb=torch.cuda.max_memory_reserved() / 1e9)


def decode_vllm(job, emit):
    """Sample with vLLM; emit the seconds of its start and of every call."""
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(
        model=job["model"], dtype=job["dtype"], skip_tokenizer_init=True, gpu_memory_utilization=0.6, seed=0,
        max_model_len=job["prompt"] + job["new"] + 16, max_num_seqs=job["rows"], disable_log_stats=True,
    )  # fmt: skip
    graphs = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode
    assert graphs.has_full_cudagraphs(), graphs
    emit(start_seconds=time.perf_counter() - start, graphs=graphs.name)
    sampling_params = SamplingParams(
        n=job["group"], temperature=1.0, max_tokens=job["new"], ignore_eos=True, detokenize=False, logprobs=0
    )
    prompts = [{"prompt_token_ids": row} for row in make_prompts(job)]
    outputs = emit_times(lambda: llm.generate(prompts, sampling_params, use_tqdm=False), job, emit)
    completions = [completion for output in outputs for completion in output.outputs]
    assert len(completions) == job["rows"]
    assert all(len(completion.token_ids) == len(completion.logprobs) == job["new"] for completion in completions)


def step_ours(job, emit):
    """Train with grpo_core; emit the result of `update.run_ours`."""
    import update

    emit(**update.run_ours(job))


def step_trl(job, emit):
    """Train with TRL; emit the result of `update.run_trl`."""
    import update

    emit(**update.run_trl(job))


SIDES = {
    "prepare": (prepare, {}),
    "decode_ours": (decode_ours, {}),
    "decode_vllm": (decode_vllm, IN_PROCESS),
    "step_ours": (step_ours, {}),
    "step_trl": (step_trl, IN_PROCESS | ONE_RANK),
}


def run_in_this_process(name, job):
    """Run one side. Its results go to standard output, the output of its libraries to standard error."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def emit(**row):
        print(json.dumps({"side": name, **row}, default=str), file=results, flush=True)

    SIDES[name][0](job, emit)
    import torch  # imported late, because a side may set variables that torch and vLLM read at import

    emit(card=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")
    sys.stderr.flush()
    os._exit(0)  # at a normal exit, process groups and engines may wait for each other


def run_side(name, job, limit):
    """Run one side in a process of its own and return its results, merged; `seconds` is a list over all lines.

    Raises:
        RuntimeError: the side failed or took longer than `limit` seconds; the message ends with its last output.
    """
    results, seconds = {}, []
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job, default=str))
        environment, start = os.environ | SIDES[name][1], time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, __file__, "side", name, str(file)], stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        timer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        for line in process.stdout:
            print(line, end="", flush=True)
            row = json.loads(line)
            seconds += row["seconds"] if isinstance(row.get("seconds"), list) else [row["seconds"]] if "seconds" in row else []
            results |= row
        code = process.wait()
        timer.cancel()
        if code:
            log.seek(0)
            elapsed = time.perf_counter() - start
            raise RuntimeError(f"{name} ended with exit code {code} after {elapsed:.0f} s: {log.read()[-3000:]}")
    return results | {"seconds": seconds, "process_seconds": time.perf_counter() - start}


# --- the rows --------------------------------------------------------------------------------------------------------


def get_version(package):
    """Return the installed version of a package, None if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def make_row(bench, what, ours, peer, peer_name, max_ratio, card, **detail):
    """Return a row of peers.json; `max_ratio` is the aim for the ratio of grpo_core's time to the peer's."""
    packages = ("torch", "transformers", "peft", "deepspeed", "vllm", "trl")
    return {
        "bench": f"peers/{bench}", "what": what, "ours": round(ours, 3), "peer": round(peer, 3), "peer_name": peer_name,
        "ratio": round(ours / peer, 2), "unit": "s", "reach": f"at most {max_ratio:g}", "met": ours / peer <= max_ratio,
        "card": card, "versions": {name: get_version(name) for name in packages}, "command": f"python benchmarks/peers.py {bench}",
        "date": datetime.date.today().isoformat(), "detail": detail,
    }  # fmt: skip


def decode(job, limit):
    """Return the row of the workload `decode`."""
    ours, vllm = (run_side(name, job, limit) for name in ("decode_ours", "decode_vllm"))
    what = f"sample {job['rows']} × {job['new']} tokens, prompt {job['prompt']}, log-probs of the sampled tokens returned"
    medians = [statistics.median(side["seconds"]) for side in (ours, vllm)]
    return make_row(
        "decode", what, *medians, f"vLLM {get_version('vllm')}, without LoRA", 0.55, ours["card"], ours_each=ours["seconds"],
        peer_each=vllm["seconds"], peer_graphs=vllm["graphs"], peer_start_seconds=vllm["start_seconds"],
        ours_reserved_gb=ours["reserved_gb"],
    )  # fmt: skip


def step(job, limit):
    """Return the row of the workload `step`."""
    from update import check_same_job, median_after_first

    shape = job["step"]["shape"] | {"micro_batch": job["rows"]}
    colocated = {
        "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3,
        "vllm_max_model_length": job["prompt"] + job["new"] + 16,
    }  # fmt: skip
    jobs = {
        "corrected": job["step"] | {"shape": shape, "trl": colocated, "overrides": [*job["step"]["overrides"], CORRECTION]},
        "uncorrected": job["step"] | {"shape": shape, "trl": colocated | {"vllm_importance_sampling_correction": False}},
    }
    ours = run_side("step_ours", jobs["corrected"], limit)
    trl = run_side("step_trl", jobs["corrected"], limit)
    check_same_job(ours, trl)
    try:
        uncorrected_seconds = {side: run_side(f"step_{side}", jobs["uncorrected"], limit)["seconds"] for side in ("ours", "trl")}
    except RuntimeError as error:
        print(json.dumps({"side": "uncorrected", "error": str(error)}), flush=True)
        uncorrected_seconds = None
    what = f"a whole step: {job['rows']} × {job['new']} tokens, prompt {job['prompt']}, LoRA r 16, kl_coef {shape['kl_coef']}"
    return make_row(
        "step", what, median_after_first(ours["seconds"]), median_after_first(trl["seconds"]),
        f"TRL {get_version('trl')} with vLLM {get_version('vllm')}, micro-batch {job['rows']}", 0.37, ours["card"],
        ours_each=ours["seconds"], peer_each=trl["seconds"], ours_reserved_gb=ours["reserved"], peer_reserved_gb=trl["reserved"],
        ours_phases=ours["phases"], seconds_without_correction=uncorrected_seconds, loss_difference=trl["loss_difference"],
        gradient_difference=trl["gradient_difference"],
    )  # fmt: skip


WORKLOADS = {"decode": decode, "step": step}


def record(file, row):
    """Write a row to the file; it replaces the row with the same workload and card."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    others = [other for other in rows if (other["bench"], other["card"]) != (row["bench"], row["card"])]
    file.write_text("".join(json.dumps(each_row) + "\n" for each_row in [*others, row]))


def table(file=OUT):
    """Return the rows of `file` as a Markdown table."""
    lines = ["| Qwen2.5-1.5B's shape, bf16 | grpo_core | other | our time / the other's |", "|---|---|---|---|"]
    for row in map(json.loads, file.read_text().splitlines()):
        cells = [f"{row['what']} ({row['card']})", f"{row['ours']:.3g} s", f"{row['peer_name']}: {row['peer']:.3g} s", f"{row['ratio']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- the command -----------------------------------------------------------------------------------------------------


def check():
    """Run what a CPU can on tiny shapes: both sides of grpo_core, and TRL without vLLM if TRL is installed."""
    import update

    with tempfile.TemporaryDirectory() as folder:
        decode_job = {
            "model": ROOT / "grpo_core" / "builtin" / "tiny", "dtype": "float32", "rows": 8, "group": 4, "prompt": 16, "new": 8,
            "times": 1, "vocabulary": 64,
        }  # fmt: skip
        step_job = update.cpu_job(Path(folder), steps=2)
        run_side("decode_ours", decode_job, 300)
        run_side("step_ours", step_job | {"overrides": [*step_job["overrides"], CORRECTION]}, 300)
        if get_version("trl"):
            run_side("step_trl", step_job, 300)
    print(json.dumps({"side": "decode_vllm", "skipped": "vLLM needs a GPU"}), flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--limit", type=float, default=400, help="seconds after which a side is killed")
    parser.add_argument("--check", action="store_true", help="run tiny shapes on a CPU and record nothing")
    parser.add_argument("workloads", nargs="*", choices=[*WORKLOADS, []])
    options = parser.parse_args()
    if options.check:
        return check()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(os.environ.get("BENCH_FOLDER", folder))
        job = {
            "folder": folder, "model": folder / "model", "dtype": "bfloat16", "rows": 32, "group": 8, "prompt": 128, "new": 256,
            "times": 7, "vocabulary": 150_000,
        }  # fmt: skip
        job["step"] = run_side("prepare", job, options.limit)["job"]
        for name in options.workloads or WORKLOADS:
            try:
                row = WORKLOADS[name](job, options.limit)
            except (RuntimeError, AssertionError) as error:
                print(json.dumps({"bench": f"peers/{name}", "error": str(error)}), flush=True)
                failed = True
                continue
            print(json.dumps(row), flush=True)
            record(options.out, row)
    print(table(options.out) if options.out.exists() else "no row was measured")
    return int(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["side"]:
        run_in_this_process(sys.argv[2], json.loads(Path(sys.argv[3]).read_text()))
    sys.exit(main())
