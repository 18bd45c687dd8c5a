"""Imports point one way, each heavy dependency has one door, and rooms stay rooms."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "grpo_core"

LAYERS = [  # a module imports only from rows above its own
    {"elsewhere"},
    {"schema", "watchdog"},
    {"registry", "batch", "run_folder"},
    # the mathematics: torch and the standard library
    {
        "advantages",
        "averages",
        "corrections",
        "kl",
        "losses",
        "logprobs",
        "estimates",
        "problems",
        "rewards",
        "truncation",
        "draw",
        "packing",
    },
    {"reward_worker"},
    {"scoring"},
    {"config", "distributed", "presets", "tiny", "decode_ops"},
    {
        "config_check",
        "control",
        "progress",
        "rows",
        "stats",
        "interrupt",
        "objective",
        "attention_kernels",
        "fused_model",
        "plain_decoder",
        "packed_attention",
        "logprob_kernels",
        "layer_kernels",
    },
    {"config_file", "tracking", "laws", "decode_kernels", "layers"},
    {"catalogue", "advantage_laws", "fused_decoder"},
    {"alerts", "batches", "check", "data", "metrics", "replay_table"},
    {"model_check", "targets"},
    {"policy", "sampler", "engine", "run"},
    {"checkpoint", "collect", "evaluation", "incident", "memory"},
    {"dump", "parts"},
    {"opened", "trainer"},
    {"attribution"},
    {"replay"},
    {"ask", "assessment", "preview", "setup"},
    {"model_card"},
    {"export"},
    {"job"},
    {"sft"},
    {"report_completions", "report_panels", "report_summary"},
    {"report_markdown", "report_png"},
    {"report"},  # reads files only: tests/test_report.py holds that it loads no torch
    {"launch", "cli"},
    {"__main__", "__init__"},
]
DOORS = {
    "click": {"cli"},
    "wandb": {"tracking"},
    "deepspeed": {"engine"},
    "peft": {"policy"},
    "datasets": {"rows"},
    "yaml": {"config_file"},
    "matplotlib": {"report_png"},
    "tokenizers": {"tiny"},
    "huggingface_hub": {"export"},
    "safetensors": {"batches", "checkpoint", "export"},
    # the last three name its types and set its log level; they load nothing with it
    "triton": {"decode_kernels", "attention_kernels", "logprob_kernels", "layer_kernels"},
    "transformers": {
        "policy",
        "sampler",
        "plain_decoder",
        "packed_attention",
        "data",
        "tiny",
        "checkpoint",
        "model_check",
        "parts",
        "setup",
        "opened",
        "ask",
        "preview",
        "export",
        "sft",
        "targets",
    },
}
MATHEMATICS = {"grpo_core", "torch", "numpy"} | set(sys.stdlib_module_names)


def imports(module: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.module == "grpo_core":
                names |= {f"grpo_core.{alias.name}" for alias in node.names if alias.name != "__version__"}
            else:
                names.add(node.module)
    return names


HEIGHT = {name: row for row, names in enumerate(LAYERS) for name in names}


@pytest.mark.parametrize("module", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_point_down_and_every_dependency_uses_its_door(module):
    assert module.stem in HEIGHT, f"{module.stem} has no layer"
    for name in imports(module):
        root, _, rest = name.partition(".")
        if root == "grpo_core" and rest:
            room = rest.split(".")[0]
            down = HEIGHT[room] < HEIGHT[module.stem]
            beside = HEIGHT[room] == HEIGHT[module.stem] and {room, module.stem} == {"launch", "cli"}
            assert down or beside, f"{module.stem} must not import {room}"
        assert module.stem in DOORS.get(root, {module.stem}), f"{module.stem} must not import {root}"
        if HEIGHT[module.stem] <= HEIGHT["losses"]:
            assert root in MATHEMATICS, f"{module.stem} is mathematics and must not import {root}"


def test_rooms_are_small_and_functions_smaller():
    for module in PACKAGE.glob("*.py"):
        text = module.read_text()
        assert len(text.splitlines()) <= 350, f"{module.name} is too long: two rooms"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 50, f"{module.name}: {node.name} is too long"


def test_rank_tests_stay_in_their_rooms():
    allowed = {"metrics", "checkpoint", "distributed", "progress"}
    for module in PACKAGE.glob("*.py"):
        if "is_main()" in module.read_text():
            assert module.stem in allowed, f"{module.name} asks for the rank"


def test_the_mathematics_loads_no_heavy_library():
    rooms = ", ".join(f"grpo_core.{name}" for name in sorted(LAYERS[HEIGHT["losses"]]))
    code = (
        "import sys, time, torch; start = time.perf_counter();"
        f"import {rooms}; seconds = time.perf_counter() - start;"
        "print([m for m in ('transformers', 'deepspeed', 'peft', 'datasets') if m in sys.modules], seconds < 0.5)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert out.stdout.strip() == "[] True"  # half a second on top of torch's own; 0.02 s in benchmarks/losses.py


def test_choosing_and_checking_functions_loads_no_heavy_library():
    """`losses` and `check-loss` are for a laptop."""
    code = (
        "import sys, grpo_core.cli, grpo_core.check, grpo_core.catalogue;"
        "print([m for m in ('transformers', 'deepspeed', 'peft', 'datasets') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert out.stdout.strip() == "[]"
