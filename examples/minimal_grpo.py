"""GRPO in about a hundred lines: sample groups of completions, score them, make the better ones more probable.

    python examples/minimal_grpo.py

The script trains the built-in model on arithmetic word problems and prints its accuracy on held-out problems before and
after. It takes about 80 seconds on one free CPU core. Copy the file to write a trainer of your own.

Shapes: N prompts in a step, G completions of each prompt (a group), B = N * G completions, C tokens in the longest one.
Row n * G + g of a [B, ...] tensor is completion g of prompt n. Column t of a [B, C] tensor is completion token t.

The trainer (`python -m grpo_core train`, grpo_core/training/trainer.py) takes the same steps; tests/test_examples.py
compares the weights. It adds what is left out here: several processes and GPUs, DeepSpeed, 16-bit precision,
micro-batches that fit into memory, a KL penalty, an entropy bonus, learning-rate schedules, rewards that fail, logs and
checkpoints.
"""

import torch

from grpo_core import ADVANTAGES, LOSSES, REWARDS
from grpo_core.batch import Task
from grpo_core.config.sections import DataConfig, LoraConfig, ModelConfig
from grpo_core.data.prompts import make_tasks
from grpo_core.data.stream import TaskStream
from grpo_core.data.word_problems import make_word_problems
from grpo_core.model.loading import load_tokenizer
from grpo_core.model.policy import Policy, load_policy
from grpo_core.model.quieten import quieten
from grpo_core.objective.token_weights import Totals, token_weights
from grpo_core.sampling.sampler import Sampler

MODEL = "builtin:tiny"  # a Qwen2 of 1 million weights that comes with the package
NUM_STEPS = 30
PROMPTS_PER_STEP = 16  # N
GROUP_SIZE = 8  # G
MAX_NEW_TOKENS = 48
UPDATES_PER_STEP = 2  # optimizer steps on the same completions; the clip in the loss acts from the second on
LEARNING_RATE = 1e-3
SEED = 0

correct_answer = REWARDS.get("correct_answer")  # 1.0 if the last number of a completion is the right one, else 0.0
group_advantages = ADVANTAGES.get("grpo")  # (reward - mean of the group) / standard deviation of the group
grpo_loss = LOSSES.get("grpo")  # -min(ratio * advantage, clip(ratio, 0.8, 1.2) * advantage) for every token


def load() -> tuple[Policy, Sampler, list[Task], list[Task]]:
    """Return the policy, its sampler, the tasks to train on and the held-out tasks."""
    lora = LoraConfig(r=16, alpha=32, target_modules="all-linear")
    policy = load_policy(ModelConfig(MODEL), lora, dtype=torch.float32, temperature=1.0)
    tokenizer = load_tokenizer(MODEL)
    sampler = Sampler(policy.model, tokenizer, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0)
    data = DataConfig(template="Question: {question}\n")  # the prompt; the other column that matters here is `answer`
    tasks, _ = make_tasks(make_word_problems("train", 2_000), data, tokenizer)
    held_out_tasks, _ = make_tasks(make_word_problems("test", 500), data, tokenizer)
    return policy, sampler, tasks, held_out_tasks


def train_step(policy: Policy, sampler: Sampler, optimizer: torch.optim.Optimizer, tasks: list[Task]) -> float:
    """Take one GRPO step on N tasks and return the mean reward of its completions."""
    # Sample from the current weights.
    rollouts = sampler.generate(tasks, GROUP_SIZE)  # B completions
    mask = rollouts.completion_mask  # [B, C] true for sampled tokens, false for padding

    # Score every completion.
    answers = [task.columns["answer"] for task in tasks for _ in range(GROUP_SIZE)]  # B right answers
    rewards = torch.tensor(correct_answer(rollouts.completions, answer=answers)).view(-1, GROUP_SIZE)  # [N, G]

    # Compare each completion with the others of its group: this is what GRPO has in place of a value network.
    advantages = group_advantages(rewards).view(-1, 1)  # [B, 1], the same for all tokens of a completion

    # Average over tokens within a completion, then over completions.
    totals = Totals(tokens=mask.sum(), completions=torch.tensor(len(mask)), max_new_tokens=MAX_NEW_TOKENS)
    weights = token_weights(mask, average="sequence", totals=totals)  # [B, C], 0 in the padding, with sum 1

    # The loss clips the ratio of a token's probability to that before the first update, so that no update goes far.
    with torch.no_grad():
        old_logprobs = policy.logprobs(rollouts)  # [B, C]
    for _ in range(UPDATES_PER_STEP):
        logprobs = policy.logprobs(rollouts)  # [B, C] with gradient
        token_loss = grpo_loss(logprobs, old_logprobs, advantages, mask).per_token_loss  # [B, C]
        (token_loss * weights).sum().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    return rewards.mean().item()


def evaluate(sampler: Sampler, tasks: list[Task]) -> float:
    """Return the share of tasks that the policy answers right when it always takes the most probable token."""
    completions = sampler.generate(tasks, group_size=1, greedy=True).completions
    correct = correct_answer(completions, answer=[task.columns["answer"] for task in tasks])
    return sum(correct) / len(correct)


def train(
    policy: Policy, sampler: Sampler, tasks: list[Task], held_out_tasks: list[Task], num_steps: int
) -> tuple[float, float]:
    """Take the steps and return the held-out accuracy before and after them."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)  # of the LoRA weights
    stream = TaskStream(tasks, PROMPTS_PER_STEP, SEED)  # passes over the tasks, each in a new random order
    before = evaluate(sampler, held_out_tasks)
    print(f"held-out accuracy before: {before:.1%}")
    for step in range(num_steps):
        reward = train_step(policy, sampler, optimizer, stream.batch(step))
        print(f"step {step + 1:2} of {num_steps}: mean reward {reward:.2f}")
    after = evaluate(sampler, held_out_tasks)
    print(f"held-out accuracy after: {after:.1%}")
    return before, after


if __name__ == "__main__":
    quieten()  # the libraries' progress bars and warnings
    torch.manual_seed(SEED)  # for the initial LoRA weights
    train(*load(), num_steps=NUM_STEPS)
