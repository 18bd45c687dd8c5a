"""Compare a whole training step with TRL's in the same run: same model, LoRA, prompts, completions, precision and rewards.

    python benchmarks/update.py [--out FILE] [WORKLOAD ...]     on a GPU: step, large, memory, memory_4, card, taught; on a CPU: cpu
    python benchmarks/update.py --check                         one short step of grpo_core with the built-in policy; records nothing
    python benchmarks/update.py one SIDE JOB.json               one side of one job in this process; the other commands start it

The model is a folder with random weights of Qwen2.5-1.5B's shape (on a CPU the built-in policy). All prompts of a job have
the same number of tokens. Hardly any completion ends before its full length, except in the workloads cpu, card and
taught; in the last two 400 tokens of the vocabulary end a completion. The comparison needs trl==1.16.0; only the benchmarks need it.
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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
OUT = ROOT / "benchmarks" / "results" / "update.json"
GPU = torch.cuda.is_available()
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
VOCABULARY = 151_936


def pseudo_reward(completions, **columns):
    """Return a number in [0, 1) that depends on the text alone; two texts hardly ever have the same."""
    return [(sum(map(ord, text)) * 2654435761 % 2**32) / 2**32 for text in completions]


def make_model(folder: Path, num_ends: int = 1) -> Path:
    """Write a model of Qwen2.5-1.5B's shape, random weights, built-in tokenizer; `num_ends` tokens end a completion."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = Qwen2ForCausalLM(
                Qwen2Config(
                    vocab_size=VOCABULARY, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                    num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32_768,
                    bos_token_id=None, eos_token_id=1, pad_token_id=0,
                )
            )  # fmt: skip
        torch.set_default_dtype(torch.float32)
        model.generation_config.eos_token_id = list(range(1, 1 + num_ends)) if num_ends > 1 else 1
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(ROOT / "grpo_core" / "builtin" / "tiny").save_pretrained(folder)
    return folder


