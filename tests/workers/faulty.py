"""python -m grpo_core with a fault in it. FAULT in the environment is JSON: on which rank, where, at which call, what.

As the launcher (`launch ...`) it starts its ranks through this file; as a rank it causes the fault, once in its life
and not again after a restart (`mark` is a file that says it has happened).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

FAULT = json.loads(os.environ.get("FAULT", "null"))


def places():
    from grpo_core.environments import boundary
    from grpo_core.sampling import sampler
    from grpo_core.training import checkpoint, engine, rollouts

    return {
        "sample": (sampler.Sampler, "generate"), "reward": (rollouts, "score_by_source"), "backward": (engine.Engine, "backward"),
        "step": (engine.Engine, "step"), "write": (checkpoint, "save_file"), "name": (checkpoint.os, "replace"),
        "answer": (boundary.Boundary, "encode"),
    }  # fmt: skip


def cause():
    if FAULT["what"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if FAULT["what"] == "hang":
        time.sleep(1000)
    raise OSError(28, "No space left on device")


def arm():
    owner, name = places()[FAULT["where"]]
    real, calls, mark = getattr(owner, name), [0], Path(FAULT["mark"])

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] in FAULT["calls"] and (FAULT.get("always") or not mark.exists()):
            mark.touch()
            if FAULT.get("late"):
                real(*args, **kwargs)
            cause()
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def arm_here():
    """The fault, if this is its rank."""
    if FAULT and os.environ.get("RANK") == str(FAULT["rank"]):
        arm()


if __name__ == "__main__":
    from grpo_core.cli import main
    from grpo_core.commands import forked_rank, launch

    def train(*args):  # what a rank runs that is forked from the launcher
        arm_here()
        return run_train(*args)

    launch.PROGRAM, run_train, forked_rank.run_train = (__file__,), forked_rank.run_train, train
    if "NO_FORK" in os.environ:
        launch.can_fork = lambda: False
    arm_here()
    sys.exit(main(sys.argv[1:]))
