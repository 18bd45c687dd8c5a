"""The process group: ranks, collectives, and random noise that does not depend on the number of ranks."""

import atexit
import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from grpo_core.counts import quantify
from grpo_core.distributed import watchdog
from grpo_core.random_keys import Key, make_generator, torch_seed
from grpo_core.schema import ConfigError, first_line, read_message

MIN_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
LOST_RANK_CODE = 5  # exit code of a rank whose collective failed because another rank ended or cannot be reached
LOST_RANK = re.compile(
    r"connection (was )?(reset|closed|refused|aborted)|broken pipe|timed out|remote ?error|remote process exited", re.I
)
RUN_FOLDER_VARIABLE = "GRPO_CORE_FOLDER_NOTE"  # names a file, into which the run writes its folder for the launcher
STORE_VARIABLE = "GRPO_CORE_STORE"  # names the file by which the ranks of one machine meet
NO_PORT = "0"  # MASTER_PORT of ranks that meet without one; DeepSpeed wants the variable to be set
PEAK_TERAFLOPS = {  # part of a GPU's name -> dense 16-bit products, by its data sheet
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
    """Join the process group that the launcher described in the environment, or make a group of one process.

    A rank that makes no progress for `hang_timeout` seconds ends (0: never); until then the other ranks wait for it.

    Raises:
        ConfigError: this machine has GPUs, but fewer than processes; or the other ranks cannot be reached.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=NO_PORT)
    if torch.cuda.is_available():
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if processes > gpus:
            raise ConfigError(
                f"{quantify(processes, 'process', 'processes')} were started on this machine; at most {gpus} are "
                "possible, one for each GPU"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        timeout = max(MIN_COLLECTIVE_TIMEOUT, timedelta(seconds=2 * hang_timeout))
        try:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timeout, **_make_store())
        except (dist.DistError, ValueError) as error:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ConfigError(
                f"rank {os.environ['RANK']} cannot join the others at {place}, MASTER_ADDR:MASTER_PORT in the "
                f"environment: {first_line(error)}"
            ) from error
        if world_size() == 1:
            atexit.register(shutdown)  # or NCCL warns when a run ends with an error
    watchdog.start(hang_timeout, rank())


def _make_store() -> dict[str, Any]:
    """Return the arguments of `init_process_group` for ranks that meet without a port, which another run might take.

    They are empty where another launcher has given the ranks an address and a port.
    """
    if os.environ.get("MASTER_PORT") != NO_PORT:
        return {}
    path, size = os.environ.get(STORE_VARIABLE), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(path, size) if path else dist.HashStore()
    return {"store": store, "rank": int(os.environ["RANK"]), "world_size": size}


def read_count(variable: str, default: int, minimum: int) -> int:
    """Return the number in a variable of the environment, or `default` where it is not set.

    Raises:
        ConfigError: the variable is not a whole number of at least `minimum`.
    """
    text = os.environ.get(variable, str(default))
    if not text.strip().isdecimal() or int(text) < minimum:
        raise ConfigError(f"{variable} is {text!r} in the environment; it must be a whole number of at least {minimum}")
    return int(text)


def die_with_launcher() -> None:
    """Let the kernel kill this rank when its launcher ends for any reason, so that no orphan continues training.

    Linux only.
    """
    if "LOCAL_RANK" in os.environ:
        die_with_parent()


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends for any reason. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def report_run_folder(folder: Path) -> None:
    """Write the run folder into the launcher's file, so that a restart continues from its checkpoints."""
    if file := os.environ.get(RUN_FOLDER_VARIABLE):
        Path(file).write_text(str(folder.resolve()), encoding="utf-8")


def is_lost_rank(error: BaseException) -> bool:
    """Return whether a collective failed because another rank has ended or cannot be reached."""
    message = read_message(error)
    is_collective = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in message)
    return is_collective and LOST_RANK.search(message) is not None


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Return True on rank 0, which alone writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def barrier() -> None:
    if world_size() > 1:
        with watchdog.waiting():
            dist.barrier()


def all_sum(values: Tensor) -> Tensor:
    """Return the elementwise sum over all ranks, as a new tensor on the device of `values`. A collective."""
    return _reduce(values, dist.ReduceOp.SUM)


def all_max(values: Tensor) -> Tensor:
    """Return the elementwise maximum over all ranks, as a new tensor on the device of `values`. A collective."""
    return _reduce(values, dist.ReduceOp.MAX)


def all_rows(values: Tensor) -> Tensor:
    """Return the rows of all ranks in the order of ranks, which may have different numbers of rows. A collective."""
    values = values.detach().to(device())
    if world_size() == 1:
        return values
    count = torch.tensor([len(values)], device=device())
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    with watchdog.waiting():
        dist.all_gather(counts, count)
    most = int(torch.cat(counts).max())  # all_gather needs equal shapes
    padded = torch.cat([values, values.new_zeros(most - len(values), *values.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


def call_and_share_errors(function: Callable, *args: Any) -> Any:
    """Return function(*args); a ConfigError that it raises on any rank is raised on all ranks. A collective."""
    result, error = None, None
    try:
        result = function(*args)
    except ConfigError as raised:
        error = str(raised)
    if all_max(torch.tensor(float(error is not None), device="cpu")):
        errors = [error] * world_size()
        if world_size() > 1:
            with watchdog.waiting():
                dist.all_gather_object(errors, error)
        first = next(i for i, text in enumerate(errors) if text is not None)
        raise ConfigError(f"process {first}: {errors[first]}" if world_size() > 1 else errors[first])
    return result


def gather(value: Any) -> list[Any]:
    """Return the picklable `value` of every rank on rank 0, and an empty list on the others. A collective."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if is_main() else None
    with watchdog.waiting():
        dist.gather_object(value, values)
    return values or []


def broadcast_from_main(value: Any) -> Any:
    """Return rank 0's picklable `value` on every rank. A collective."""
    values = [value]
    if world_size() > 1:
        with watchdog.waiting():
            dist.broadcast_object_list(values)
    return values[0]


def peak_flops() -> float:
    """Return this GPU's peak FLOP/s for dense 16-bit products, by its data sheet; 0 if it is not known."""
    if not torch.cuda.is_available():
        return 0.0
    name = torch.cuda.get_device_name()
    return next((tera * 1e12 for part, tera in PEAK_TERAFLOPS.items() if part in name), 0.0)


def seed_all(key: Key) -> None:
    """Seed torch on this rank from `key`.

    Dropout and new weights are then functions of the key, so resuming needs no saved random state.
    """
    torch.manual_seed(torch_seed(key))


def draw_uniforms(keys: Sequence[Key], count: int) -> Tensor:
    """Return uniform noise in [0, 1), [len(keys), count] float64; row i is a function of keys[i] alone."""
    rows = [make_generator(key).random(count) for key in keys]
    return torch.from_numpy(np.stack(rows))


def _reduce(values: Tensor, operation: Any) -> Tensor:
    reduced = values.detach().to(device(), copy=True)
    if world_size() > 1:
        with watchdog.waiting():
            dist.all_reduce(reduced, operation)
            reduced = reduced.to(values.device)  # inside the block, because NCCL is waited for here
    return reduced.to(values.device)
