"""Set files to the mode of the process's umask, where a library writes them readable by their owner only."""

from __future__ import annotations

import os
import re
from pathlib import Path


def apply_umask(*files: Path) -> None:
    """Set the mode of each file to 0666 less the umask. safetensors writes 0600, which nobody else can read."""
    mode = 0o666 & ~_read_umask()
    for file in files:
        file.chmod(mode)


def _read_umask() -> int:
    """Return the umask of this process, without changing it where the system says it."""
    try:
        match = re.search(r"^Umask:\s*([0-7]+)", Path("/proc/self/status").read_text(encoding="utf-8"), re.M)
    except OSError:
        match = None
    if match:
        return int(match[1], 8)
    umask = os.umask(0o077)  # reading it means setting it; a file of another thread is then its owner's alone
    os.umask(umask)
    return umask
