"""Measure the accuracy of TRL 1.16 over seconds of training, on the job of a grpo_core configuration.

    pip install --no-deps trl==1.16.0
    python benchmarks/learning.py OUT.jsonl [--config FILE] [--micro-batch ROWS] [--steps N] [--every N] [section.key=value ...]
    python benchmarks/learning.py --check      one short step with the built-in model, without TRL's where TRL is missing

The configuration sets model, LoRA, prompts, rewards, group size, completions per step, learning rate, warm-up, temperature
and loss. Every --every steps TRL's policy answers the held-out problems greedily; the seconds leave this time out. For
grpo_core, `python -m grpo_core train --config FILE` writes the same numbers to metrics.jsonl and evaluation.jsonl.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("WANDB_DISABLED", "true")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from grpo_core.config.files import load
from grpo_core.data.word_problems import make_word_problems
from grpo_core.objective.rewards import REWARDS, correct_answer
from grpo_core.scoring.reward_call import list_needed_columns

GPU = torch.cuda.is_available()
BUILTIN = ROOT / "grpo_core" / "builtin" / "tiny"
SHORT = [
    f"model.path={BUILTIN}", "data.prompt=template", "trainer.num_steps=1", "trainer.completions_per_step=8", "sampling.group_size=4",
    "sampling.max_new_tokens=8", "evaluation.num_tasks=4",
]  # fmt: skip


def make_rows(config, split, count):
    """Return rows of the built-in problems; the column `prompt`, which TRL reads, has the prompt of grpo_core."""
    chat = config.data.prompt == "chat"
    rows = make_word_problems(split, count)
    for row in rows:
        text = config.data.template.format(**row)
        row["prompt"] = [{"role": "user", "content": text}] if chat else text
    return rows


def get_text(completion):
    """Return the text of a completion; TRL passes a string, or a list of messages for chats."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def build_reward(config, end_ids):
    """Return a reward function for TRL: the weighted sum of the configuration's rewards.

    With truncation.name zero_reward, completions that do not end with one of `end_ids` have the reward 0.
    """
    functions = [(REWARDS.build(reward.name, reward.args), reward.weight) for reward in config.rewards]
    zero = config.truncation.name == "zero_reward"
    assert zero or config.truncation.name == "keep", config.truncation.name

    def reward(completions, completion_ids, **columns):
        texts, totals = [get_text(completion) for completion in completions], [0.0] * len(completions)
        for function, weight in functions:
            arguments = {name: columns[name] for name in list_needed_columns(function) if name in columns}
            totals = [total + weight * value for total, value in zip(totals, function(texts, **arguments), strict=True)]
        return [0.0 if zero and ids[-1] not in end_ids else total for total, ids in zip(totals, completion_ids, strict=True)]

    return reward


class Clock(TrainerCallback):
    """Measure the seconds of training, without evaluation, and the accuracy every `every` steps."""

    def __init__(self, config, tokenizer, every, out):
        self.tokenizer, self.every, self.out, self.seconds = tokenizer, every, out, 0.0
        self.width, self.problems = config.sampling.max_new_tokens, make_rows(config, "test", config.evaluation.num_tasks)
        self.start = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.record(0, model)
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if GPU:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.start
        if state.global_step % self.every == 0 or state.global_step == args.max_steps:
            self.record(state.global_step, model)

    @torch.no_grad()
    def record(self, step, model):
        """Answer the held-out problems greedily; print the row and add it to the file."""
        was_training, texts = model.training, []
        model.eval()
        prompts = [row["prompt"] for row in self.problems]
        if not isinstance(prompts[0], str):
            prompts = [
                self.tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts
            ]
        self.tokenizer.padding_side = "left"
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        for begin in range(0, len(prompts), 500):
            inputs = {key: values[begin : begin + 500] for key, values in batch.items()}
            output = model.generate(**inputs, do_sample=False, max_new_tokens=self.width, use_cache=True)
            texts += self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        model.train(was_training)
        scores = correct_answer(texts, answer=[row["answer"] for row in self.problems])
        peak = torch.cuda.max_memory_allocated() / 1e9 if GPU else None
        row = {
            "step": step,
            "seconds": round(self.seconds, 3),
            "correct": int(sum(scores)),
            "n": len(scores),
            "peak_memory_gb": peak,
        }
        print(json.dumps(row), flush=True)
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def check():
    """Take one short step where TRL is installed; elsewhere measure the accuracy and the rewards of this side."""
    with tempfile.TemporaryDirectory() as folder:
        out, config = Path(folder) / "out.jsonl", load(ROOT / "configs" / "experiments" / "word_problems.yaml", SHORT)
        if importlib.util.find_spec("trl"):
            train(config, out, micro_batch=8, steps=1, every=1)
        else:
            clock = Clock(config, AutoTokenizer.from_pretrained(config.model.path), 1, out)
            clock.record(0, AutoModelForCausalLM.from_pretrained(config.model.path))
        assert json.loads(out.read_text().splitlines()[0])["n"] == 4
        rows = make_rows(config, "train", 2)
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        reward = build_reward(config, end_ids={1})
        assert len(reward(["a", "b"], [[3, 1], [3, 4]], **columns)) == 2


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--check", action="store_true", help="a small form, which records nothing")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "experiments" / "word_problems.yaml")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    if options.check:
        check()
        return
    if options.out is None:
        parser.error("OUT.jsonl is missing")
    options.out.unlink(missing_ok=True)
    config = load(options.config, options.overrides)
    train(config, options.out, options.micro_batch, options.steps, options.every)


def train(config, out, micro_batch, steps, every):
    """Train with TRL as the configuration says, and add a row to `out` every `every` steps."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    loss, engine, trainer_config = config.loss, config.engine, config.trainer
    assert (loss.name, loss.average, loss.kl_coef, config.advantage.name) == ("grpo", "token", 0.0, "grpo"), loss
    assert (trainer_config.num_minibatches, trainer_config.num_passes, engine.schedule) == (1, 1, "constant")
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    end_ids = set()  # of end-of-sequence tokens; filled below, because the trainer determines them
    steps = steps or trainer_config.num_steps
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(), seed=config.seed, use_cpu=not GPU, bf16=GPU, report_to=[], disable_tqdm=True,
        save_strategy="no", logging_steps=1, max_steps=steps, per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=trainer_config.completions_per_step // micro_batch, gradient_checkpointing=False,
        num_generations=config.sampling.group_size, max_completion_length=config.sampling.max_new_tokens,
        temperature=config.sampling.temperature, beta=0.0, loss_type="dapo", scale_rewards="group", epsilon=0.2,
        learning_rate=engine.learning_rate,
        lr_scheduler_type="constant_with_warmup", warmup_steps=engine.warmup_steps, weight_decay=engine.weight_decay,
        adam_beta2=engine.beta2, max_grad_norm=engine.max_grad_norm,
        model_init_kwargs={"dtype": "bfloat16" if GPU else "float32"},
    )  # fmt: skip
    lora = config.lora
    trainer = GRPOTrainer(
        model=config.model.path, reward_funcs=build_reward(config, end_ids), args=arguments, processing_class=tokenizer,
        train_dataset=Dataset.from_list(make_rows(config, "train", 20_000)), callbacks=[Clock(config, tokenizer, every, out)],
        peft_config=LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM"),
    )  # fmt: skip
    end_ids.update(trainer.eos_token_ids)
    trainer.train()


if __name__ == "__main__":
    main()
