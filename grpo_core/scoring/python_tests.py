"""The reward `python_tests`: a completion's Python code passes the tests of its row.

The code runs in a child process with limits (program_child.py). These hold off accidents: endless loops, memory, files
and processes without end. They are no sandbox against malice.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from grpo_core.objective.rewards import REWARDS, cut_all_thinking
from grpo_core.scoring.deadline import check_seconds, compute_deadline

CHILD = Path(__file__).with_name("program_child.py")
MIB = 2**20
PASSED_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")  # no keys and tokens

_FENCE = re.compile(r"\s*(?P<marker>([-*+]|\d+[.)])[ \t]+)?```[ \t]*(?P<language>[\w+-]*)[^`]*")
LANGUAGES = ("", "py", "python", "python3")


def read_tests(value: Any) -> list[str] | list[list[str]] | None:
    """Return the tests of a row, or None if it has none that can be run.

    They are Python texts (a text, or a list such as MBPP's test_list), or pairs of stdin and expected stdout: a list of
    {input, output}, or {inputs: [...], outputs: [...]}. Either may be text in JSON. Python that every program passes,
    such as 5 or a function that is not called, is no test.
    """
    if isinstance(value, str):
        if not value.strip():
            return None
        if value.lstrip()[0] not in "[{":
            return [value] if can_fail(value) else None
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, dict):
        inputs, outputs = value.get("inputs"), value.get("outputs")
        if value.get("fn_name") or not isinstance(inputs, list) or not isinstance(outputs, list):
            return None
        if len(inputs) != len(outputs):
            return None
        value = [{"input": given, "output": expected} for given, expected in zip(inputs, outputs, strict=True)]
    if not isinstance(value, (list, tuple)) or not value:
        return None
    if all(isinstance(item, str) and item.strip() for item in value):
        return list(value) if any(map(can_fail, value)) else None
    pairs = [[item.get("input"), item.get("output")] if isinstance(item, dict) else [None] for item in value]
    return pairs if all(isinstance(text, str) for pair in pairs for text in pair) else None


@functools.lru_cache(maxsize=4096)
def can_fail(text: str) -> bool:
    """Return whether Python text asserts, raises or calls something when it is run, and not only defines it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the text's escapes
            body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    run = [node for statement in body if not isinstance(statement, definitions) for node in ast.walk(statement)]
    return any(isinstance(node, (ast.Assert, ast.Raise, ast.Call)) for node in run)


def find_code(text: str) -> str | None:
    """Return the last closed block of Python code, ```python ... ``` or one without a language, or None.

    The lines of a block that is indented, as in a list, lose the indentation of its fence.
    """
    code, language, lines, indent = None, None, [], 0
    for line in text.split("\n"):
        fence = _FENCE.fullmatch(line) if "```" in line else None
        if fence is not None and (language is None or fence["language"]):  # opens, also where one was not closed
            language, lines, indent = fence["language"].lower(), [], line.index("```")
        elif fence is not None and not fence["marker"]:
            code = "\n".join([*_cut_indent(lines, indent), ""]) if language in LANGUAGES else code
            language = None
        else:
            lines.append(line)
    return code


def _cut_indent(lines: Sequence[str], most: int) -> list[str]:
    """Return lines without the indentation of the first that is not blank, and at most `most` characters of it."""
    first = next((line for line in lines if line.strip()), "")
    width = min(most, len(first) - len(first.lstrip()))
    return [line[min(width, len(line) - len(line.lstrip())) :] for line in lines]


def _check_positive(value: float) -> str | None:
    return None if 0 < value < float("inf") else "it must be above 0"


@REWARDS.register(
    "python_tests",
    never_null=("tests",),
    gold={"tests": read_tests},
    argument_limits=dict.fromkeys(("seconds", "memory_mb", "file_mb", "at_once", "reward_timeout"), _check_positive),
    own_process=True,
    check_arguments=check_seconds,
)
def python_tests(
    completions: Sequence[str],
    prompts: Sequence[str] | None = None,
    *,
    tests: Sequence[Any],
    share: bool = False,
    seconds: float = 5.0,
    memory_mb: int = 1024,
    file_mb: int = 10,
    at_once: int = 4,
    outside_thinking: bool = True,
    reward_timeout: float = 30.0,
) -> list[float | None]:
    """1.0 if the last block of Python code passes all tests of the column `tests`, else 0.0; None without tests.

    With `share` it is the share of tests passed. Each program has `seconds`, `memory_mb`, files of at most `file_mb`,
    and no processes of its own; `at_once` programs run at the same time. None for those that could not be started
    within `reward_timeout`.
    """
    texts = cut_all_thinking(completions, prompts) if outside_thinking else completions
    limits = {"seconds": seconds, "memory": memory_mb * MIB, "file_size": file_mb * MIB}
    deadline = compute_deadline(reward_timeout)

    def judge(text: str, value: Any) -> float | None:
        code, own_tests = find_code(text), read_tests(value)
        if own_tests is None:
            return None
        if code is None:
            return 0.0
        if time.monotonic() + seconds > deadline:
            return None
        passed = run_tests(code, own_tests, limits)
        return sum(passed) / len(own_tests) if share else float(sum(passed) == len(own_tests))

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(judge, texts, tests))


def run_tests(code: str, tests: Sequence[Any], limits: dict[str, float]) -> list[bool]:
    """Return which tests a program passes, without those that it did not reach in `limits["seconds"]`."""
    request = json.dumps({"code": code, "tests": list(tests), **limits}).encode()
    ours, theirs = os.pipe()
    try:
        with tempfile.TemporaryDirectory(prefix="python_tests_", ignore_cleanup_errors=True) as folder:
            process = subprocess.Popen(
                [sys.executable, "-I", "-X", "utf8", str(CHILD), str(theirs)],
                pass_fds=[theirs],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env=_make_environment(folder),
                start_new_session=True,
            )
            os.close(theirs)
            theirs = -1
            try:
                process.communicate(request, timeout=limits["seconds"])
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # it and its fork
                process.communicate()
        os.set_blocking(ours, False)
        with contextlib.suppress(BlockingIOError):
            return [byte == ord("1") for byte in os.read(ours, len(tests))]
        return []
    finally:
        for descriptor in (ours, theirs):
            if descriptor >= 0:
                os.close(descriptor)


def _make_environment(folder: str) -> dict[str, str]:
    """Return the variables that a program sees."""
    own = {name: os.environ[name] for name in PASSED_VARIABLES if name in os.environ}
    threads = dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
    )  # their stacks are memory
    return {**own, **threads, "HOME": folder, "TMPDIR": folder}
