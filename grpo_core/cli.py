"""The commands of python -m grpo_core; `--help` lists them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from grpo_core.config_file import arguments_of, load
from grpo_core.schema import ConfigError, printable

CONFIGS = Path(__file__).parents[1] / "configs"


def main(arguments: list[str] | None = None) -> int:
    """Run a command; what the user did wrong is one sentence on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="grpo_core", description="GRPO with LoRA on DeepSpeed ZeRO-2.", allow_abbrev=False
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher says it here and in LOCAL_RANK
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("train", "train by GRPO, in as many processes as a launcher started"),
        ("sft", "supervised warm-up through the same engine"),
        ("launch", "start `train` in several processes of this machine (what launch.sh calls)"),
    ):
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument(
            "--config",
            type=Path,
            help="a YAML file; without it configs/gsm8k_qwen2.5_1.5b.yaml on a GPU and configs/tiny.yaml on a CPU",
        )
        command.add_argument("overrides", nargs="*", metavar="section.key=value")
        if name == "launch":
            command.add_argument("--processes", type=int, required=True)
    commands.add_parser("losses", help="every loss, average, KL, advantage and preset, with arguments and sources")
    commands.add_parser("rewards", help="every built-in reward, with arguments and the columns it reads")
    commands.add_parser("presets", help="every published objective by name, with its source and what it sets")
    for kind in ("loss", "advantage"):
        command = commands.add_parser(
            f"check-{kind}", help=f"is this {kind} sound? a table of laws, in seconds", allow_abbrev=False
        )
        command.add_argument("name", help=f"a name, or my_file.py:my_{kind}")
        command.add_argument("overrides", nargs="*", metavar="argument=value")
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest):
        parser.error(f"unknown option {rest[0]}")
    if rest and not hasattr(options, "overrides"):
        parser.error(f"{options.command} takes no arguments; got {rest[0]}")
    if rest:
        options.overrides += rest  # those that stood before --config
    try:
        return COMMANDS[options.command](options)
    except ConfigError as error:
        return _said(error, 2)


def _said(error: Exception, exit_code: int) -> int:
    """Say what went wrong, once a machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(printable(f"grpo_core: {error}"), file=sys.stderr)
    return exit_code


def _train(options: argparse.Namespace) -> int:
    config = load(options.config or _default_config(), options.overrides)
    from grpo_core import checkpoint, distributed, interrupt  # the heavy rooms load only where they are used
    from grpo_core.setup import setup
    from grpo_core.trainer import train

    distributed.die_with_launcher()
    interrupt.listen()
    run, tokenizer = setup(config)
    try:
        train(run)
        adapter = run.folder / "adapter"
        checkpoint.export(adapter, run.policy, tokenizer)
    except interrupt.Interrupted as signal:
        run.log.say(f"stopped by {signal} with a checkpoint; resume={run.folder} goes on")
        return signal.exit_code
    except interrupt.RunFailed as error:
        return _said(error, 3)
    finally:
        run.log.close()
    run.log.say(_summary(run.folder, adapter))
    distributed.shutdown()
    return 0


def _sft(options: argparse.Namespace) -> int:
    config = load(options.config or CONFIGS / "tiny_sft.yaml", options.overrides)
    from grpo_core import distributed, interrupt
    from grpo_core.sft import run_sft

    distributed.die_with_launcher()
    interrupt.listen()
    try:
        run_sft(config)
    except interrupt.Interrupted as signal:
        return signal.exit_code
    except interrupt.RunFailed as error:
        return _said(error, 3)
    distributed.shutdown()
    return 0


def _launch(options: argparse.Namespace) -> int:
    from grpo_core.launch import launch

    config = options.config or _default_config()
    return launch(options.processes, config, options.overrides)


def _list(options: argparse.Namespace) -> int:
    from grpo_core import catalogue

    lists = {"losses": catalogue.catalogue, "rewards": catalogue.rewards, "presets": catalogue.presets}
    print(lists[options.command]())
    return 0


def _check(options: argparse.Namespace) -> int:
    from grpo_core import check

    run = check.run_check_loss if options.command == "check-loss" else check.run_check_advantage
    return run(options.name, arguments_of(options.overrides))


def _default_config() -> Path:
    import torch

    return CONFIGS / ("gsm8k_qwen2.5_1.5b.yaml" if torch.cuda.is_available() else "tiny.yaml")


def _summary(folder: Path, adapter: Path) -> str:
    """The last lines: accuracy before and after, and where the adapter is."""
    from grpo_core.metrics import describe

    path, lines = folder / "evaluation.jsonl", []
    if path.exists() and (rows := [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]):
        lines = [f"before: {describe(rows[0])}", f"after:  {describe(rows[-1])}"]
    return "\n".join([*lines, f"adapter: {adapter}"])


COMMANDS = {
    "train": _train,
    "sft": _sft,
    "launch": _launch,
    "losses": _list,
    "rewards": _list,
    "presets": _list,
    "check-loss": _check,
    "check-advantage": _check,
}
