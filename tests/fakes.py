"""Small real things for tests: a two-layer random model with LoRA, an engine without DeepSpeed, an alphabet."""

from dataclasses import dataclass, field, replace

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_core.batch import Rollouts, Task
from grpo_core.model.policy import Policy
from grpo_core.training.engine import StepResult
from grpo_core.training.freeze import freeze

PAD, EOS, VOCAB = 0, 1, 16


def tiny_policy(seed=0, *, lora_noise=0.0, dropout=0.0, temperature=1.0, gradient_checkpointing=False) -> Policy:
    """A random Qwen2 with LoRA on all of q, v, up and down; `lora_noise` moves the adapter away from zero."""
    torch.manual_seed(seed)
    base = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2, eos_token_id=EOS, pad_token_id=PAD, bos_token_id=None,
        )
    )  # fmt: skip
    if gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, PeftLoraConfig(r=8, lora_dropout=dropout, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and lora_noise:
                parameter.normal_(0, lora_noise)
    return Policy(model, temperature=temperature, chunk_size=7)


class Alphabet:
    """A tokenizer whose token i is the i-th letter."""

    pad_token_id, eos_token_id, chat_template = PAD, EOS, None

    def batch_decode(self, rows, skip_special_tokens=True):
        return ["".join(chr(97 + i) for i in row if i not in (PAD, EOS)) for row in rows]

    def __call__(self, texts, add_special_tokens=True, return_attention_mask=True):
        return {"input_ids": [[ord(c) - 97 for c in text if "a" <= c <= "p"] for text in texts]}

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)

    def save_pretrained(self, folder):
        pass


class TorchEngine:
    """The calls the trainer makes, on plain AdamW in one process."""

    def __init__(self, parameters, learning_rate=2e-2, max_grad_norm=1.0, weight_decay=0.0):
        self.parameters, self.max_grad_norm = parameters, max_grad_norm
        self.optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
        self.learning_rate, self.backwards, self.scales_loss = learning_rate, 0, False

    def backward(self, loss):
        self.backwards += 1
        loss.backward()

    def step(self):
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        if not norm.isfinite():
            self.optimizer.zero_grad()
            return StepResult(float(norm), self.learning_rate, False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(float(norm), self.learning_rate, True)

    def by_gradient_descent(self, learning_rate=0.1):
        """Weights that are as far apart as gradients: AdamW magnifies rounding wherever a gradient is near 0."""
        self.optimizer = torch.optim.SGD(self.parameters, lr=learning_rate)

    def tensors(self):
        yield from ((f"weight/{i}", p.detach()) for i, p in enumerate(self.parameters))

    def numbers(self):
        return {}


@dataclass
class FixedTasks:
    """The same few tasks at every step, with fresh seeds."""

    prompts: list[list[int]] = field(default_factory=lambda: [[5, 6, 7], [8, 9], [4], [10, 11, 12, 13]])

    @property
    def tasks(self):
        return self.batch(0)

    def batch(self, step):
        return [Task(i, "p", ids, {"answer": "x", "row": i}, seed=(0, step, i)) for i, ids in enumerate(self.prompts)]

    def replacements(self, step, attempt):
        whole = len(self.prompts)
        return [
            replace(task, index=i + 100 * attempt, columns={"answer": "x", "row": i + 100 * attempt}, seed=(0, step, attempt * whole + i))
            for i, task in enumerate(self.batch(step))
        ]  # fmt: skip


def ragged_rollouts(batch=8, prompt_width=5, width=6, seed=0, side="left") -> Rollouts:
    """Random rollouts with ragged prompts and completions."""
    generator = torch.Generator().manual_seed(seed)
    prompt_lengths = torch.randint(1, prompt_width + 1, (batch, 1), generator=generator)
    lengths = torch.randint(1, width + 1, (batch, 1), generator=generator)
    lengths[0] = width
    prompts = [torch.randint(2, VOCAB, (int(n),), generator=generator) for n in prompt_lengths]
    places = torch.arange(prompt_width)
    ids = torch.full((batch, prompt_width), PAD)
    mask = places >= prompt_width - prompt_lengths if side == "left" else places < prompt_lengths
    for row, prompt in enumerate(prompts):
        ids[row, mask[row]] = prompt
    completion_mask = torch.arange(width) < lengths
    completion_ids = torch.randint(2, VOCAB, (batch, width), generator=generator).masked_fill(~completion_mask, PAD)
    logprobs = -torch.rand(batch, width, generator=generator) * completion_mask
    return Rollouts(ids, mask, completion_ids, completion_mask, logprobs, torch.zeros(batch, dtype=torch.bool))


def frozen_batch(run, rollouts, advantages, trained=None):
    """The batch that the loop would update on, for given advantages."""
    frozen = freeze(run.policy, run.objective, run.budgets.forward, rollouts, trained)
    return frozen.with_advantages(advantages)


def with_objective(run, **fields):
    """The run with other functions or switches in its objective."""
    return replace(run, objective=replace(run.objective, **fields))
