"""The rows of a large data set, which stay in their files until they are asked for."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np

from grpo_core.config.text_files import decode_text, parse_json
from grpo_core.schema import ConfigError, first_line

CHUNK = 1000  # rows that are in memory together

Row = dict[str, Any]
Read = Callable[[Sequence[int]], list[Row]]  # the rows at these places of a file


class RowsOnDisk(Sequence[Row]):
    """Rows of a split as a sequence: `numbers` are their places in the split, and `source` its name."""

    def __init__(self, read: Read, numbers: np.ndarray, source: str) -> None:
        self.read, self.numbers, self.source = read, numbers, source

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> RowsOnDisk: ...
    def __getitem__(self, place: int | slice) -> Row | RowsOnDisk:
        if isinstance(place, slice):
            return self.select(np.arange(len(self))[place])
        return self.read([int(self.numbers[place])])[0]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), CHUNK):
            yield from self.read(self.numbers[start : start + CHUNK].tolist())

    def map(self, function: Callable[[Row], Row]) -> RowsOnDisk:
        """Return the rows as `function` changes them."""
        return RowsOnDisk(partial(_read_changed, self.read, function), self.numbers, self.source)

    def select(self, places: Sequence[int] | np.ndarray) -> RowsOnDisk:
        """Return the rows at some places of this sequence."""
        return RowsOnDisk(self.read, self.numbers[np.asarray(places, dtype=np.int64)], self.source)


def _read_changed(read: Read, function: Callable[[Row], Row], places: Sequence[int]) -> list[Row]:
    return [function(row) for row in read(places)]


class JsonLines:
    """The rows of a file with one JSON object per line; only the places of the lines are in memory."""

    def __init__(self, path: Path) -> None:
        """Read the whole file once.

        Raises:
            ConfigError: a line is no JSON object; the message names it.
        """
        self.path = path
        self.columns: dict[str, None] = {}
        starts, start = array("q"), 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    starts.append(start)
                    self.columns |= dict.fromkeys(self._parse(line, f"{path}, line {number},"))
                start += len(line)
        self.starts, self.num_bytes = np.frombuffer(starts, dtype=np.int64), start

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, places: Sequence[int]) -> list[Row]:
        """Return the rows at some places, each with every column of the file."""
        rows = []
        with self.path.open("rb") as file:
            for place in places:
                file.seek(self.starts[place])
                row = self._parse(file.readline(), f"{self.path}, row {place + 1},")
                rows.append({name: row.get(name) for name in self.columns})
        return rows

    @staticmethod
    def _parse(line: bytes, place: str) -> Row:
        row = parse_json(decode_text(line, place).rstrip("\r\n"), place)
        if not isinstance(row, dict):
            raise ConfigError(f"{place} is {str(row)[:40]}; it must be an object whose keys are the columns")
        return row


class MappedTable:
    """The rows of a data set of the library `datasets`, which maps its files into memory as they are read."""

    def __init__(self, table: Any, path: str) -> None:
        self.table, self.path = table, path

    def __len__(self) -> int:
        return len(self.table)

    @property
    def num_bytes(self) -> int:
        """Return the size of the rows."""
        return self.table.data.nbytes

    def read(self, places: Sequence[int]) -> list[Row]:
        """Return the rows at some places.

        Raises:
            ConfigError: they cannot be read.
        """
        try:
            columns = self.table[list(places)]
        except MemoryError:
            raise
        except Exception as error:  # of the reader of a column's type, such as images
            raise ConfigError(f"data.path is {self.path!r}, and it cannot be read: {first_line(error)}") from error
        return [{name: values[i] for name, values in columns.items()} for i in range(len(places))]
