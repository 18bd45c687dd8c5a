"""Find damage in the files of a model or an adapter by reading their beginnings, without a library that loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import BinaryIO

from grpo_core.config.text_files import parse_json, read_text
from grpo_core.schema import ConfigError

POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has not fetched
SIZE_BYTES = 8  # at the start of a safetensors file: the size of its header
METADATA = "__metadata__"  # the entry of the header that is no weight
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, as the library has it


def describe_damage(file: Path) -> str | None:
    """Return a sentence about the damage to a file of weights or a JSON file, which it names; None if none is seen.

    Of a safetensors file the header and the size are checked, of a JSON file its syntax, and of any file whether it is
    there.
    """
    try:
        with open(file, "rb") as opened:
            begin = opened.read(len(POINTER))
            if begin == POINTER:
                return f"{file.name} is a pointer of Git LFS in place of the file; fetch it with git lfs pull"
            if file.suffix == ".safetensors":
                opened.seek(0)
                return _describe_cut(file, opened.read(SIZE_BYTES), opened)
        if file.suffix == ".json":
            parse_json(read_text(file), file.name)
        return None if begin else f"{file.name} is empty"
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}"
    except ConfigError as error:
        return str(error).replace(str(file), file.name)


def _describe_cut(file: Path, begin: bytes, opened: BinaryIO) -> str | None:
    size, header = file.stat().st_size, int.from_bytes(begin, "little")
    if len(begin) < SIZE_BYTES or header > min(MAX_HEADER_BYTES, size - SIZE_BYTES):
        return f"{file.name} is damaged or cut off: it does not have the header of a safetensors file"
    try:
        entries = json.loads(opened.read(header))
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != METADATA]
        expected = SIZE_BYTES + header + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return f"{file.name} is damaged: its header cannot be read"
    if size == expected:
        return None
    problem = "cut off" if size < expected else "damaged"
    return f"{file.name} is {problem}: it has {size:,} of {expected:,} bytes"


def read_weight_names(file: Path) -> set[str]:
    """Return the names of the weights in a safetensors file that is not damaged."""
    with open(file, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(SIZE_BYTES), "little")))
    return {*header} - {METADATA}
