"""Ranks: who we are, sums over all of us, and seeding."""

import atexit
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from grpo_core.distributed import watchdog
from grpo_core.schema import ConfigError

TIMEOUT = timedelta(minutes=30)
RUN_FOLDER_VARIABLE = "GRPO_CORE_FOLDER_NOTE"  # names the file in which the launcher looks for the run folder
PEAK_TERAFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "4090": 165,
    "3090": 71,
    "3070": 41,
}


def setup(hang_timeout: float = 0) -> None:
    """Join the process group that a launcher described in the environment, or make a group of one.

    A rank that stands still for `hang_timeout` seconds ends (0: never); until then the others wait for it.

    Raises:
        ConfigError: more processes on this machine than it has GPUs, where it has any.
    """
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
        os.environ.update({k: str(v) for k, v in alone.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if torch.cuda.is_available():
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > gpus:
            raise ConfigError(f"{here} processes were started on this machine, but it has only {gpus} GPUs")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        timeout = max(TIMEOUT, timedelta(seconds=2 * hang_timeout))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)
        if world_size() == 1:
            atexit.register(shutdown)  # NCCL warns of a run that ends with an error and leaves it
    watchdog.start(hang_timeout, rank())


def die_with_launcher() -> None:
    """Let the kernel end this rank when its launcher ends, however that ends: no orphan trains on (Linux only)."""
    if "LOCAL_RANK" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def report_run_folder(folder: Path) -> None:
    """Let the launcher know where this run is, so that it can go on from there."""
    if note := os.environ.get(RUN_FOLDER_VARIABLE):
        Path(note).write_text(str(folder.resolve()), encoding="utf-8")


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """True on the one rank that writes files and to the terminal."""
    return rank() == 0


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def barrier() -> None:
    if world_size() > 1:
        with watchdog.waiting():
            dist.barrier()


def all_sum(values: Tensor) -> Tensor:
    """The sum over all ranks, elementwise, as a new tensor on the same device."""
    return _reduced(values, dist.ReduceOp.SUM)


def all_max(values: Tensor) -> Tensor:
    """The maximum over all ranks, elementwise, as a new tensor on the same device."""
    return _reduced(values, dist.ReduceOp.MAX)


def all_rows(values: Tensor) -> Tensor:
    """Every rank's rows, [n of rank 0 + n of rank 1 + ..., ...], on every rank; ranks may have different numbers."""
    values = values.detach().to(device())
    if world_size() == 1:
        return values
    count = torch.tensor([len(values)], device=device())
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    with watchdog.waiting():
        dist.all_gather(counts, count)
    widest = int(torch.cat(counts).max())
    padded = torch.cat([values, values.new_zeros(widest - len(values), *values.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


def raise_on_all_ranks(function: Callable, *args: Any) -> Any:
    """function(*args); if it raises a ConfigError on any rank, that one is raised on all of them. A collective."""
    result, error = None, None
    try:
        result = function(*args)
    except ConfigError as raised:
        error = str(raised)
    if all_max(torch.tensor(float(error is not None))):
        errors = [error] * world_size()
        if world_size() > 1:
            with watchdog.waiting():
                dist.all_gather_object(errors, error)
        first = next(i for i, text in enumerate(errors) if text is not None)
        raise ConfigError(f"process {first}: {errors[first]}" if world_size() > 1 else errors[first])
    return result


def gather(value: Any) -> list[Any]:
    """Every rank's picklable `value` in the order of ranks on the main rank; an empty list elsewhere."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if is_main() else None
    with watchdog.waiting():
        dist.gather_object(value, values)
    return values or []


def broadcast_from_main(value: Any) -> Any:
    """The main rank's picklable `value`, on every rank."""
    values = [value]
    if world_size() > 1:
        with watchdog.waiting():
            dist.broadcast_object_list(values)
    return values[0]


def peak_flops() -> float:
    """Floating-point operations a second of this GPU's dense 16-bit products, by its data sheet; 0 where unknown."""
    if not torch.cuda.is_available():
        return 0.0
    name = torch.cuda.get_device_name()
    return next((tera * 1e12 for part, tera in PEAK_TERAFLOPS.items() if part in name), 0.0)


def seed_all(*key: int) -> None:
    """Make torch's noise on this rank (dropout, new weights) a function of `key`: resuming needs no saved state."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def draw_uniforms(keys: Sequence[tuple[int, ...]], count: int) -> Tensor:
    """Uniform noise in [0, 1), [len(keys), count] float64: row i depends on keys[i] and on nothing else."""
    rows = [np.random.default_rng(key).random(count) for key in keys]
    return torch.from_numpy(np.stack(rows))


def _reduced(values: Tensor, operation: Any) -> Tensor:
    everywhere = values.detach().to(device(), copy=True)
    if world_size() > 1:
        with watchdog.waiting():
            dist.all_reduce(everywhere, operation)
            everywhere = everywhere.to(values.device)
    return everywhere.to(values.device)
