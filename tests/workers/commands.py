"""Runs the documents' commands one after another in one process, which saves the imports.

    [torchrun --nproc-per-node 2] commands.py JOBS.json PROBLEMS.json

A job is {cwd, kind, ...}: load (a configuration as it is written), main (a command of grpo_core), shell, python. The answer has
for each of them null or what went wrong, in words.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

from grpo_core import cli
from grpo_core.config.checks import prompts_per_rank
from grpo_core.config.files import load
from grpo_core.distributed import ranks


def load_only(config, overrides, processes):
    prompts_per_rank(load(config, overrides), processes)


def main(arguments, codes=(0,)):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = cli.main(arguments)
    if code not in codes:
        raise RuntimeError(f"exit code {code}: {said.getvalue()[-600:]}")


def local_job(config, overrides, processes, command=("train",)):
    """As written it must load; if its model and data are here it must run, in its short form, in one process."""
    supervised = "sft" in command
    loaded = load(config, overrides, supervised=supervised)
    if not supervised:
        prompts_per_rank(loaded, processes)
    data = loaded.data.path
    if loaded.model.path.startswith("builtin:") and (data.startswith("builtin:") or Path(data).is_file()):
        again = [] if loaded.resume else ["overwrite=true"]
        main([*command, "--config", str(config), *overrides, *short_form(loaded), *again])


def short_form(config):
    """Overrides that make a run short where it is long; one of two steps is run whole."""
    steps = config.trainer.num_steps
    return [
        f"trainer.num_steps={steps if steps is not None and steps <= 2 else 1}",
        f"trainer.completions_per_step={min(config.trainer.completions_per_step, 32)}",
        f"sampling.max_new_tokens={min(config.sampling.max_new_tokens, 16)}",
        f"evaluation.num_tasks={min(config.evaluation.num_tasks, 8)}",
        f"data.limit={min(config.data.limit or 100, 100)}",
    ]


def shell(command):
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-600:]}")


def python(code):
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "the document's block", "exec"), {"__name__": "a_block"})


KINDS = {"load": load_only, "main": main, "job": local_job, "shell": shell, "python": python}

if __name__ == "__main__":
    ranks.shutdown = lambda: None  # DeepSpeed holds on to the group of its first run
    problems = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        os.chdir(job.pop("cwd"))
        try:
            KINDS[job.pop("kind")](**job)
            problems.append(None)
        except (Exception, SystemExit) as error:
            problems.append("".join(traceback.format_exception_only(error)).strip())
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[2]).write_text(json.dumps(problems))
