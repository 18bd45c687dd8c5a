import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ROOT = Path(__file__).parents[1]
LONGEST = ["test_run.py", "test_docs.py", "test_faults.py", "test_engine.py", "test_sft.py"]  # first, longest first


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    order = {name: place for place, name in enumerate(LONGEST)}  # of two processes neither waits for the other's last
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


@pytest.fixture
def environment():
    """The environment of a child process: this interpreter first on the path, one thread."""
    return {
        **{k: v for k, v in os.environ.items() if k not in RANK},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a short run of the embedded default whose adapter has moved: 12 steps, checkpoints at 6 and 12."""
    folder = tmp_path_factory.mktemp("runs")
    given = ["trainer.num_steps=12", "checkpoint.every=6", "evaluation.num_tasks=16", "trainer.completions_per_step=64"]
    command = [
        sys.executable,
        "-m",
        "grpo_core",
        "train",
        "--config",
        "configs/tiny.yaml",
        f"output_dir={folder}",
        *given,
    ]
    env = {
        **{k: v for k, v in os.environ.items() if k not in RANK},
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "tiny"
