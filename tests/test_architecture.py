"""Imports between folders point one way, each heavy dependency has one place, and files and functions stay short."""

import ast
import functools
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "grpo_core"
LAYERS = [  # a module imports from its own folder and from layers below its own in this list
    {"__init__", "__main__"},
    {"cli"},
    {"commands"},
    {"training"},
    {"environments"},
    {"sampling"},
    {"model"},
    {"monitor"},
    {"data", "scoring"},
    {"config"},
    {"objective"},  # pure functions of tensors
    {"distributed"},
    {"report"},  # reads files only
    {"batch"},
    {"random_keys"},
    {"registry"},
    {"schema"},
    {"trl_names", "verl_names", "moved", "counts"},
]
HEIGHT = {name: height for height, names in enumerate(reversed(LAYERS)) for name in names}
PLACES = {  # heavy dependency -> the modules that may import it
    "click": {"cli"},
    "wandb": {"monitor/trackers"},
    "trackio": {"monitor/trackers"},
    "mlflow": {"monitor/trackers"},
    "httpx": {"scoring/chat_client"},
    "deepspeed": {"training/engine"},
    "peft": {"model/peft_names"},
    "datasets": {"data/rows"},
    "yaml": {"config/files", "config/words", "config/yaml_text", "report/run_reader"},
    "matplotlib": {"report/png"},
    "reasoning_gym": {"config/gym_tasks"},
    "tokenizers": {"model/new_model"},
    "huggingface_hub": {"commands/export", "data/rows"},
    "safetensors": {"training/saved_batches", "model/composite", "training/checkpoint", "commands/export"},
    "triton": {
        "sampling/kernels/decode_kernels", "sampling/kernels/attention_kernels", "sampling/kernels/state_kernels", "sampling/kernels/expert_kernels", "model/kernels", "model/layer_kernels",
        "sampling/kernels/delta_net_kernels", "sampling/kernels/row_attention_kernels", "sampling/kernels/elementwise_kernels",
        "sampling/kernels/four_bit_kernels",
        "sampling/kernels/product_kernels",
    },
    "bitsandbytes": {"model/quantized"},
}
TRANSFORMERS = {"data", "model", "sampling", "environments", "training", "commands"}  # the folders that may import it
MATHEMATICS = {"grpo_core", "torch", "numpy"} | set(sys.stdlib_module_names)
RANK_TESTS = {"monitor", "distributed", "training/checkpoint", "training/run_dir"}


def name_of(path):
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def folder_of(name):
    return name.split("/")[0]


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def tree_of(name):
    return ast.parse(MODULES[name].read_text())


def imports(tree):
    """The modules that a tree imports: of grpo_core as folder/module, of others the top-level name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in dotted:
            root, *rest = name.split(".")
            if root != "grpo_core":
                yield root
                continue
            while rest and "/".join(rest) not in MODULES:
                rest = rest[:-1]  # a name in the module
            if rest:
                yield "/".join(rest)


def upwards(name, tree):
    """The imports of a module that point to a higher layer, or beside it."""
    own = folder_of(name)
    for module in imports(tree):
        if module in MODULES and folder_of(module) != own and HEIGHT[folder_of(module)] >= HEIGHT[own]:
            yield module


def circle(graph):
    """A circle of imports as a list of modules, or None."""
    done = set()

    def visit(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for other in graph[name]:
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return None

    return next((found for name in graph if (found := visit(name, []))), None)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down_and_every_dependency_has_its_place(name):
    assert folder_of(name) in HEIGHT, f"{folder_of(name)} has no layer"
    assert [*upwards(name, tree_of(name))] == []
    for module in imports(tree_of(name)):
        assert name in PLACES.get(module, {name}), f"{name} must not import {module}"
        assert module != "transformers" or folder_of(name) in TRANSFORMERS, f"{name} must not import transformers"
        if folder_of(name) == "objective":
            assert module in MATHEMATICS or module in MODULES, f"{name} is mathematics and must not import {module}"


def test_no_circle():
    assert circle({name: {m for m in imports(tree_of(name)) if m in MODULES} for name in MODULES}) is None


def test_these_checks_see_what_they_look_for():
    assert [*upwards("objective/losses", ast.parse("from grpo_core.training.engine import Engine"))]
    assert [*upwards("data/rows", ast.parse("from grpo_core.scoring import scoring"))]
    assert [*upwards("schema", ast.parse("import grpo_core.config.files"))]
    assert [*upwards("training/engine", ast.parse("from grpo_core import batch, schema"))] == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_the_folders_are_packages_with_empty_init_files():
    for folder in {folder_of(name) for name in MODULES if "/" in name}:
        assert (PACKAGE / folder / "__init__.py").read_text() == "", folder


def test_files_and_functions_are_short():
    for name, path in MODULES.items():
        assert len(path.read_text().splitlines()) <= 500, f"{name} is too long: split it by concept"
        for node in ast.walk(tree_of(name)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 50, f"{name}: {node.name} is too long"
    assert len(MODULES["training/trainer"].read_text().splitlines()) <= 160  # the loop and nothing else


def test_rank_tests_stay_in_their_places():
    for name, path in MODULES.items():
        if "is_main()" in path.read_text():
            assert RANK_TESTS & {name, folder_of(name)}, f"{name} asks for the rank"


def loaded_by(code):
    """Of the heavy libraries those that `code` loads, in a new process."""
    heavy = "print([m for m in ('transformers', 'deepspeed', 'peft', 'datasets') if m in sys.modules])"
    command = [sys.executable, "-c", f"import sys; {code}; {heavy}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()


def test_the_mathematics_loads_no_heavy_library():
    names = ", ".join(f"grpo_core.{name.replace('/', '.')}" for name in MODULES if folder_of(name) == "objective")
    timed = f"import time, torch; start = time.perf_counter(); import {names}; print(time.perf_counter() - start)"
    seconds, loaded = loaded_by(timed)
    assert loaded == "[]" and float(seconds) < 0.5  # on top of torch's own; 0.02 s in benchmarks/losses.py


def test_choosing_and_checking_functions_loads_no_heavy_library():
    """`losses` and `check-loss` are for a laptop."""
    modules = "grpo_core.cli, grpo_core.commands.check_loss, grpo_core.commands.check_advantage, grpo_core.commands.losses, grpo_core.commands.rewards"
    assert loaded_by(f"import {modules}") == ["[]"]
