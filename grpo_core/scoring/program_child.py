"""Run a program against its tests, under limits. `python_tests` starts this file as a script, in a process of its own.

It reads {code, tests, memory, file_size, seconds} as JSON from stdin and writes one byte per test to the file
descriptor that its argument names: 1 passed, 0 failed. A test without a byte was not reached. It imports nothing of
this package.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import tempfile
import types

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
LOAD, JUMP_IF_EQUAL, JUMP_IF_ANY, RETURN = 0x20, 0x15, 0x45, 0x06  # of classic BPF, on words
ALLOW, ERRNO, EAGAIN, ENOSYS = 0x7FFF0000, 0x00050000, 11, 38
CLONE_THREAD = 0x10000
CLONE3 = 435  # on every architecture
SYSTEM_CALLS = {  # machine: (its number in an audit record, clone, others that start a process)
    "x86_64": (0xC000003E, 56, (57, 58)),  # fork, vfork
    "aarch64": (0xC00000B7, 220, ()),
}


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
    """Run a text in a module; return whether it neither raises nor exits with an error."""
    try:
        exec(compile(text, module.__name__, "exec"), module.__dict__)
    except SystemExit as error:
        return module.__name__ == "__main__" and error.code in (None, 0)
    except BaseException:  # the code is not ours
        return False
    return True


def make_module(name: str) -> types.ModuleType:
    """Return a new module that dataclasses and pickle find by its name."""
    sys.modules[name] = types.ModuleType(name)
    return sys.modules[name]


def answer(code: str, given: str, null: int) -> str | None:
    """Return what a program prints for `given` on stdin; None if it fails. `null` is the null device's descriptor."""
    os.dup2(null, 0)  # the program before may have closed them
    os.dup2(null, 1)
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout:
        stdin.write(given.encode())
        stdin.seek(0)
        os.dup2(stdin.fileno(), 0)
        os.dup2(stdout.fileno(), 1)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        succeeds = run(code, make_module("__main__"))
        try:
            sys.stdout.flush()
        except (OSError, ValueError):  # too much was printed, or the program has closed it
            succeeds = False
        stdout.seek(0)
        return stdout.read().decode(errors="replace") if succeeds else None


def tidy(text: str) -> list[str]:
    """Return the lines of a text without spaces at their ends and without empty lines at the end of the text."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def main() -> None:
    """Run the tests that stdin names and report each."""
    request, report = json.load(sys.stdin.buffer), int(sys.argv[1])
    tests = request["tests"]
    limit(request["memory"], request["file_size"], request["seconds"])
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    if isinstance(tests[0], str):
        module = make_module("solution")
        if run(request["code"], module):
            for test in tests:
                os.write(report, b"1" if run(test, module) else b"0")
    else:
        for given, expected in tests:
            printed = answer(request["code"], given, null)
            os.write(report, b"1" if printed is not None and tidy(printed) == tidy(expected) else b"0")
    os._exit(0)  # without waiting for its threads


if __name__ == "__main__":
    main()
