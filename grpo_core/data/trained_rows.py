"""Find rows of other data among those that a run trains on."""

from __future__ import annotations

import json
from collections.abc import Iterable

from grpo_core.config.sections import RunConfig
from grpo_core.counts import quantify
from grpo_core.data.columns import rename
from grpo_core.data.eval_sets import load_eval_sets
from grpo_core.data.prompts import list_template_fields
from grpo_core.data.rows import Row, Rows
from grpo_core.data.rows_on_disk import RowsOnDisk
from grpo_core.schema import ConfigError


def warn_of_trained_rows(config: RunConfig, rows: Rows) -> str | None:
    """Return a sentence if rows that are to be evaluated give prompts that the run trains on, or None.

    Training data that cannot be read any more, or stays on disk, is not compared.
    """
    fields = list_template_fields(config.data.template)
    try:
        trained = load_eval_sets(config)[0]
    except (ConfigError, OSError):
        return None
    if isinstance(trained, RowsOnDisk):
        return None
    columns = config.data.columns
    known = set(_identify(trained, columns, fields))
    shared = sum(prompt in known for prompt in _identify(rows, columns, fields))
    if not shared:
        return None
    return (
        f"the run trains on the prompts of {quantify(shared, 'problem')} of {rows.source}, out of {len(rows):,} (its "
        f"data is {trained.source}), so the accuracy on them says nothing about new problems"
    )


def _identify(rows: Iterable[Row], columns: dict[str, str], fields: list[str]) -> Iterable[str]:
    """Yield what the prompt of each row is made from."""
    for row in rows:
        values = rename(row, columns)
        yield json.dumps([values.get(name) for name in fields], default=str, sort_keys=True)
