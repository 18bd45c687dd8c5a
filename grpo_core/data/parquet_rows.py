"""Local Parquet files, a few rows in memory at a time.

`datasets` lets Arrow decode rows ahead of those that it writes to its cache, and how many depends on the disk: a file
can be in memory as a whole while a slow disk takes its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ROWS_AT_ONCE = 100
BUFFER_BYTES = 2**20


def load_in_parts(builder: Any, split: str) -> Any:
    """Return the rows of a split of a builder of `datasets` for local Parquet files, which are read by one thread."""
    from pyarrow import Table
    from pyarrow.parquet import ParquetFile

    def generate_tables(files: Any, **_: Any) -> Iterator[tuple[tuple[int, int], Any]]:
        for i, file in enumerate(files):
            with ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES) as parquet:
                for j, batch in enumerate(parquet.iter_batches(ROWS_AT_ONCE, use_threads=False)):
                    yield (i, j), builder._cast_table(Table.from_batches([batch]))

    builder._generate_tables = generate_tables
    builder.download_and_prepare()
    return builder.as_dataset(split=split)
