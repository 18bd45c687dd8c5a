"""The wheel: it holds every file that the package reads, and works where the repository is not."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import RANK, ROOT

from grpo_core import __version__

SOURCES = ("grpo_core", "configs", "pyproject.toml", "README.md", "LICENSE")
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
TRAIN = [
    "train",
    "trainer.num_steps=1",
    "trainer.completions_per_step=16",
    "sampling.max_new_tokens=16",
    "evaluation.num_tasks=8",
]
MINE = "base: dapo.yaml\nname: mine\nengine: {deepspeed: ds_zero1.json}\n"  # neither file lies beside it
# python -m grpo_core, and then what that process has loaded and finds
CODE = """
import json, runpy, sys
from pathlib import Path

runpy.run_module("grpo_core", run_name="__main__", alter_sys=True)

from grpo_core.config.files import load
from grpo_core.config.shipped import find_configs, list_shipped
from grpo_core.config.study import load_study

outcome = {
    "trainer": sys.modules["grpo_core.training.trainer"].__file__,
    "configs": str(find_configs()),
    "shipped": {name: load(name).name for name in list_shipped()},
    "study": len(load_study(Path("objectives")).runs),
    "mine": [load("mine.yaml").preset, load("mine.yaml").engine.deepspeed["zero_optimization"]["stage"]],
}
print(json.dumps(outcome))
"""


def run(command, **settings):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel that is built from a copy of the sources, so that no earlier build can hide a missing file."""
    sources, output = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, sources)
    run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", output, sources])
    (built,) = output.glob("*.whl")
    return sources, built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder that the wheel is installed in, and an environment that imports from there and not from here.

    The dependencies are those of this interpreter.
    """
    target = tmp_path_factory.mktemp("installed")
    run([*PIP, "install", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel[1]])
    environment = {name: value for name, value in os.environ.items() if name not in RANK}
    environment |= {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # the default configuration is then tiny's
    return target, environment


@pytest.mark.slow
def test_it_holds_every_file_of_the_package_and_the_shipped_configurations(wheel):
    """A folder, or a kind of file, that pyproject.toml does not list fails here."""
    sources, built = wheel
    files = {path.relative_to(sources).as_posix() for path in (sources / "grpo_core").rglob("*") if path.is_file()}
    files |= {f"grpo_core/configs/{path.name}" for path in (sources / "configs").iterdir() if path.is_file()}
    files |= {f"grpo_core/configs/studies/{path.name}" for path in (sources / "configs" / "studies").iterdir()}
    packed = {name for name in zipfile.ZipFile(built).namelist() if ".dist-info/" not in name}
    assert packed == files


@pytest.mark.slow
def test_it_trains_and_finds_the_shipped_configurations_from_another_folder(installed, tmp_path):
    target, environment = installed
    (tmp_path / "mine.yaml").write_text(MINE)
    shown = run([sys.executable, "-c", CODE, *TRAIN], cwd=tmp_path, env=environment)
    outcome, package = json.loads(shown.splitlines()[-1]), target / "grpo_core"
    assert outcome["trainer"] == str(package / "training" / "trainer.py")
    assert outcome["configs"] == str(package / "configs")
    assert outcome["shipped"].keys() == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert outcome["mine"] == ["dapo", 1] and outcome["study"] == 40
    folder = tmp_path / "runs" / "tiny"  # of the default configuration
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert [json.loads(row)["n"] for row in (folder / "evaluation.jsonl").read_text().splitlines()] == [8, 8]


@pytest.mark.slow
def test_the_console_script_runs(installed, tmp_path):
    target, environment = installed
    assert run([target / "bin" / "grpo_core", "--version"], cwd=tmp_path, env=environment) == f"grpo_core {__version__}\n"
