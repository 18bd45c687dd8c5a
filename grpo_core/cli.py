"""The commands of `python -m grpo_core`. Each calls `run_<command>` of grpo_core/commands/<command>.py.

Only click is imported here. A command imports its own module, so `--help` does not load torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
from click.shell_completion import CompletionItem, ShellComplete, add_completion_class

from grpo_core import __version__
from grpo_core.commands.errors import print_error
from grpo_core.commands.gc_pause import pause_gc
from grpo_core.distributed.notices import answer_early_interrupt
from grpo_core.schema import ConfigError, describe_impossible_path

PROGRAM = "python -m grpo_core"
COMPLETE_VARIABLE = "_GRPO_CORE_COMPLETE"  # in docs/commands.md
EXAMPLES = "\b\nExamples:\n  "  # click keeps the line breaks of a paragraph that begins with \b


class Override(click.ParamType):
    """A word `section.key=value`. Shell completion offers the keys, and the values of keys that have few."""

    name = "section.key=value"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from grpo_core.config.sections import RunConfig

        words = [f"{key}={value}" for key, values in _list_keys(RunConfig, "") for value in (values or [""])]
        return [CompletionItem(word) for word in words if word.startswith(incomplete)]


class Bash(ShellComplete):
    """Completion for bash, which takes `=` and `:` for ends of words and replaces only the part after them."""

    name = "bash"
    source_template = """\
%(complete_func)s() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        case $line in
            dir,*) compopt -o dirnames ;;
            file,*) compopt -o default ;;
            plain,*) COMPREPLY+=("${line#plain,}") ;;
        esac
    done < <(
        COMP_WORDS="$(printf '%%s\\n' "${COMP_WORDS[@]}")" COMP_CWORD=$COMP_CWORD %(complete_var)s=bash_complete "$1"
    )
    [ ${#COMPREPLY[@]} -ne 1 ] || [ "${COMPREPLY[0]%%=}" = "${COMPREPLY[0]}" ] || compopt -o nospace 2>/dev/null
}
complete -F %(complete_func)s %(prog_name)s
"""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the cursor and the word at it, joined where bash has cut them at = and :."""
        text, index = os.environ["COMP_WORDS"], int(os.environ["COMP_CWORD"])
        pieces = text.split("\n" if "\n" in text else " ")[: index + 1]
        pieces += [""] * (index + 1 - len(pieces))
        words: list[str] = []
        for before, piece in pairwise(pieces):
            if words and piece and (before in ("=", ":") or piece in ("=", ":")):
                words[-1] += piece
            else:
                words.append(piece)
        *complete, last = words
        self.cut = len(last) - len(pieces[-1].strip("=:"))
        return complete, last

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """Return a completion without what stands before bash's last word."""
        return f"{item.type},{item.value[self.cut :]}"


add_completion_class(Bash)


class FilePath(click.Path):
    """A path, in which `~` is the home folder also where the shell does not replace it, as in --config=~/a.yaml."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(os.path.expanduser(value), param, ctx)
        if problem := describe_impossible_path(path):
            is_option = isinstance(param, click.Option)
            raise ConfigError(f"{param.opts[0] if is_option else 'the path'} {problem}")
        return path


def _list_keys(section: type, prefix: str) -> Iterator[tuple[str, list[str]]]:
    """Yield every key below a section with the values that its type lists; other types list none."""
    hints = get_type_hints(section)
    for field in fields(section):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        if is_dataclass(hint):
            yield from _list_keys(hint, f"{key}.")
        elif hint is bool:
            yield key, ["true", "false"]
        else:
            yield key, _list_literals(hint)


def _is_override(word: str) -> bool:
    """Return whether a word sets a key of the configuration."""
    from grpo_core.config.sections import RunConfig

    key, equals, _ = word.partition("=")
    return bool(equals) and key.split(".")[0] in {field.name for field in fields(RunConfig)}


def _list_literals(hint: Any) -> list[str]:
    """Return the texts in a type such as `Literal["a", "b"] | None`."""
    if isinstance(hint, str):
        return [hint]
    return [text for part in get_args(hint) for text in _list_literals(part)]


def find_program_name() -> str:
    """Return how this program was called: `grpo_core`, or with `python -m`. A shell completes only the former."""
    name = Path(sys.argv[0]).name
    return name if name == "grpo_core" or COMPLETE_VARIABLE in os.environ else PROGRAM


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code. A user's mistake prints one sentence to stderr and returns 2."""
    program = find_program_name()
    try:
        return commands.main(arguments, program, COMPLETE_VARIABLE, standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return 2
    except click.UsageError as error:
        command_path = error.ctx.command_path if error.ctx else program
        print_error(f"{error.format_message().rstrip('.')}; see {command_path} --help")
        return 2
    except ConfigError as error:
        print_error(str(error))
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110})
@click.version_option(__version__, message="grpo_core %(version)s")
@click.option("--local_rank", hidden=True)  # the deepspeed launcher passes the rank here and in LOCAL_RANK
def commands(local_rank: str | None) -> None:
    """Train language models with GRPO: LoRA on DeepSpeed ZeRO-2.

    Every key of the configuration can be set as section.key=value. configs/tiny.yaml explains each key.
    """


