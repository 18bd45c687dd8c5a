"""Run a program against its tests, under limits. `python_tests` starts this file as a script, in a process of its own.

It reads {code, tests, memory, file_size, seconds} as JSON from stdin and writes one byte per test to the file
descriptor that its argument names: 1 passed, 0 failed. A test without a byte was not reached. Tests that are Python
texts run in this process. For each pair of stdin and stdout it forks, and the program runs and ends in the fork as in
an interpreter of its own. It imports nothing of this package.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import platform
import re
import resource
import signal
import struct
import sys
import tempfile
import threading
import types

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
LOAD, JUMP_IF_EQUAL, JUMP_IF_ANY, RETURN = 0x20, 0x15, 0x45, 0x06  # of classic BPF, on words
ALLOW, ERRNO, EAGAIN, ENOSYS = 0x7FFF0000, 0x00050000, 11, 38
CLONE_THREAD = 0x10000
CLONE3 = 435  # on every architecture
SYSTEM_CALLS = {  # machine: (its number in an audit record, clone, others that start a process)
    "x86_64": (0xC000003E, 56, (57, 58)),  # fork, vfork
    "aarch64": (0xC00000B7, 220, ()),
}
SLOW_TO_IMPORT = ("numpy", "pandas", "sympy")  # imported once, before the forks of a program that names them

BUFFERED_FILES = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)


def limit(memory: int, file_size: int, seconds: float) -> None:
    """Limit the bytes of memory and of a written file, and the CPU seconds; forbid processes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
    if sys.platform != "darwin":  # which does not support it
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    if not forbid_processes():
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # has no effect on root


def forbid_processes() -> bool:
    """Make every start of a process fail with EAGAIN, but not of a thread; return whether this system can."""
    if sys.platform != "linux" or platform.machine() not in SYSTEM_CALLS:
        return False
    audit, clone, others = SYSTEM_CALLS[platform.machine()]
    deny, allow = struct.pack("HBBI", RETURN, 0, 0, ERRNO | EAGAIN), struct.pack("HBBI", RETURN, 0, 0, ALLOW)
    program = [
        *(struct.pack("HBBI", LOAD, 0, 0, 4), struct.pack("HBBI", JUMP_IF_EQUAL, 1, 0, audit), deny),
        struct.pack("HBBI", LOAD, 0, 0, 0),  # the number of the call
        *(struct.pack("HBBI", JUMP_IF_EQUAL, 0, 1, CLONE3), struct.pack("HBBI", RETURN, 0, 0, ERRNO | ENOSYS)),
    ]  # its flags cannot be read, and libraries use clone instead
    for number in others:
        program += [struct.pack("HBBI", JUMP_IF_EQUAL, 0, 1, number), deny]
    program += [struct.pack("HBBI", JUMP_IF_EQUAL, 1, 0, clone), allow]
    program += [struct.pack("HBBI", LOAD, 0, 0, 16), struct.pack("HBBI", JUMP_IF_ANY, 0, 1, CLONE_THREAD), allow, deny]
    instructions = ctypes.create_string_buffer(b"".join(program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(instructions))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    return libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(header)) == 0


def run(text: str, module: types.ModuleType) -> bool:
    """Run a text in a module; return whether it does not raise."""
    try:
        exec(compile(text, module.__name__, "exec"), module.__dict__)
    except BaseException:  # the code is not ours
        return False
    return True


def make_module(name: str) -> types.ModuleType:
    """Return a new module that dataclasses and pickle find by its name."""
    sys.modules[name] = types.ModuleType(name)
    return sys.modules[name]


def run_program(text: str) -> None:
    """Run a text as `__main__`, and end this process as an interpreter does; its exit code is 0 if all went well.

    Only what the program has left is taken apart: an interpreter's own end takes ten times as long as the fork.
    """
    main = make_module("__main__")
    try:
        exec(compile(text, "program.py", "exec"), main.__dict__)
    except SystemExit as error:
        failed = error.code not in (None, 0)
    except BaseException:  # the code is not ours
        failed = True
    else:
        failed = False
    if failed:
        os._exit(1)
    threading._shutdown()  # joins threads, after those of pools were told to end
    atexit._run_exitfuncs()
    flushed = flush(sys.stdout)
    for file in gc.get_objects():
        if type(file) in BUFFERED_FILES:
            flush(file)
    for name in [name for name in main.__dict__ if name != "__builtins__"]:
        main.__dict__[name] = None  # calls the __del__ of what the names held
    gc.collect()
    flush(sys.__stdout__)
    os._exit(0 if flushed and flush(sys.stdout) else 1)


def flush(file: object) -> bool:
    """Flush a file that is open; return False if that fails, as where too much was printed."""
    try:
        if file is not None and not getattr(file, "closed", False):
            file.flush()
    except BaseException:  # the file may be the program's
        return False
    return True


def end_with(parent: int) -> None:
    """End this process when its parent ends, or now if the parent has ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def run_in_forks(request: dict, report: int) -> None:
    """Run the code as a program in a fork of this process for each pair of stdin and stdout."""
    for name in SLOW_TO_IMPORT:
        with contextlib.suppress(Exception):
            if re.search(rf"\b(import|from)\b[^\n]*\b{name}\b", request["code"]):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the forks need not look at what is here
    for given, expected in request["tests"]:
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout:
            stdin.write(given.encode())
            stdin.seek(0)
            parent, child = os.getpid(), os.fork()
            if child == 0:
                end_with(parent)
                os.close(report)
                os.dup2(stdin.fileno(), 0)
                os.dup2(stdout.fileno(), 1)
                limit(request["memory"], request["file_size"], request["seconds"])
                run_program(request["code"])
            status = os.waitpid(child, 0)[1]
            stdout.seek(0)
            printed = stdout.read().decode(errors="replace")
            os.write(report, b"1" if status == 0 and tidy(printed) == tidy(expected) else b"0")


def tidy(text: str) -> list[str]:
    """Return the lines of a text without spaces at their ends and without empty lines at the end of the text."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def run_texts(request: dict, report: int) -> None:
    """Run the code and then each test, a Python text, in one module."""
    limit(request["memory"], request["file_size"], request["seconds"])
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    module = make_module("solution")
    if run(request["code"], module):
        for test in request["tests"]:
            os.write(report, b"1" if run(test, module) else b"0")


def main() -> None:
    """Run the tests that stdin names and report each."""
    report = int(sys.argv.pop())
    with open(0, "rb", closefd=False) as stdin:  # sys.stdin and its buffer are the program's
        request = json.load(stdin)
    sys.argv[0] = "program.py"
    sys.stdin.reconfigure(newline=None)  # lines may end with \r\n
    signal.setitimer(signal.ITIMER_REAL, request["seconds"] + 1)  # ends it where nobody is left to
    run_tests = run_texts if isinstance(request["tests"][0], str) else run_in_forks
    run_tests(request, report)
    os._exit(0)  # without waiting for the threads of the code


if __name__ == "__main__":
    main()
