"""Read the rows of a CSV or TSV file; every cell is text, exactly as written."""

from __future__ import annotations

import csv
import gzip
import io
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from grpo_core.config.text_files import decode_text, read_bytes
from grpo_core.schema import ConfigError

GZIP = b"\x1f\x8b"  # the first bytes of a gzip file


def read_csv_rows(path: Path, separator: str = ",", names: Sequence[str] | None = None) -> list[dict[str, str | None]]:
    """Return the rows of a CSV file; an empty cell, and one that a short row lacks, is None.

    `names` are the columns of a file without a header. Blank lines are skipped. The file may be compressed with gzip.

    Raises:
        ConfigError: the file is no UTF-8 text or no CSV; the message names the line.
    """
    reader = csv.reader(io.StringIO(_read(path), newline=""), delimiter=separator, strict=True)
    rows: list[dict[str, str | None]] = []
    columns = None if names is None else list(names)
    limit = csv.field_size_limit(sys.maxsize)  # a long cell is no error
    try:
        for cells in reader:
            if not cells or (len(cells) == 1 and cells[0].isspace()):
                continue
            if columns is None:
                columns = _name_columns(cells)
                continue
            if len(cells) > len(columns):
                raise ConfigError(
                    f"{path}, line {reader.line_num}, has {len(cells)} cells, but there are only {len(columns)} "
                    f"columns; put double quotes around a cell that holds {separator!r}"
                )
            rows.append(dict.fromkeys(columns) | {k: cell or None for k, cell in zip(columns, cells, strict=False)})
    except csv.Error as error:
        reason = "a double quote is not closed" if "end of data" in str(error) else str(error)
        raise ConfigError(f"{path}, line {reader.line_num}, is not CSV: {reason}") from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _read(path: Path) -> str:
    data = read_bytes(path)
    if data.startswith(GZIP):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            raise ConfigError(f"{path} is compressed with gzip, and it is damaged") from None
    return decode_text(data, str(path))


def _name_columns(cells: list[str]) -> list[str]:
    """Return a header's names, each once: a second `a` is `a.1`, and an empty name at place i `Unnamed: i`."""
    names: list[str] = []
    for i, cell in enumerate(cells):
        name, count = cell or f"Unnamed: {i}", 0
        while name in names:
            count += 1
            name = f"{cell}.{count}"
        names.append(name)
    return names
