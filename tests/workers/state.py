"""In one process: save an engine's state, take a weight out of it, try to load it."""

import sys
from pathlib import Path

import torch
from fakes import tiny_policy
from workers.zero2 import run_config

from grpo_core import distributed
from grpo_core.engine import Engine
from grpo_core.schema import ConfigError


def attempt(engine, folder):
    try:
        engine.load(folder)
        print("loaded")
    except ConfigError as error:
        print("refused:", error)


def main(folder):
    distributed.setup()
    policy = tiny_policy()
    engine = Engine(policy.model, run_config("token", 4), dtype=torch.float32, total_steps=3, world_size=1)
    engine.save(folder)
    (file,) = folder.rglob("*model_states.pt")
    state = torch.load(file, weights_only=False)
    print(f"saved {len(state['module'])} of {len(policy.parameters())}")
    del state["module"][next(iter(state["module"]))]
    torch.save(state, file)
    attempt(engine, folder)
    attempt(engine, folder / "nothing")
    distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