def make_prompts(file: Path, tokenizer, length: int, count: int) -> Path:
    """Write `count` different prompts of exactly `length` tokens."""
    rows, generator = [], torch.Generator().manual_seed(0)
    while len(rows) < count:
        text, digits = "", torch.randint(10, (length,), generator=generator).tolist()
        for digit in digits:
            longer = f"{text} {digit}".strip()
            if len(tokenizer(longer)["input_ids"]) > length:
                break
            text = longer
        while len(tokenizer(text)["input_ids"]) < length:
            text += "?"
        assert len(tokenizer(text)["input_ids"]) == length
        rows.append({"question": text, "answer": "0"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_config(job: dict, out: Path):
    """Return the job as a grpo_core configuration that writes to `out`."""
    from grpo_core.config.files import load

    overrides = [
        f"output_dir={out}", "name=bench", f"model.path={job['model']}", f"data.path={job['data']}", "data.template='{question}'",
        "data.eval_split=null", "evaluation.num_tasks=0", "checkpoint.every=0", "log.every=1", *job["overrides"],
    ]  # fmt: skip
    return load(ROOT / job["config"], overrides)


def run_ours(job: dict) -> dict:
    """Train the job with grpo_core; return the seconds of every step, memory, and numbers of the last metrics row."""
    from grpo_core.training import setup
    from grpo_core.training.trainer import train

    out = Path(tempfile.mkdtemp())
    run, _ = setup.setup(make_config(job, out))
    train(run)
    run.log.close()
    rows = [json.loads(line) for line in (out / "bench" / "metrics.jsonl").read_text().splitlines()]
    print("last row", json.dumps(rows[-1]), file=sys.stderr)
    return {
        "seconds": [row["seconds"] - row.get("seconds/checkpoint", 0) for row in rows],
        "tokens": [row["tokens"] for row in rows],
        "phases": {key: value for key, value in rows[-1].items() if key.startswith(("seconds/", "memory_gb/"))},
        "reserved": max(row.get("reserved_memory_gb", 0.0) for row in rows),
        "allocated": max(row["peak_memory_gb"] for row in rows),
        "longest": [row["length_max"] for row in rows],
        "mfu": rows[-1].get("update_mfu"), "trainable": sum(p.numel() for p in run.policy.parameters()),
        "dtype": str(next(run.policy.causal_lm.parameters()).dtype), "tokens_updated": rows[-1]["tokens_updated"],
    }  # fmt: skip


def run_trl(job: dict) -> dict:
    """Train the job with TRL; return the seconds of every step, memory, and the differences of loss and gradient."""
    os.environ.setdefault("WANDB_DISABLED", "true")
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    prompts = [json.loads(line)["question"] for line in Path(job["data"]).read_bytes().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    seconds, tokens = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            if GPU:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.start)

    def reward(completions, completion_ids, **columns):
        tokens.append(sum(map(len, completion_ids)))
        return pseudo_reward(completions)

    shape = job["shape"]
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=shape["micro_batch"],
        gradient_accumulation_steps=shape["completions"] // shape["micro_batch"], num_generations=shape["group"],
        max_completion_length=shape["width"], temperature=1.0, beta=shape["kl_coef"], loss_type="grpo", scale_rewards="group",
        use_bias_correction_kl=False,
        learning_rate=1e-5, max_steps=shape["trl_steps"], bf16=GPU, gradient_checkpointing=False, save_strategy="no",
        report_to=[], disable_tqdm=True, logging_steps=1, max_grad_norm=1.0, seed=0, use_cpu=not GPU,
        model_init_kwargs={"dtype": "bfloat16" if GPU else "float32"}, **job.get("trl", {}),
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=str(job["model"]), reward_funcs=reward, args=arguments, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]), callbacks=[Clock()],
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=shape["targets"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    last_inputs, compute_loss = {}, trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: last_inputs.update(inputs) or compute_loss(model, inputs)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    memory = (torch.cuda.max_memory_reserved() / 1e9, torch.cuda.max_memory_allocated() / 1e9) if GPU else (0.0, 0.0)
    model = trainer.accelerator.unwrap_model(trainer.model)
    with trainer.compute_loss_context_manager():
        differences = compare_losses(model, compute_loss(trainer.model, last_inputs), last_inputs, trainer.current_gradient_accumulation_steps, job)
    return {
        "seconds": seconds, "tokens": tokens, **differences, "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "dtype": str(next(p for p in model.parameters() if not p.requires_grad).dtype),
        "reserved": memory[0], "allocated": memory[1],
    }  # fmt: skip


def compare_losses(model, trl_loss, inputs, num_micro_batches, job) -> dict:
    """Return the differences of loss and gradient between `trl_loss` and grpo_core, on TRL's last batch and weights."""
    from grpo_core.batch import Rollouts, TrainBatch
    from grpo_core.model.policy import Policy
    from grpo_core.monitor.aggregates import Stats
    from grpo_core.objective.token_weights import Totals
    from grpo_core.training.control import first_control
    from grpo_core.training.prepare import build_objective
    from grpo_core.training.update import micro_loss

    weights = [p for p in model.parameters() if p.requires_grad]
    trl_gradient = torch.cat([g.flatten().double() for g in torch.autograd.grad(trl_loss, weights)])
    config = make_config(job, Path("unused"))
    mask = inputs["completion_mask"].bool()
    sampled = inputs.get("sampling_per_token_logps")
    sampled = torch.zeros(mask.shape, device=mask.device) if sampled is None else sampled
    rollouts = Rollouts(
        inputs["prompt_ids"], inputs["prompt_mask"].bool(), inputs["completion_ids"], mask, sampled, mask[:, -1]
    )
    micro = TrainBatch(rollouts, inputs["advantages"][:, None], mask, None, inputs.get("old_per_token_logps"), inputs["ref_per_token_logps"])
    tokens, rows = mask.sum() * num_micro_batches, torch.tensor(len(mask) * num_micro_batches, device=mask.device)
    totals = Totals(tokens, rows, config.sampling.max_new_tokens, tokens, num_micro_batches)
    loss = micro_loss(build_objective(config), micro, Policy(model.eval()).forward(rollouts), totals, first_control(config.loss), Stats())
    gradient = torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, weights)])
    return {
        "loss_difference": abs(float(loss) - float(trl_loss)),
        "gradient_difference": float((gradient - trl_gradient).norm() / trl_gradient.norm()),
    }