config_option = click.option(
    "--config",
    type=FilePath(),
    help="YAML file, or the name of a shipped one, such as dapo.  "
    "[default: configs/gsm8k_qwen2.5_1.5b.yaml with a GPU, configs/tiny.yaml without]",
)
dry_run_option = click.option(
    "--dry-run",
    is_flag=True,
    help="Print the objective, the sizes of a step and its memory, sample and score one group, and write nothing.",
)
overrides_argument = click.argument("overrides", nargs=-1, type=Override())
source_argument = click.argument("source", metavar="RUN_OR_MODEL")
arguments_argument = click.argument("arguments", nargs=-1, metavar="[argument=value]...")


def command(name: str, examples: str) -> Callable:
    """Add a function to the group as a command. `examples` are command lines separated by "; ".

    The list of commands shows the first paragraph of the docstring.
    """

    def register(function: Callable) -> click.Command:
        short = " ".join((function.__doc__ or "").split("\n\n")[0].split())
        epilog = EXAMPLES + examples.replace("; ", "\n  ")
        return commands.command(name, short_help=short, epilog=epilog)(function)

    return register


@command(
    "train", "python -m grpo_core train --config configs/tiny.yaml --dry-run; python -m grpo_core train name=b seed=1"
)
@config_option
@dry_run_option
@overrides_argument
def train(config: Path | None, dry_run: bool, overrides: tuple[str, ...]) -> int:
    """Train with GRPO in this process, or in the processes that a launcher such as torchrun has started."""
    if dry_run:
        return _dry_run(config, overrides, 1, "WORLD_SIZE")
    with answer_early_interrupt():
        with pause_gc():
            from grpo_core.commands.train import run_train

        return run_train(config, overrides)


@command("sft", "python -m grpo_core sft --config configs/tiny_sft.yaml; python -m grpo_core sft lora.r=16 name=warm")
@click.option("--config", type=FilePath(), help="YAML file.  [default: configs/tiny_sft.yaml]")
@overrides_argument
def sft(config: Path | None, overrides: tuple[str, ...]) -> int:
    """Fine-tune on the data's own answers (supervised), as a warm-up before GRPO. Trains LoRA or all weights."""
    with answer_early_interrupt():
        from grpo_core.commands.sft import run_sft

        return run_sft(config, overrides)


@command("launch", "bash launch.sh 2; python -m grpo_core launch --processes 2 preset=dapo")
@config_option
@click.option(
    "--processes", type=click.IntRange(min=1), help="Processes on this machine.  [default: one per GPU, 1 without GPUs]"
)
@dry_run_option
@overrides_argument
def launch(config: Path | None, processes: int | None, dry_run: bool, overrides: tuple[str, ...]) -> int:
    """Start `train` in several processes on this machine. `bash launch.sh` calls this command."""
    with answer_early_interrupt():
        processes = processes or _count_gpus() or 1
        if dry_run:
            return _dry_run(config, overrides, processes, "NNODES")
        with pause_gc():
            from grpo_core.commands.launch import run_launch

        return run_launch(processes, config, overrides)


@command("study", "python -m grpo_core study objectives --dry-run; python -m grpo_core study my_study.yaml --jobs 2")
@click.argument("study_file", metavar="STUDY", type=FilePath())
@click.option("--jobs", type=click.IntRange(min=1), default=1, help="Number of runs that train at once.")
@click.option("--dry-run", is_flag=True, help="Check the study, list its runs and their states, and train nothing.")
def study(study_file: Path, jobs: int, dry_run: bool) -> int:
    """Train variants of a configuration with several seeds, and compare them with a control by paired tests.

    STUDY is a YAML file, or the name of a shipped one. Runs that have finished are skipped, stopped ones are resumed.
    """
    with answer_early_interrupt():
        from grpo_core.commands.study import run_study

    return run_study(study_file, jobs=jobs, dry_run=dry_run)


