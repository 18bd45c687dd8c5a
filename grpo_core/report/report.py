"""One page of what runs came to: curves, configurations and completions, in a file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from grpo_core.report.completions import as_json, sample
from grpo_core.report.markdown import markdown
from grpo_core.report.panels import chosen, curves, leader, thin
from grpo_core.report.run_reader import RunFolder, read_run
from grpo_core.report.summary import difference, final, final_title, summary
from grpo_core.schema import ConfigError

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("dom", "scales", "chart", "panels", "tokens", "completions", "report")  # in the order they need each other
SIZE = 18_000_000  # bytes; the page itself and what an estimate misses stay below 20 MB
POINTS = 2_000  # of a curve


def write_report(folders: Sequence[Path], output: Path | None = None, *, png: bool = False) -> list[Path]:
    """Write report.html and report.md, and with `png` a picture of every panel beside them; returns the files.

    `output` names the page (NAME.html) or a folder for it; by default it is the run's own folder, or the current one
    for several runs. Reads files only, and needs no network, now or when the page is opened.

    Raises:
        ConfigError: what is not a run folder, a file that cannot be read or written, and pictures without matplotlib.
    """
    page = _target(folders, output)
    runs = [read_run(Path(folder), name) for folder, name in zip(folders, _names(folders), strict=True)]
    if png:
        from grpo_core.report.png import check_installed, draw

        check_installed()
    data, completions = assemble(runs)
    written = [(page, render(data, completions).encode())]
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        pictures = draw(runs, page.with_suffix("")) if png else []
        written.append((page.with_suffix(".md"), markdown(data, runs, pictures).encode(errors="replace")))
        for path, content in written:
            path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or page}: {error.strerror}") from None
    return [path for path, _ in written] + [path for _, path in pictures]


def assemble(runs: list[RunFolder]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the page shows, and the completions of each run, together about SIZE bytes as JSON."""
    panels, points = chosen(runs), min(POINTS, max(200, 3 * POINTS // len(runs)))
    series = [_series(run, points) for run in runs]
    left = max(500_000, SIZE - len(as_json(series).encode()))
    completions = [sample(run, left // len(runs)) for run in runs]
    data = {
        "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "final": final_title(runs),
        "points": points,
        "panels": [
            {"id": p.id, "title": p.title, "unit": p.unit, "what": p.what, "healthy": p.healthy, "kind": p.kind,
             "log": p.log, "metrics": metrics}
            for p, metrics in panels
        ],
        "runs": [
            {"name": run.name, "summary": summary(run, found["total"]), "final": final(run), "config": run.config,
             "objective": run.objective, "evaluation": run.evaluation, "steps": len(run.metrics), "curves": curve}
            for run, curve, found in zip(runs, series, completions, strict=True)
        ],
        "difference": difference(runs) if len(runs) > 1 else [],
    }  # fmt: skip
    return data, completions


def render(data: dict[str, Any], completions: list[dict[str, Any]]) -> str:
    """The page. A policy in it allows its own style and script, by their hashes, and no request to anywhere."""
    script = "\n".join((PAGE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    style = "\n" + (PAGE / "report.css").read_text(encoding="utf-8")
    script = f'\n"use strict";\n(() => {{\n{script}}})();\n'
    parts = {
        "policy": f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        f"base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "data": as_json(data),
        "completions": as_json(completions),
    }
    template = (PAGE / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)  # once: what was put in is not looked at


def _series(run: RunFolder, points: int) -> dict[str, Any]:
    """metric -> the steps to draw and the values there; of more than `points`, the extremes are kept."""
    found, kept = curves(run), {}
    steps = [row["step"] for row in run.metrics]
    for name, values in found.items():
        shape = leader(name)
        if shape not in kept:
            kept[shape] = thin(found.get(shape, values), points)
        found[name] = {"x": [steps[i] for i in kept[shape]], "y": [_rounded(values[i]) for i in kept[shape]]}
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or, where two are the same, as much of the paths as tells them apart."""
    if not folders:
        raise ConfigError("report takes the folder of at least one run")
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise ConfigError(f"a run is given twice: {', '.join(map(str, folders))}")
    depth = next(d for d in range(1, max(map(len, parts)) + 1) if len({p[-d:] for p in parts}) == len(parts))
    return ["/".join(p[-depth:]) for p in parts]


def _target(folders: Sequence[Path], output: Path | None) -> Path:
    if output is None:
        return (Path(folders[0]) if len(folders) == 1 else Path()) / "report.html"
    output = Path(output)
    if output.is_dir() or not output.suffix:
        return output / "report.html"
    if output.suffix != ".html":
        raise ConfigError(f"the report's output is {output}; it must end in .html, or be a folder")
    return output


def _hash(text: str) -> str:
    """As a Content-Security-Policy names what may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
