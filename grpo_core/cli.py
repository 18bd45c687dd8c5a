"""The commands of python -m grpo_core; `--help` lists them. What is heavy loads only where it is used."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click

from grpo_core import __version__
from grpo_core.schema import ConfigError, printable

CONFIGS = Path(__file__).parents[1] / "configs"
EXAMPLES = "\b\nExamples:\n  "  # \b keeps the lines that follow as they are


class Override(click.ParamType):
    """section.key=value; a shell completes the keys, and the values where there are few."""

    name = "section.key=value"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        from grpo_core.config.sections import RunConfig

        words = [f"{key}={value}" for key, values in _keys(RunConfig, "") for value in (values or [""])]
        return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def _keys(kind: type, prefix: str) -> Iterator[tuple[str, list[str]]]:
    """Every key below a section, with its values where they are few."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        if is_dataclass(hint):
            yield from _keys(hint, f"{key}.")
        else:
            options = [value for part in (hint, *get_args(hint)) for value in get_args(part)] or [*get_args(hint)]
            values = ["true", "false"] if hint is bool else [value for value in options if isinstance(value, str)]
            yield key, values


def main(arguments: list[str] | None = None) -> int:
    """Run a command; what the user did wrong is one sentence on stderr and exit code 2."""
    try:
        return commands.main(arguments, prog_name="python -m grpo_core", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as shown:
        print(shown.format_message(), file=sys.stderr)
        return 2
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "python -m grpo_core"
        return _said(f"{error.format_message().rstrip('.')}; {where} --help says more", 2)
    except ConfigError as error:
        return _said(error, 2)
    except (click.Abort, KeyboardInterrupt):
        return 130


def _said(error: Exception | str, exit_code: int) -> int:
    """Say what went wrong, once a machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(printable(f"grpo_core: {error}"), file=sys.stderr)
    return exit_code


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110})
@click.version_option(__version__, message="grpo_core %(version)s")
@click.option("--local_rank", hidden=True)  # the deepspeed launcher says it here and in LOCAL_RANK
def commands(local_rank: str | None) -> None:
    """GRPO with LoRA on DeepSpeed ZeRO-2, written by hand.

    Any key of the configuration can be given as section.key=value; configs/tiny.yaml explains every one.
    """


config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="A YAML file.  [default: configs/gsm8k_qwen2.5_1.5b.yaml on a GPU, configs/tiny.yaml on a CPU]",
)
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Say what would be done, sample and score one group, and stop. Nothing is written."
)
overrides_argument = click.argument("overrides", nargs=-1, type=Override())
source_argument = click.argument("source", metavar="RUN_OR_MODEL")


def command(name: str, epilog: str) -> Callable:
    """A command of the group, with its examples; the list of commands shows its docstring's first paragraph whole."""

    def register(function: Callable) -> click.Command:
        short = " ".join((function.__doc__ or "").split("\n\n")[0].split())
        return commands.command(name, short_help=short, epilog=EXAMPLES + epilog.replace("; ", "\n  "))(function)

    return register


@command(
    "train", "python -m grpo_core train --config configs/tiny.yaml --dry-run; python -m grpo_core train name=b seed=1"
)
@config_option
@dry_run_option
@overrides_argument
def train(config: Path | None, dry_run: bool, overrides: tuple[str, ...]) -> int:
    """Train by GRPO, in as many processes as a launcher has started."""
    from grpo_core.config.files import load

    loaded = load(config or _default_config(), overrides)
    if dry_run:
        return _preview(loaded, int(os.environ.get("WORLD_SIZE", 1)))
    from grpo_core.distributed import ranks
    from grpo_core.training import job

    ranks.die_with_launcher()
    return _job(job.train, loaded)


@command("sft", "python -m grpo_core sft --config configs/tiny_sft.yaml; python -m grpo_core sft lora.r=16 name=warm")
@click.option("--config", type=click.Path(path_type=Path), default=CONFIGS / "tiny_sft.yaml", help="A YAML file.",
              show_default="configs/tiny_sft.yaml")  # fmt: skip
@overrides_argument
def sft(config: Path, overrides: tuple[str, ...]) -> int:
    """Supervised warm-up through the same engine: the data's own answers, LoRA or all weights."""
    from grpo_core.config.files import load

    loaded = load(config, overrides)
    from grpo_core.distributed import ranks
    from grpo_core.training.sft import run_sft

    ranks.die_with_launcher()
    return _job(run_sft, loaded)


@command("launch", "bash launch.sh 2; python -m grpo_core launch --processes 2 preset=dapo")
@config_option
@click.option("--processes", type=click.IntRange(min=1), help="How many on this machine.  [default: one a GPU, or one]")
@dry_run_option
@overrides_argument
def launch(config: Path | None, processes: int | None, dry_run: bool, overrides: tuple[str, ...]) -> int:
    """Start `train` in several processes of this machine (what launch.sh calls)."""
    config, processes = config or _default_config(), processes or _gpus() or 1
    if dry_run:
        from grpo_core.config.files import load

        return _preview(load(config, overrides), processes * int(os.environ.get("NNODES", 1)))
    from grpo_core.commands.launch import launch

    return launch(processes, config, list(overrides))


@command("evaluate", "python -m grpo_core evaluate runs/tiny; python -m grpo_core evaluate builtin:tiny --samples 0")
@source_argument
@click.option("--data", help="Other problems: a file, a folder or a hub id.  [default: the run's held-out ones]")
@click.option("--split", help="Their split.  [default: test, or train of a file]")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many problems.  [default: all]")
@click.option("--samples", type=click.IntRange(min=0), default=8, help="Of each problem, for pass@k, maj@k and mean@n.")
@click.option("--temperature", type=float, default=1.0, help="Of the samples; the first answer is greedy.")
@click.option("--top-k", type=int, help="Samples from the k most probable tokens only.")
@click.option("--top-p", type=float, help="Samples from the fewest tokens that hold this much probability.")
@click.option("--min-p", type=float, help="Samples from tokens with this share of the most probable one's.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="[default: the run's]")
@click.option(
    "--reward", "rewards", multiple=True, help="A reward to tell the mean of; again for more.  [default: the run's]"
)
@click.option("--base/--no-base", default=True, help="The base model on the same problems, and McNemar's test.")
@click.option("--config", type=click.Path(path_type=Path), help="A YAML file for what is no run: its prompts and data.")
@click.option("--output", type=click.Path(path_type=Path), help="A folder.  [default: RUN/evaluate, or evaluate]")
@overrides_argument
def evaluate(source: str, config: Path | None, overrides: tuple[str, ...], **options: Any) -> int:
    """Accuracy of a run, a checkpoint, an adapter or a model, against its base, with intervals."""
    from grpo_core.commands.evaluate import run_evaluate

    return run_evaluate(source, overrides, config, **options)


@command("sample", 'python -m grpo_core sample runs/tiny "Ada has 3 pens and buys 4 more. How many pens are left?"')
@source_argument
@click.argument("question", required=False)
@click.option(
    "-n", "--samples", type=click.IntRange(min=1), default=1, help="So many answers side by side, with rewards."
)
@click.option(
    "--temperature", type=click.FloatRange(min=0), help="0: greedy.  [default: 0 for one answer, 1 for several]"
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="[default: the run's]")
@click.option("--answer", help="The right answer, for rewards that read it.")
@click.option("--base", is_flag=True, help="With the adapter off.")
@click.option("--raw", is_flag=True, help="The question is the whole prompt; the run's template is left out.")
@click.option("--seed", type=int, default=0, help="Of the noise.")
@click.option("--config", type=click.Path(path_type=Path), help="A YAML file for what is no run: its template.")
def sample(source: str, question: str | None, config: Path | None, **options: Any) -> int:
    """Ask a run or a model: one answer, streamed; or, without a question, as many as you like."""
    from grpo_core.commands.sample import run_sample

    return run_sample(source, question, config, **options)


@command("report", "python -m grpo_core report runs/tiny; python -m grpo_core report runs/a runs/b --output ab.html")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), help="The page.  [default: RUN/report.html; of several, report.html]"
)
@click.option("--png", is_flag=True, help="The curves as PNG files too, beside it (needs the extra `report`).")
def report(runs: tuple[Path, ...], output: Path | None, png: bool) -> int:
    """One page of curves and completions, of one run or several; it needs no network."""
    from grpo_core.report.report import write_report

    for path in write_report(runs, output, png=png):
        print(path)
    return 0


@command(
    "replay",
    "python -m grpo_core replay runs/tiny/batches/step-000012 --loss gspo --loss cispo; "
    "python -m grpo_core replay runs/tiny/batches/step-000012 loss.average=token advantage.name=dr_grpo",
)
@click.argument("batch", type=click.Path(path_type=Path))
@click.option("--loss", multiple=True, help="Another objective: a loss, file.py:function, or a preset; again for more.")
@click.option("--model", metavar="SOURCE", help="Other weights, as a checkpoint.  [default: those before the step]")
@click.option("--output", type=click.Path(path_type=Path), help="Everything, with each token's numbers, as JSON.")
@overrides_argument
def replay(batch: Path, overrides: tuple[str, ...], **options: Any) -> int:
    """A batch that debug.dump_batches kept, under other losses: whose gradient goes where, and by which tokens."""
    from grpo_core.commands.replay import run_replay

    return run_replay(batch, overrides, **options)


@command(
    "export", "python -m grpo_core export runs/tiny; python -m grpo_core export runs/tiny --push me/tiny --dry-run"
)
@click.argument("run", metavar="RUN")
@click.option(
    "--output", type=click.Path(path_type=Path), help="A folder.  [default: RUN/export, or RUN/export-adapter]"
)
@click.option("--merged/--adapter", default=True, help="One whole model, or the adapter alone.")
@click.option("--dtype", type=click.Choice(["auto", "bf16", "fp16", "fp32"]), default="auto", help="auto: as trained.")
@click.option("--push", metavar="ORG/NAME", help="Upload it to the hub; HF_TOKEN or the hub's login says who you are.")
@click.option("--private", is_flag=True, help="What is uploaded is for you alone.")
@click.option("--dry-run", is_flag=True, help="List what would be written and uploaded, with the card, and stop.")
def export(run: str, merged: bool, **options: Any) -> int:
    """A run's model for others: merged, checked, with its tokenizer and a model card; or its adapter."""
    from grpo_core.commands.export import run_export

    return run_export(run, adapter=not merged, **options)


@command("losses", "python -m grpo_core losses")
def losses() -> int:
    """Every loss, average, KL, advantage and preset, with arguments and sources."""
    from grpo_core.commands import list_names

    print(list_names.catalogue())
    return 0


@command("rewards", "python -m grpo_core rewards")
def rewards() -> int:
    """Every built-in reward, with arguments and the columns it reads."""
    from grpo_core.commands import list_names

    print(list_names.rewards())
    return 0


@command("presets", "python -m grpo_core presets")
def presets() -> int:
    """Every published objective by name, with its source and what it sets."""
    from grpo_core.commands import list_names

    print(list_names.presets())
    return 0


def _check(kind: str) -> Callable:
    @click.argument("name")
    @click.argument("overrides", nargs=-1, metavar="[argument=value]...")
    def check(name: str, overrides: tuple[str, ...]) -> int:
        from grpo_core.commands import check_function
        from grpo_core.config.files import parse_arguments

        run = check_function.run_check_loss if kind == "loss" else check_function.run_check_advantage
        return run(name, parse_arguments(overrides))

    check.__doc__ = f"Is this {kind} sound? A table of laws, in seconds. NAME may be my_file.py:my_{kind}."
    return check


command("check-loss", "python -m grpo_core check-loss gspo; python -m grpo_core check-loss mine.py:soft power=0.7")(
    _check("loss")
)
command("check-advantage", "python -m grpo_core check-advantage rloo")(_check("advantage"))


def _job(job: Callable, config: Any) -> int:
    """Run a job to its end, or to the one that it came to."""
    from grpo_core.distributed import ranks, signals

    try:
        job(config)
    except signals.Interrupted as signal:
        return signal.exit_code
    except signals.RunFailed as error:
        return _said(error, 3)
    ranks.shutdown()
    return 0


def _preview(config: Any, processes: int) -> int:
    from grpo_core.commands.dry_run import preview

    for section in preview(config, processes):
        print(section, end="\n\n", flush=True)
    return 0


def _default_config() -> Path:
    return CONFIGS / ("gsm8k_qwen2.5_1.5b.yaml" if _gpus() else "tiny.yaml")


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