@command("evaluate", "python -m grpo_core evaluate runs/tiny; python -m grpo_core evaluate builtin:tiny --samples 0")
@source_argument
@click.option("--data", help="Other problems: a file, a folder or a hub id.  [default: the run's held-out problems]")
@click.option("--split", help="Split of --data.  [default: train for a file, otherwise test]")
@click.option("--set", "eval_set", help="One of the run's evaluation.sets.  [default: the first that does not select]")
@click.option("--limit", type=click.IntRange(min=1), help="Evaluate at most this many problems.  [default: all]")
@click.option(
    "--samples",
    type=click.IntRange(min=0),
    default=8,
    help="Samples per problem for mean@n, pass@k and maj@k. 0: the greedy answer only.",
)
@click.option("--temperature", type=float, default=1.0, help="Temperature of the samples. The first answer is greedy.")
@click.option("--top-k", type=int, help="Draw samples from the k most probable tokens only.")
@click.option("--top-p", type=float, help="Draw samples from the most probable tokens that reach this probability.")
@click.option("--min-p", type=float, help="Draw samples from tokens with this share of the highest probability.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Longest completion, in tokens.  [default: sampling.max_new_tokens of the run]",
)
@click.option(
    "--reward",
    "rewards",
    multiple=True,
    help="Report the mean of this reward. Repeat for several.  [default: rewards of the run]",
)
@click.option("--base/--no-base", default=True, help="Compare with the base model on the same problems.")
@click.option("--config", type=FilePath(), help="YAML file with prompts and data, for a model.")
@click.option(
    "--output",
    type=FilePath(),
    help="Output folder.  [default: RUN/evaluate, or ./evaluate for a model; evaluate-NAME with --data; "
    "evaluate-step-N for a checkpoint]",
)
@overrides_argument
def evaluate(source: str, config: Path | None, overrides: tuple[str, ...], **options: Any) -> int:
    """Measure the accuracy of a run, checkpoint, adapter or model and of its base model, with intervals."""
    from grpo_core.commands.evaluate import run_evaluate

    return run_evaluate(source, overrides, config, **options)


@command("sample", 'python -m grpo_core sample runs/tiny "Ada has 3 pens and buys 4 more. How many pens are left?"')
@source_argument
@click.argument("question", required=False)
@click.option(
    "-n",
    "--samples",
    type=click.IntRange(min=1),
    default=1,
    help="Number of answers. Several are shown in columns with their rewards.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    help="Sampling temperature; 0 is greedy.  [default: 0 for one answer, 1 for several]",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Longest answer, in tokens.  [default: sampling.max_new_tokens of the run]",
)
@click.option("--answer", help="Correct answer, for rewards and environments that need the column answer.")
@click.option("--row", type=click.IntRange(min=1), help="Answer this row of the evaluation data, with all its columns.")
@click.option("--base", is_flag=True, help="Switch the adapter off, so that the base model answers.")
@click.option("--raw", is_flag=True, help="Use the question as the whole prompt, without the run's template.")
@click.option("--seed", type=int, default=0, help="Seed of the sampling.")
@click.option("--config", type=FilePath(), help="YAML file with the prompt template, for a model.")
@overrides_argument
def sample(source: str, question: str | None, config: Path | None, overrides: tuple[str, ...], **options: Any) -> int:
    """Answer a question with a run or a model. Without a question, read questions from an interactive prompt."""
    from grpo_core.commands.sample import run_sample

    if question is not None and _is_override(question):
        question, overrides = None, (question, *overrides)
    return run_sample(source, question, config, overrides, **options)


@command("report", "python -m grpo_core report runs/tiny; python -m grpo_core report runs/a runs/b --output ab.html")
@click.argument("runs", nargs=-1, required=True, type=FilePath())
@click.option(
    "--output",
    type=FilePath(),
    help="HTML file.  [default: RUN/report.html for one run, ./report.html for several]",
)
@click.option("--png", is_flag=True, help="Also write the curves as PNG files (needs: pip install -e '.[report]').")
def report(runs: tuple[Path, ...], output: Path | None, png: bool) -> int:
    """Write one HTML page with the curves and completions of one or several runs. It needs no network."""
    from grpo_core.commands.report import run_report

    return run_report(runs, output, png=png)


