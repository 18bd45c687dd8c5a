"""Write the report of one or more runs: a page with curves, configurations and completions in one file."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from grpo_core.report.completions import sample_completions, to_json
from grpo_core.report.held_out import collect_answers
from grpo_core.report.markdown import render_markdown
from grpo_core.report.panels import choose_panels, collect_curves, thin_curve, thinning_metric
from grpo_core.report.run_reader import RunFolder, read_run
from grpo_core.report.summary import average_last_steps, compare_settings, summarize_run, title_means
from grpo_core.report.whole_files import write_whole
from grpo_core.schema import ConfigError

PAGE = Path(__file__).parent / "page"
SCRIPTS = (
    "dom",
    "scales",
    "chart",
    "panels",
    "tokens",
    "turns",
    "completions",
    "report",
)  # a script uses only those before it
MAX_DATA_BYTES = 18_000_000  # with the page itself and the error of the estimate, a report stays below 20 MB
MIN_COMPLETION_BYTES = 500_000  # of all runs together, however many curves there are
MAX_POINTS, MIN_POINTS = 2_000, 200  # of a curve, by the number of runs


def write_report(folders: Sequence[Path], output: Path | None = None, *, png: bool = False) -> list[Path]:
    """Write report.html and report.md, and with `png` a picture of every panel beside them; return the files.

    `output` names the page (NAME.html) or a folder for it; the default is the run's own folder, or the current folder
    for several runs. Only files are read, and neither writing nor viewing the page needs a network.

    Raises:
        ConfigError: a folder is not that of a run, a file cannot be read or written, or `png` without matplotlib.
    """
    page = _page_path(folders, output)
    runs = [read_run(Path(folder), name) for folder, name in zip(folders, _run_names(folders), strict=True)]
    if png:
        from grpo_core.report.png import draw_pictures, require_matplotlib

        require_matplotlib()
    data, completions = collect_data(runs)
    contents = [(page, render_page(data, completions).encode())]
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        pictures = draw_pictures(runs, page.with_suffix("")) if png else []
        contents.append((page.with_suffix(".md"), render_markdown(data, runs, pictures).encode(errors="replace")))
        for path, content in contents:
            write_whole(path, content)
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or page}: {error.strerror}") from None
    return [path for path, _ in contents] + [path for _, path in pictures]


def collect_data(runs: list[RunFolder]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the content of the page, and the completions of each run; about MAX_DATA_BYTES together as JSON."""
    panels, points = choose_panels(runs), min(MAX_POINTS, max(MIN_POINTS, 3 * MAX_POINTS // len(runs)))
    curves = [_thinned_curves(run, points) for run in runs]
    left = max(MIN_COMPLETION_BYTES, MAX_DATA_BYTES - len(to_json(curves).encode()))
    completions = [sample_completions(run, left // len(runs)) for run in runs]
    data = {
        "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "final": title_means(runs),
        "points": points,
        "panels": [
            {"id": p.id, "title": p.title, "unit": p.unit, "what": p.what, "healthy": p.healthy, "kind": p.kind,
             "log": p.log, "metrics": metrics}
            for p, metrics in panels
        ],
        "runs": [
            {"name": run.name, "summary": summarize_run(run, sampled["total"]), "final": average_last_steps(run),
             "config": run.config, "objective": run.objective, "evaluation": run.evaluation,
             "answers": collect_answers(run),
             "steps": len(run.metrics), "curves": curve}
            for run, curve, sampled in zip(runs, curves, completions, strict=True)
        ],
        "difference": compare_settings(runs) if len(runs) > 1 else [],
    }  # fmt: skip
    return data, completions


def render_page(data: dict[str, Any], completions: list[dict[str, Any]]) -> str:
    """Return the page as HTML.

    Its Content-Security-Policy allows only its own style and script, by their hashes, and no request.
    """
    script = "\n".join((PAGE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    style = "\n" + (PAGE / "report.css").read_text(encoding="utf-8")
    script = f'\n"use strict";\n(() => {{\n{script}}})();\n'
    parts = {
        "policy": f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        f"base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "data": to_json(data),
        "completions": to_json(completions),
    }
    template = (PAGE / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)  # one pass: data may hold {{...}} itself


def _thinned_curves(run: RunFolder, points: int) -> dict[str, Any]:
    """Return metric -> the steps and values to draw; curves of more than `points` steps are thinned."""
    curves = collect_curves(run)
    steps = [row["step"] for row in run.metrics]
    kept_rows: dict[str, list[int]] = {}  # by thinning metric
    thinned = {}
    for name, values in curves.items():
        metric = thinning_metric(name)
        if metric not in kept_rows:
            kept_rows[metric] = thin_curve(curves.get(metric, values), points)
        rows = kept_rows[metric]
        thinned[name] = {"x": [steps[i] for i in rows], "y": [_rounded(values[i]) for i in rows]}
    return thinned


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _run_names(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each path, or as many of the last parts as make the names differ."""
    if not folders:
        raise ConfigError("report takes the folder of at least one run")
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise ConfigError(f"a run is given twice: {', '.join(map(str, folders))}")
    depth = next(d for d in range(1, max(map(len, parts)) + 1) if len({p[-d:] for p in parts}) == len(parts))
    return ["/".join(p[-depth:]) for p in parts]


def _page_path(folders: Sequence[Path], output: Path | None) -> Path:
    if output is None:
        return (Path(folders[0]) if len(folders) == 1 else Path()) / "report.html"
    output = Path(output)
    if output.is_dir() or not output.suffix:
        return output / "report.html"
    if output.suffix != ".html":
        raise ConfigError(f"the output of report is {output}; it must end in .html, or be a folder")
    return output


def _hash(text: str) -> str:
    """Return the hash of a style or script in the form of a Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
