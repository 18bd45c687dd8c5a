import fcntl
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from forkserver import interpreter

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ROOT = Path(__file__).parents[1]
LONGEST = ["test_switches.py", "test_docs.py", "test_run.py", "test_faults.py", "test_fuzz.py", "test_replay.py"]  # first


def pytest_collection_modifyitems(items):
    import torch

    torch.set_num_threads(1)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    order = {name: place for place, name in enumerate(LONGEST)}  # of two processes neither waits for the other's last
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


def pytest_configure(config):
    if number := getattr(config.option, "numprocesses", None):
        config.option.tx = [f"popen//python={interpreter()}"] * number  # the workers are forked, too


def child_environment():
    """The environment of a child process: the quick interpreter first on the path, then this one; one thread."""
    first = dict.fromkeys((Path(interpreter()).parent, Path(sys.executable).parent))
    return {
        **{k: v for k, v in os.environ.items() if k not in RANK},
        "PATH": os.pathsep.join([*map(str, first), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(autouse=True)
def end_clocks(monkeypatch):
    """A run that a test builds and leaves keeps a thread that prints its progress, into the output of later tests."""
    from grpo_core.monitor import progress

    stops, start = [], progress._start
    monkeypatch.setattr(progress, "_start", lambda *words: stops.append(start(*words)) or stops[-1])
    yield
    for stop in stops:
        stop()


@pytest.fixture
def environment():
    return child_environment()


def start_two_ranks(*words, environment):
    """Two processes of `python WORDS` as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [interpreter(), *map(str, words)], cwd=ROOT, env={**environment, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


def wait_for(processes):
    """Their exit codes, and what each wrote to stdout and stderr."""
    written = [process.communicate(timeout=300) for process in processes]
    return [process.returncode for process in processes], written


@contextmanager
def group_of_one():
    """A process group of one, which stays afterwards: DeepSpeed takes no second one in a process."""
    from grpo_core.distributed import ranks

    names, shutdown = {*RANK} - os.environ.keys(), ranks.shutdown
    ranks.shutdown = lambda: None
    try:
        yield
    finally:
        ranks.shutdown = shutdown
        for name in names:
            os.environ.pop(name, None)


@pytest.fixture
def group():
    with group_of_one():
        yield


@pytest.fixture
def here(group, capsys, monkeypatch):
    """A command of ours in this process, which saves the imports: its exit code and what it said."""
    from grpo_core.cli import main

    monkeypatch.chdir(ROOT)

    def run(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)

    return run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a short run of the embedded default whose adapter has moved: 12 steps, checkpoints at 6 and 12.

    Whichever worker asks first trains it, for all of them; tests read it and write elsewhere.
    """
    from grpo_core.cli import main

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    given = ["trainer.num_steps=12", "checkpoint.every=6", "evaluation.num_tasks=16", "trainer.completions_per_step=32"]
    with open(folder / "tiny_run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "runs" / "tiny" / "adapter").exists():
            with group_of_one():
                code = main(["train", "--config", str(ROOT / "configs" / "tiny.yaml"), f"output_dir={folder}/runs", *given])
            assert code == 0
    return folder / "runs" / "tiny"