@command(
    "replay",
    "python -m grpo_core replay runs/tiny/batches/step-000012 --loss gspo --loss cispo; "
    "python -m grpo_core replay runs/tiny/batches/step-000012 loss.average=token advantage.name=dr_grpo",
)
@click.argument("batch", type=FilePath())
@click.option(
    "--loss", multiple=True, help="Objective to compare: a loss, file.py:function or a preset. Repeat for several."
)
@click.option(
    "--model", metavar="SOURCE", help="Use other weights, e.g. a checkpoint.  [default: the weights before the step]"
)
@click.option("--output", type=FilePath(), help="Also write all numbers, per token, to this JSON file.")
@overrides_argument
def replay(batch: Path, overrides: tuple[str, ...], **options: Any) -> int:
    """Compare the gradients of several objectives on one batch that a run saved (debug.dump_batches)."""
    from grpo_core.commands.replay import run_replay

    return run_replay(batch, overrides, **options)


@command(
    "export", "python -m grpo_core export runs/tiny; python -m grpo_core export runs/tiny --push me/tiny --dry-run"
)
@click.argument("run", metavar="RUN")
@click.option(
    "--output",
    type=FilePath(),
    help="Output folder.  [default: RUN/export, or RUN/export-adapter with --adapter]",
)
@click.option("--merged/--adapter", default=True, help="Write the merged model, or the adapter alone.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bf16", "fp16", "fp32"]),
    default="auto",
    help="Precision of the weights; auto: as in the run folder.",
)
@click.option("--push", metavar="ORG/NAME", help="Upload to this hub repository, with HF_TOKEN or `hf auth login`.")
@click.option("--private", is_flag=True, help="Create the hub repository as private.")
@click.option("--dry-run", is_flag=True, help="List the files, print the model card, and write nothing.")
@overrides_argument
def export(run: str, merged: bool, overrides: tuple[str, ...], **options: Any) -> int:
    """Export a run as a merged model that is compared with the original, or as an adapter, with a model card."""
    from grpo_core.commands.export import run_export

    return run_export(run, overrides, adapter=not merged, **options)


@command("losses", "python -m grpo_core losses")
def losses() -> int:
    """List the functions of the objective (losses, averages, KLs, advantages, ...) and the presets."""
    from grpo_core.commands.losses import run_losses

    return run_losses()


@command("rewards", "python -m grpo_core rewards")
def rewards() -> int:
    """List the built-in rewards with their arguments and the columns that they need."""
    from grpo_core.commands.rewards import run_rewards

    return run_rewards()


@command("presets", "python -m grpo_core presets")
def presets() -> int:
    """List the presets: published objectives, with their sources and the keys that they set."""
    from grpo_core.commands.presets import run_presets

    return run_presets()


@command("check-loss", "python -m grpo_core check-loss gspo; python -m grpo_core check-loss mine.py:soft power=0.7")
@click.argument("name")
@arguments_argument
def check_loss(name: str, arguments: tuple[str, ...]) -> int:
    """Check a loss against the laws that every sound loss obeys. Takes seconds on a CPU.

    NAME is one that `losses` lists, or my_file.py:my_loss.
    """
    from grpo_core.commands.check_loss import run_check_loss
    from grpo_core.config.words import parse_arguments
    from grpo_core.objective.losses import LOSSES

    return run_check_loss(name, parse_arguments(arguments, LOSSES, name))


@command("check-advantage", "python -m grpo_core check-advantage rloo")
@click.argument("name")
@arguments_argument
def check_advantage(name: str, arguments: tuple[str, ...]) -> int:
    """Check an advantage against the laws that every sound advantage obeys. Takes seconds on a CPU.

    NAME is one that `losses` lists, or my_file.py:my_advantage.
    """
    from grpo_core.commands.check_advantage import run_check_advantage
    from grpo_core.config.words import parse_arguments
    from grpo_core.objective.advantages import ADVANTAGES

    return run_check_advantage(name, parse_arguments(arguments, ADVANTAGES, name))


def _dry_run(config: Path | None, overrides: tuple[str, ...], processes: int, factor: str) -> int:
    """Show what a run would do in `processes` times as many processes as the variable `factor` of the environment."""
    from grpo_core.config.files import load_job
    from grpo_core.data.forms import recognise

    # first, so that a mistake is reported before transformers is imported
    loaded = load_job(config, overrides, notify=lambda sentence: print(f"note: {sentence}"), recognise=recognise)
    from grpo_core.commands.dry_run import run_dry_run
    from grpo_core.distributed.ranks import read_count

    return run_dry_run(loaded, processes * read_count(factor, default=1, minimum=1))


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()