def run_side(side: str, job: dict, limit: float = 540) -> dict:
    """Run one side of a job in a process of its own, for at most `limit` seconds, and return its result."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job, default=str))
        process = subprocess.run(
            [sys.executable, __file__, "one", side, str(file)], capture_output=True, text=True, timeout=limit
        )
    if process.returncode:
        raise RuntimeError(process.stderr[-3000:])
    print(process.stderr[-900:] if side == "ours" else "", process.stdout[-1500:], file=sys.stderr)
    return json.loads(process.stdout.splitlines()[-1])


def median_after_first(values: list[float]) -> float:
    """Return the median without the first value, because the first step builds graphs and plans."""
    return statistics.median(values[1:] or values)


def gpu_job(folder: Path, *, completions=32, width=256, prompt=128, overrides=(), steps=6, trl_steps=3) -> dict:
    """Write model and prompts to `folder` and return a job for a GPU."""
    from transformers import AutoTokenizer

    model = make_model(folder / "model")
    data = make_prompts(folder / "prompts.jsonl", AutoTokenizer.from_pretrained(model), prompt, 256)
    shape = {"completions": completions, "group": 8, "width": width, "micro_batch": 4, "kl_coef": 0.04, "targets": TARGETS,
             "trl_steps": trl_steps}  # fmt: skip
    return {
        "model": model, "data": data, "config": "configs/gsm8k_qwen2.5_1.5b.yaml", "shape": shape,
        "overrides": [
            f"trainer.completions_per_step={completions}", f"trainer.num_steps={steps}", f"sampling.max_new_tokens={width}",
            f"rewards=[{{name: '{Path(__file__)}:pseudo_reward'}}]", "lora.dropout=0", "engine.deepspeed=ds_zero2.json",
            "engine.learning_rate=1e-5", *overrides,
        ],
    }  # fmt: skip


def step_32(folder):
    job = gpu_job(folder)
    return compare("update/step_32", "32 completions of 256 tokens, prompt 128, G 8, kl_coef 0.04", job, "<= 1.2 s, >= 12 times TRL",
                   lambda a, b: a <= 1.2 and b / a >= 12)  # fmt: skip


def large(folder):
    job = gpu_job(folder, completions=256, width=512, steps=4)
    return compare("update/step_256", "256 completions of 512 tokens, prompt 128", job, "<= 8 s", lambda a, b: a <= 8, with_peer=False)


def memory(folder, tokens="auto", name="update/memory"):
    """Measure 32 completions in a process that may allocate 5.0 GB."""
    overrides = [f"trainer.tokens_per_micro_batch={tokens}", "model.gradient_checkpointing=true"]
    job = gpu_job(folder, overrides=overrides) | {"cap_gb": 5.0}
    return compare(name, f"32 completions of 256 tokens in 5.0 GB, {tokens} tokens a micro-batch, checkpointing", job,
                   "<= 5.0 GB reserved, <= 2.5 s", lambda a, b: a <= 2.5, with_peer=False)  # fmt: skip


def memory_4(folder):
    """Measure the workload memory with micro-batches of 4 completions, as TRL has in the workload step."""
    return memory(folder, 1536, "update/memory_4")


def card(folder):
    """Run the recipe's configuration as shipped in 7.5 GB of a card with 8 GB: completions of all lengths up to 1,024 tokens."""
    job = gpu_job(folder)
    job |= {"model": make_model(folder / "ends", num_ends=400), "cap_gb": 7.5}
    job["overrides"] = ["trainer.num_steps=20", "sampling.max_new_tokens=1024", "evaluation.num_tasks=0"]
    return compare("update/card", "recipe as shipped, process capped at 7.5 GB, up to 1,024 tokens", job,
                   "20 steps, never out of memory", lambda a, b: True, with_peer=False)  # fmt: skip


def taught(folder):
    """Run the workload card with a teacher beside the policy: the same base with another adapter."""
    job = gpu_job(folder)
    model = make_model(folder / "ends", num_ends=400)
    job |= {"model": model, "cap_gb": 7.5}
    job["overrides"] = [
        "trainer.num_steps=20", "sampling.max_new_tokens=1024", "evaluation.num_tasks=0",
        f"teacher.adapter={make_adapter(model, folder / 'teacher')}", "teacher.kl=reverse", "teacher.kl_coef=0.1",
    ]  # fmt: skip
    return compare("update/taught", "the workload card with base + two adapters: advantages and full-vocabulary KL of a teacher",
                   job, "20 steps, never out of memory", lambda a, b: True, with_peer=False)  # fmt: skip


