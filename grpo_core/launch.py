"""Start `train` in several processes: torch.distributed.run, with its noise turned into one sentence."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

from grpo_core.config_check import prompts_per_rank
from grpo_core.config_file import load


def launch(processes: int, config: Path, overrides: list[str]) -> int:
    """Check the configuration, run it, and return the exit code: 0, or that of the first rank that failed.

    NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT in the environment make this machine one node of several.

    Raises:
        ConfigError: a configuration that cannot be run by so many processes.
    """
    nodes = int(os.environ.get("NNODES", 1))
    prompts_per_rank(load(config, overrides), processes * nodes)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (2 * processes))))
    logging.disable(logging.CRITICAL)  # of this process, torch's launcher; the ranks' own errors come through
    where = ["--standalone"]
    if nodes > 1:
        where = [
            f"--nnodes={nodes}",
            f"--node-rank={os.environ.get('NODE_RANK', 0)}",
            f"--master-addr={os.environ.get('MASTER_ADDR', '127.0.0.1')}",
            f"--master-port={os.environ.get('MASTER_PORT', 29500)}",
        ]
    job = ["-m", "grpo_core", "train", "--config", str(config), *overrides]
    try:
        run(get_args_parser().parse_args([*where, f"--nproc-per-node={processes}", *job]))
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode != 2:  # 2: the rank has said what was wrong
            code = failure.exitcode
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            print(f"grpo_core: rank {rank} {how}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0
