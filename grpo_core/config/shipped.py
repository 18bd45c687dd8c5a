"""Find the configurations that come with the package: configs/ in a checkout, grpo_core/configs in a wheel."""

import os
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def find_configs() -> Path:
    """Return the folder of the shipped YAML and JSON files."""
    installed = PACKAGE / "configs"  # pyproject.toml puts them there
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def find_file(path: str | Path, *folders: Path) -> Path:
    """Return the file `path` in the first of `folders` that has it, else the shipped file of that name.

    A shipped YAML file may be named without its ending: `tiny` is configs/tiny.yaml. A file that is nowhere is returned
    as it would be in the last folder, so that the error of reading it names that place.
    """
    path = os.path.expanduser(path)
    candidates = [folder / path for folder in folders]
    if len(Path(path).parts) == 1:
        candidates += [find_configs() / path, find_configs() / f"{path}.yaml"]
    return next((file for file in candidates if os.path.isfile(file)), folders[-1] / path)


def describe_place(file: Path) -> str:
    """Return the path of a file as seen from the shell's folder, where it lies below that; else as it is."""
    relative = os.path.relpath(file)
    return str(file) if relative.startswith("..") else relative


def find_default() -> Path:
    """Return the configuration of a run that names no file: that for GPUs if there is one, else the tiny one."""
    import torch

    return find_configs() / ("gsm8k_qwen2.5_1.5b.yaml" if torch.cuda.device_count() else "tiny.yaml")


def describe_run(folder: str | Path) -> str | None:
    """Return a sentence's end for a folder that is a run or one of its checkpoints: what to name instead; else None.

    A name without a folder is also looked for in runs/.
    """
    path = Path(folder)
    if os.path.isfile(path / "meta.json") and path.parent.name == "checkpoints":
        return f"which is a checkpoint of the run {path.parents[1]}; {_describe_weights(path.parents[1])}"
    if os.path.isfile(path / "config.yaml") and not os.path.isfile(path / "config.json"):
        return f"which is a run; {_describe_weights(path)}"
    if len(path.parts) == 1 and not os.path.exists(path) and os.path.isfile(Path("runs") / path / "config.yaml"):
        return f"which is the name of a run; {_describe_weights(Path('runs') / path)}"
    return None


def _describe_weights(run: Path) -> str:
    """Return the folder of a run's weights, as a question."""
    for name in ("export", "model", "adapter"):
        if (run / name / "config.json").is_file():
            return f"did you mean {run / name}?"
    return f"did you mean {run / 'adapter'}, which python -m grpo_core export {run} merges into {run / 'export'}?"


def list_shipped() -> list[str]:
    """Return the names of the shipped run configurations, sorted."""
    return sorted(path.stem for path in find_configs().glob("*.yaml"))
