"""A user's file that imports an old module gets a sentence with the new one; the stable imports work."""

import importlib.util
import pkgutil

import pytest

import grpo_core
from grpo_core.moved import MOVED, STABLE_IMPORTS
from grpo_core.objective.losses import LOSSES
from grpo_core.schema import ConfigError

LOSS = "\n\ndef soft(logprobs, old_logprobs, advantages, completion_mask):\n    return PolicyLoss(-advantages * logprobs)\n"
STABLE = "; from grpo_core import LOSSES, PolicyLoss, token_ratio is the stable import"


@pytest.mark.parametrize("name", MOVED)
def test_every_old_module_has_a_new_place(name):
    assert all(importlib.util.find_spec(f"grpo_core.{module}") for module in MOVED[name])


def test_the_stable_imports_are_those_of_the_package():
    names = [name for names in STABLE_IMPORTS.values() for name in names]
    stayed = ["ConfigError", "Reply", "Turn"]  # whose modules did not move
    assert sorted([*names, *stayed]) == sorted(grpo_core.__all__)
    assert all(hasattr(grpo_core, name) for name in names)


FOLDERS = ("config", "data", "distributed", "objective", "report", "scoring")  # which are also old modules


@pytest.mark.parametrize("name", [name for name in MOVED if name not in FOLDERS])
def test_importing_an_old_module_is_an_import_error_that_names_the_new_one(name):
    folder, _, module = f"grpo_core.{name}".rpartition(".")
    for line in (f"import grpo_core.{name}", f"from grpo_core.{name} import thing", f"from {folder} import {module}"):
        with pytest.raises(ImportError) as error:
            exec(line, {})
        assert str(error.value).startswith(f"grpo_core.{name} is now grpo_core.{MOVED[name][0]}"), line


@pytest.mark.parametrize("name", FOLDERS)
def test_a_name_that_an_old_module_had_is_an_import_error_that_names_the_new_one(name):
    with pytest.raises(ImportError) as error:
        exec(f"from grpo_core.{name} import Thing", {})
    sentence = f"there is no grpo_core.{name}.Thing; of earlier versions, grpo_core.{name} is now grpo_core.{MOVED[name][0]}"
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize("name", FOLDERS)
def test_attack_8_a_name_that_an_old_module_had_is_an_attribute_error_with_the_same_sentence(name):
    folder = importlib.import_module(f"grpo_core.{name}")
    sentence = f"there is no grpo_core.{name}.Thing; of earlier versions, grpo_core.{name} is now grpo_core.{MOVED[name][0]}"
    with pytest.raises(AttributeError) as error:
        folder.Thing  # noqa: B018
    assert str(error.value).startswith(sentence) and error.value.obj is folder
    assert not hasattr(folder, "__wrapped__") and getattr(folder, "Thing", None) is None


def test_attack_8_a_module_that_is_not_imported_yet_is_no_old_name(monkeypatch):
    import grpo_core.report.png

    monkeypatch.delattr(grpo_core.report, "png")
    with pytest.raises(AttributeError, match="^module 'grpo_core.report' has no attribute 'png'$"):
        grpo_core.report.png  # noqa: B018
    from grpo_core.report import png  # noqa: F401


def test_every_module_that_is_there_is_imported_as_ever():
    for info in pkgutil.walk_packages(grpo_core.__path__, "grpo_core."):
        assert importlib.util.find_spec(info.name), info.name
    with pytest.raises(ModuleNotFoundError, match="No module named 'grpo_core.nowhere'"):
        importlib.import_module("grpo_core.nowhere")
    with pytest.raises(AttributeError, match="grpo_core.losses is now grpo_core.objective.losses"):
        grpo_core.losses  # noqa: B018


def load(folder, text):
    (folder / "mine.py").write_text(text + LOSS)
    return LOSSES.get(f"{folder / 'mine.py'}:soft")


@pytest.mark.parametrize("text, sentence", [
    ("from grpo_core.losses import PolicyLoss", f"losses, which is now grpo_core.objective.losses{STABLE}"),
    ("import grpo_core.losses", f"losses, which is now grpo_core.objective.losses{STABLE}"),
    ("from grpo_core import losses", f"losses, which is now grpo_core.objective.losses{STABLE}"),
    ("from grpo_core.averages import token_weights", "averages, which is now grpo_core.objective.token_weights"),
    ("from grpo_core.draw import Decoding", "draw, which is now grpo_core.sampling.draw and grpo_core.batch"),
    ("from grpo_core.config import RunConfig", "config, which is now grpo_core.config.sections"),
    ("import grpo_core.config as c\nc.RunConfig", "config, which is now grpo_core.config.sections"),
    ("from grpo_core.distributed import rank", "distributed, which is now grpo_core.distributed.ranks"),
    ("from grpo_core.scoring import Scores", "scoring, which is now grpo_core.scoring.scoring"),
    ("from grpo_core.objective import render", "objective, which is now grpo_core.config.formula"),
    ("from grpo_core.report import write_report", "report, which is now grpo_core.report.report"),
])  # fmt: skip
def test_an_old_import_is_one_sentence(tmp_path, text, sentence):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    path = tmp_path / "mine.py"
    assert str(error.value) == f"loss '{path}:soft': {path} imports grpo_core.{sentence}"


@pytest.mark.parametrize("text, message", [
    ("import not_there", "cannot be loaded: ModuleNotFoundError: No module named 'not_there'"),
    ("from grpo_core.objective.losses import soft", "cannot be loaded: ImportError: cannot import name 'soft'"),
    ("import math\nmath.soft", "cannot be loaded: AttributeError: module 'math' has no attribute 'soft'"),
    ("None.soft", "cannot be loaded: AttributeError: 'NoneType' object has no attribute 'soft'"),
    ("raise ImportError", "cannot be loaded: ImportError"),
])  # fmt: skip
def test_other_errors_of_the_file_are_shown_as_they_are(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_the_stable_imports_work_in_a_users_file(tmp_path):
    text = "from grpo_core import LOSSES, PolicyLoss\n\ngrpo = LOSSES.get('grpo')"
    assert load(tmp_path, text).__name__ == "soft"
