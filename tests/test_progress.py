"""Bars and clocks: in a terminal they come and go, in a log file and on other ranks there is nothing."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios

import pytest
from conftest import ROOT
from forkserver import interpreter

pytestmark = pytest.mark.slow

CODE = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from grpo_core.monitor import progress
from grpo_core.config.sections import RunConfig
from grpo_core.monitor.run_log import RunLog
progress.DELAY = 0.3
with progress.show_elapsed("loading the model"):
    time.sleep({loading})
with progress.progress_bar(4, "evaluating", "task") as shown:
    for _ in range(4):
        time.sleep(0.3)
        shown.update()
log = RunLog(Path({folder!r}), RunConfig(), 0, 2)
with log.phase("sample"):
    time.sleep({sampling})
log.info("a line")
log.close()
print("done", flush=True)
"""

AND_THEN = """
import time
from tqdm import tqdm
from grpo_core.monitor import progress
progress.DELAY = 0.3
with progress.show_elapsed("loading the model"):
    time.sleep(0.6)
print("the adapter", flush=True)
with progress.show_elapsed("quick"):
    time.sleep(0.05)
    tqdm.write("said early")  # which shows every bar, long before it is due
print("its end", flush=True)
try:
    with progress.show_elapsed("failing"):
        time.sleep(0.6)
        raise ValueError
except ValueError:
    print("in", flush=True)
"""


SECONDS = {"loading": 2.5, "sampling": 2.2}  # enough for a clock to tick
SHORT = {"loading": 0.6, "sampling": 0.6}  # enough for a bar to appear


def in_terminal(code, env, stdout=None):
    """What a process writes to a terminal; its errors alone, where `stdout` is another place."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen([interpreter(), "-c", code], stdout=stdout or theirs, stderr=theirs, env=env, cwd=ROOT)
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        written += part
    assert process.wait() == 0, written.decode()
    return written.decode()


def screen(written):
    """What is left to see: a carriage return goes back to the line's beginning, a bar that ends wipes itself."""
    lines, row = [""], 0
    for piece in re.split(r"(\r|\n|\x1b\[A)", written):
        if piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
            at = 0
        elif piece == "\x1b[A":
            row -= 1
        elif piece == "\r":
            at = 0
        elif piece:
            at = 0 if "at" not in locals() else at
            lines[row] = (lines[row].ljust(at)[:at] + piece + lines[row][at + len(piece) :]).rstrip()
            at += len(piece)
    return [line for line in lines if line.strip()]


def test_in_a_terminal_they_tick_and_leave_nothing_behind(tmp_path, environment):
    written = in_terminal(
        CODE.format(tests=str(ROOT / "tests"), folder=str(tmp_path / "r"), **SECONDS),
        {**environment, "TERM": "xterm", "COLUMNS": "100"},
    )
    assert re.search(r"loading the model  00:0[12]", written) and "evaluating:" in written and "3/4" in written
    assert len(set(re.findall(r"sample:   0%.*?\[(00:0\d)<", written))) >= 2, written  # the clock of the phase goes on
    assert screen(written) == ["a line", "done"]


@pytest.mark.parametrize("piped", [False, True])
def test_what_comes_next_begins_on_an_empty_line(environment, tmp_path, piped):
    with open(tmp_path / "out", "w") as out:
        written = in_terminal(AND_THEN, {**environment, "TERM": "xterm", "COLUMNS": "100"}, out if piped else None)
    said = ["the adapter", "said early", "its end", "in"]
    assert all(f"{what}  00:00" in written for what in ("loading the model", "failing")), written
    assert screen(written) == ([] if piped else said)
    assert (tmp_path / "out").read_text().splitlines() == (said if piped else [])


def test_in_a_log_file_and_on_other_ranks_there_is_nothing(tmp_path, environment):
    code = CODE.format(tests=str(ROOT / "tests"), folder=str(tmp_path / "r"), **SHORT)
    done = subprocess.run([interpreter(), "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout == "a line\ndone\n"
    other = in_terminal(code, {**environment, "TERM": "xterm", "RANK": "1", "WORLD_SIZE": "2"})
    assert other.split() == ["done"]