def make_adapter(model: Path, folder: Path) -> Path:
    """Write a LoRA adapter with random weights that fits the model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    adapted = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder)
    return folder


def cpu_job(folder, steps=20):
    """Write the data to `folder` and return a job for a CPU."""
    from transformers import AutoTokenizer

    from grpo_core.data.word_problems import make_word_problems

    model = ROOT / "grpo_core" / "builtin" / "tiny"
    data = folder / "problems.jsonl"
    rows = [{"question": f"Question: {row['question']}\n", "answer": row["answer"]} for row in make_word_problems("train", 512)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    AutoTokenizer.from_pretrained(model)
    shape = {"completions": 128, "group": 8, "width": 48, "micro_batch": 64, "kl_coef": 0.01, "targets": "all-linear", "trl_steps": steps}
    return {
        "model": model, "data": data, "config": "configs/tiny.yaml", "shape": shape,
        "overrides": [f"rewards=[{{name: '{Path(__file__)}:pseudo_reward'}}]", f"trainer.num_steps={steps}", "engine.learning_rate=1e-5"],
    }  # fmt: skip


def short_job(folder):
    """Return the job of `cpu_job` with a step of 8 short completions."""
    job = cpu_job(folder, steps=1)
    short = ["trainer.completions_per_step=8", "sampling.group_size=4", "sampling.max_new_tokens=8"]
    return job | {"overrides": [*job["overrides"], *short]}


def check(folder):
    return compare("update/check", "tiny.yaml: 8 completions of up to 8 tokens", short_job(folder), "runs", lambda a, b: a > 0, with_peer=False)


def cpu(folder):
    job = cpu_job(folder)
    return compare("update/cpu", "tiny.yaml: 128 completions of up to 48 tokens, 2 threads, one process", job, ">= 3 times TRL",
                   lambda a, b: b / a >= 3)  # fmt: skip


def check_same_job(ours, peer):
    """Raise AssertionError if the sides differ in the number of trained weights, precision, tokens, loss or gradient."""
    assert ours["trainable"] == peer["trainable"] and ours["dtype"] == peer["dtype"], (ours, peer)
    assert 0.9 < statistics.mean(ours["tokens"]) / statistics.mean(peer["tokens"]) < 1.1, (ours["tokens"], peer["tokens"])
    assert peer["loss_difference"] < 1e-3 and peer["gradient_difference"] < (0.1 if GPU else 1e-3), peer


def compare(bench, workload, job, reach, met, with_peer=True) -> dict:
    """Run the job's sides and return a row; `met` is a function of the seconds of grpo_core and of TRL."""
    ours, peer = run_side("ours", job), run_side("trl", job) if with_peer else None
    a, b = median_after_first(ours["seconds"]), median_after_first(peer["seconds"]) if peer else None
    if peer:
        check_same_job(ours, peer)
    keys = ("tokens", "reserved", "allocated", "phases", "mfu", "longest", "tokens_updated", "loss_difference", "gradient_difference")
    return {
        "bench": bench, "workload": workload, "ours": {"seconds": round(a, 3), **{k: ours[k] for k in keys if k in ours}},
        "peer": {"name": "trl", "seconds": round(b, 3), **{k: peer[k] for k in keys if k in peer}} if peer else None,
        "ratio": round(b / a, 2) if b else None, "reach": reach, "met": bool(met(a, b)),
    }  # fmt: skip


def stamp() -> dict:
    """Return hardware, versions and date, which every row has."""

    def get_version(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    names = ("torch", "transformers", "peft", "deepspeed", "trl")
    hardware = torch.cuda.get_device_name() if GPU else f"{platform.machine()}, {os.cpu_count()} cores"
    return {"hardware": hardware, "versions": {n: get_version(n) for n in names}, "date": datetime.date.today().isoformat()}


def record(file: Path, row: dict) -> None:
    """Write a row to the file; it replaces the row with the same name and hardware."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    others = [other for other in rows if (other["bench"], other["hardware"]) != (row["bench"], row["hardware"])]
    file.write_text("".join(json.dumps(each_row) + "\n" for each_row in [*others, row]))


WORKLOADS = {"step": step_32, "large": large, "memory": memory, "memory_4": memory_4, "card": card, "taught": taught} if GPU else {"cpu": cpu}

if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        job = json.loads(Path(sys.argv[3]).read_text())
        if "cap_gb" in job:
            torch.cuda.set_per_process_memory_fraction(job["cap_gb"] * 1e9 / torch.cuda.get_device_properties(0).total_memory)
        print(json.dumps({"ours": run_ours, "trl": run_trl}[sys.argv[2]](job)))
        sys.stdout.flush()
        os._exit(0)  # at a normal exit, process groups and engines may wait for each other
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--check", action="store_true", help="take one short step of grpo_core and record nothing")
    parser.add_argument("workloads", nargs="*", choices=[*WORKLOADS, []])
    options = parser.parse_args()
    if options.check:
        options.workloads, WORKLOADS["check"], options.out = ["check"], check, Path(os.devnull)
    for name in options.workloads or WORKLOADS:
        with tempfile.TemporaryDirectory() as folder:
            row = WORKLOADS[name](Path(os.environ.get("BENCH_FOLDER", folder))) | stamp()
        print(json.dumps(row), flush=True)
        record(options.out, row)
