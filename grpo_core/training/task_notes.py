"""Sentences about the tasks of a run, which are printed before its first step."""

from __future__ import annotations

from grpo_core.config.sections import RunConfig
from grpo_core.counts import quantify
from grpo_core.data.columns import read_path
from grpo_core.data.eval_sets import is_share
from grpo_core.data.tasks import select_source
from grpo_core.schema import GENERATED
from grpo_core.training.prepare import Prepared

SPLIT_COLUMNS = ("extra_info.split", "split")  # of data of others, such as verl's
TESTED_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")


def list_held_out(config: RunConfig, prepared: Prepared) -> list[str]:
    """Return a sentence for each source whose evaluation takes rows out of the training data: how many, and of which.

    With evaluation.sets these are the sets without a path and a split.
    """
    shares = {part.name for part in config.evaluation.sets if is_share(part)} or {"", *config.source_names}
    sentences = []
    for name in config.source_names:
        data = config.of_source(name).data
        trained, tasks = select_source(prepared.tasks, name), select_source(prepared.eval_tasks, name)
        held_out = sum(task.eval_set in shares for task in tasks)
        has_own = data.eval_path is not None or data.eval_split is not None or data.path.startswith(GENERATED)
        if held_out and not has_own:
            sentences.append(
                f"of the {quantify(len(trained) + held_out, 'task')} of {data.path} the run trains on "
                f"{len(trained):,}, and {held_out:,} {'is' if held_out == 1 else 'are'} held out for the evaluation "
                f"(evaluation.num_tasks)"
            )
    return sentences


def list_leaks(prepared: Prepared) -> list[str]:
    """Return a sentence about trained rows that name another split, and one about prompts that are evaluated too.

    Training rows that stay on disk are not compared.
    """
    if not isinstance(prepared.tasks, list):
        return []
    sentences = (_describe_mixed_splits(prepared), _describe_shared_prompts(prepared))
    return [sentence for sentence in sentences if sentence]


def _describe_mixed_splits(prepared: Prepared) -> str | None:
    for column in SPLIT_COLUMNS:
        values = {str(read_path(task.columns, column)) for task in prepared.tasks}
        tested = [value for value in TESTED_SPLITS if value in values]
        if tested and "train" in values:
            return (
                f"the run trains on rows whose {column} is {' or '.join(tested)}; to evaluate on them instead, write "
                f"data.split={column}=train data.eval_split={column}={tested[0]}"
            )
    return None


def _describe_shared_prompts(prepared: Prepared) -> str | None:
    trained = {task.prompt for task in prepared.tasks}
    shared = sum(task.prompt in trained for task in prepared.eval_tasks)
    if not shared:
        return None
    return (
        f"the data has prompts several times: of the {quantify(len(prepared.eval_tasks), 'task')} of the evaluation "
        f"{shared:,} {'has a prompt' if shared == 1 else 'have prompts'} that the run also trains on, so its accuracy "
        f"is too high for new problems"
    )
