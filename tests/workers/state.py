"""Processes train a little and save; `resume` loads that in any number of processes and trains on."""

import sys
from pathlib import Path

import torch
from fakes import tiny_policy
from safetensors.torch import load_file, save_file
from workers.zero2 import run_config

from grpo_core.distributed import ranks
from grpo_core.training.engine import Engine


def gradient_steps(policy, engine, steps):
    """Every rank hands in its share of a gradient that is a function of the step."""
    for step in steps:
        loss = sum((p * torch.cos(torch.arange(p.numel()) + step).view(p.shape)).sum() for p in policy.parameters())
        engine.backward(loss / ranks.world_size())
        engine.step()


def run(folder, what):
    policy = tiny_policy(lora_noise=0.1)
    config = run_config("token", 4)
    engine = Engine(policy.model, config, dtype=torch.float32, total_steps=8, world_size=ranks.world_size())
    if what == "save":
        gradient_steps(policy, engine, range(3))
        state, numbers = dict(engine.tensors()), engine.numbers()
        if ranks.is_main():
            save_file(state, folder / "state.safetensors")
            torch.save(numbers, folder / "numbers.pt")
    else:
        state = load_file(folder / "state.safetensors")
        engine.load(state, torch.load(folder / "numbers.pt"))
        again = dict(engine.tensors())
        assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
        for name, p in zip(engine.trained, policy.parameters(), strict=True):
            assert torch.equal(p, state[f"weight/{name}"])
    gradient_steps(policy, engine, range(3, 6))
    final = dict(engine.tensors())
    if ranks.is_main():
        save_file(final, folder / f"{what}-{ranks.world_size()}.safetensors")
    ranks.barrier()


if __name__ == "__main__":
    ranks.setup()
    for what in ("save", "resume"):
        run(Path(sys.argv[1]), what)
    ranks.shutdown()
