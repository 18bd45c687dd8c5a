"""Write a file whole or not at all, so that a full disk leaves the earlier file as it was."""

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` by way of a file beside it.

    Raises:
        OSError: the disk is full, or the folder cannot be written; `path` is as before.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
