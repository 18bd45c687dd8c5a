"""Old module names: where the modules of earlier versions are now.

Whoever still imports an old module gets an ImportError whose sentence names the new module.
"""

import re
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

PACKAGE = "grpo_core"

MOVED = {  # old module -> the modules that its contents are in now
    "advantage_laws": ("objective.advantage_laws",),
    "advantages": ("objective.advantages",),
    "alerts": ("monitor.alerts",),
    "ask": ("commands.sample",),
    "assessment": ("commands.evaluate",),
    "attention_kernels": ("sampling.kernels.attention_kernels",),
    "attribution": ("commands.attribution",),
    "averages": ("objective.token_weights",),
    "batches": ("training.saved_batches",),
    "catalogue": ("commands.losses", "commands.rewards", "commands.presets"),
    "check": ("commands.check_loss", "commands.check_advantage"),
    "checkpoint": ("training.checkpoint", "training.run_dir"),
    "collect": ("training.rollouts",),
    "commands.check_function": ("commands.check_loss", "commands.check_advantage", "commands.law_table"),
    "commands.list_names": ("commands.losses", "commands.rewards", "commands.presets"),
    "config": ("config.sections",),
    "config_check": ("config.checks",),
    "config_file": ("config.files",),
    "control": ("training.control",),
    "corrections": ("objective.corrections",),
    "data": ("data.prompts", "data.stream", "model.loading"),
    "decode_kernels": ("sampling.kernels.decode_kernels",),
    "decode_ops": ("sampling.decode_ops",),
    "distributed": ("distributed.ranks",),
    "draw": ("sampling.draw", "batch"),
    "dump": ("training.saved_batches",),
    "elsewhere": ("trl_names",),
    "engine": ("training.engine", "training.deepspeed_config"),
    "estimates": ("training.eval_statistics",),
    "evaluation": ("training.evaluation",),
    "export": ("commands.export",),
    "fused_decoder": ("sampling.graph_decoder",),
    "fused_model": ("sampling.fused_model",),
    "incident": ("training.saved_batches",),
    "interrupt": ("distributed.signals",),
    "job": ("training.job",),
    "kl": ("objective.kl",),
    "launch": ("commands.launch",),
    "laws": ("objective.laws",),
    "layer_kernels": ("model.kernels",),
    "layers": ("model.fast_layers",),
    "logprob_kernels": ("model.kernels",),
    "logprobs": ("model.logprobs",),
    "losses": ("objective.losses",),
    "memory": ("model.memory",),
    "metrics": ("monitor.run_log",),
    "model_card": ("commands.model_card",),
    "model_check": ("model.loading",),
    "objective": ("config.formula",),
    "opened": ("commands.open_policy",),
    "packed_attention": ("model.packed_attention",),
    "packing": ("model.packing",),
    "parts": ("training.prepare",),
    "plain_decoder": ("sampling.plain_decoder",),
    "policy": ("model.policy",),
    "presets": ("config.presets",),
    "preview": ("commands.dry_run",),
    "problems": ("data.word_problems",),
    "progress": ("monitor.progress",),
    "replay": ("commands.replay",),
    "replay_table": ("commands.replay_table",),
    "report": ("report.report",),
    "report_completions": ("report.completions",),
    "report_markdown": ("report.markdown",),
    "report_panels": ("report.panels",),
    "report_png": ("report.png",),
    "report_summary": ("report.summary",),
    "reward_worker": ("scoring.reward_worker",),
    "rewards": ("objective.rewards", "scoring.reward_call"),
    "rows": ("data.rows",),
    "run": ("training.run", "model.memory"),
    "run_folder": ("report.run_reader",),
    "sampler": ("sampling.sampler",),
    "scoring": ("scoring.scoring",),
    "setup": ("training.setup",),
    "sft": ("training.sft",),
    "stats": ("monitor.aggregates",),
    "targets": ("training.sft_targets",),
    "tiny": ("model.new_model",),
    "tracking": ("monitor.trackers",),
    "trainer": ("training.trainer", "training.update", "training.freeze"),
    "truncation": ("objective.truncation",),
    "watchdog": ("distributed.watchdog",),
}
STABLE_IMPORTS = {  # old module -> its names that `from grpo_core import ...` provides
    "advantages": ("ADVANTAGES", "center"),
    "config_file": ("load_config",),
    "job": ("train",),
    "losses": ("LOSSES", "PolicyLoss", "token_ratio"),
    "opened": ("open_source",),
    "rewards": ("REWARDS", "attempt"),
}


class OldModules:
    """A finder at the end of sys.meta_path: importing an old module raises an ImportError that names the new one."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        package, _, module = name.partition(".")
        folder = module.partition(".")[0]
        if package != PACKAGE:
            return
        if module in MOVED:
            raise ImportError(describe_old_module(module), name=name)
        if folder in MOVED and "." in module:  # from grpo_core.config import RunConfig
            sentence = f"there is no {name}; of earlier versions, {describe_old_module(folder)}"
            raise ImportError(sentence, name=f"{PACKAGE}.{folder}")


class Package(ModuleType):
    """The package grpo_core. In a folder of it that was a module, a missing name raises what importing it raises."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in MOVED and isinstance(value, ModuleType):  # the import system sets a folder that it has loaded
            value.__getattr__ = lambda missing: _raise_missing(value, missing)  # type: ignore[method-assign]
        super().__setattr__(name, value)


def _raise_missing(folder: ModuleType, name: str) -> None:
    """Raise the AttributeError of a name that a folder does not have, such as grpo_core.config.RunConfig."""
    sentence = f"module {folder.__name__!r} has no attribute {name!r}"
    if not name.startswith("__"):
        try:
            find_spec(f"{folder.__name__}.{name}")  # finds a module that is not imported yet
        except ImportError as error:
            sentence = str(error)
    raise AttributeError(sentence, name=name, obj=folder)


def install() -> None:
    """Let imports of old modules, and names in them, name the new ones."""
    if OldModules not in sys.meta_path:
        sys.meta_path.append(OldModules)
    sys.modules[PACKAGE].__class__ = Package


def describe_old_module(name: str, verb: str = " is now") -> str:
    """Return a sentence about where an old module is now; `name` is without the package."""
    targets = " and ".join(f"{PACKAGE}.{module}" for module in MOVED[name])
    stable = STABLE_IMPORTS.get(name)
    advice = f"; from {PACKAGE} import {', '.join(stable)} is the stable import" if stable else ""
    return f"{PACKAGE}.{name}{verb} {targets}{advice}"


def describe_old_import(error: Exception) -> str | None:
    """Describe the old module that was imported and where it is now, or return None if `error` has another cause."""
    name = _find_old_module(error)
    return None if name is None else describe_old_module(name, ", which is now")


def _find_old_module(error: Exception) -> str | None:
    """Return the old name of the module whose import raised `error`, without the package, or None.

    An old module whose name is a folder today is found, but not the names that were in it.
    """
    module = None
    if isinstance(error, ModuleNotFoundError):  # import grpo_core.losses
        module = error.name
    elif isinstance(error, ImportError) and error.name == PACKAGE:  # from grpo_core import losses
        match = re.match(r"cannot import name '(\w+)'", str(error))
        module = f"{PACKAGE}.{match[1]}" if match else None
    elif isinstance(error, ImportError):  # from grpo_core.config import RunConfig
        module = error.name
    elif isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):  # grpo_core.config.RunConfig
        module = error.obj.__name__
    package, _, name = (module or "").partition(".")
    return name if package == PACKAGE and name in MOVED else None
