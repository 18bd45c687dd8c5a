"""Start Python programs as forks of a process that has imported everything, which saves each of them the imports.

`interpreter()` starts that process, the server, and returns the path of an executable that stands for `python`. It passes its
arguments, environment, folder and standard streams to the server, which forks a child. The child sets all of that, runs the
program and exits as a new process would. The executable passes signals on and ends as the child does; when it is killed,
the server kills the child. The server has one thread, and neither a process group of torch.distributed nor CUDA.

    python [-u] -m MODULE ... | -c CODE ... | FILE.py ... | - ...
"""

import array
import atexit
import contextlib
import gc
import io
import json
import os
import pkgutil
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
ADDRESS = "TEST_FORKSERVER"  # in the environment: the path of the server's socket
STREAMS = 3  # stdin, stdout and stderr
CLIENT = """\
#!{python} -ISu
import array, json, os, signal, socket, sys
words = sys.argv[1:]
if words[:1] == ["-u"]: words = words[1:]
address = os.environ.get("{address}")
if not words or address is None or (words[0][:1] == "-" and words[0] not in ("-m", "-c", "-")):
    os.execv("{python}", ["{python}", *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect(address)
request = json.dumps([words, dict(os.environ), os.getcwd()]).encode()
streams = array.array("i", [0, 1, 2])
signal.pthread_sigmask(signal.SIG_BLOCK, signals := (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
server.sendmsg([b"%16d" % len(request)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
server.sendall(request)
answer = server.makefile("rb")
child = int(answer.readline())
for number in signals:
    signal.signal(number, lambda number, frame: os.kill(child, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
code = int(answer.readline() or 1)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


# --- in the tests ----------------------------------------------------------------------------------------------------


def interpreter() -> str:
    """The path of what stands for `python`; the real one where CUDA, or macOS, does not allow forks."""
    if sys.platform != "linux" or has_cuda():
        return sys.executable
    if ADDRESS not in os.environ:
        start()
    return str(Path(os.environ[ADDRESS]).parent / "bin" / "python")


def has_cuda() -> bool:
    if not Path("/dev/nvidiactl").exists():  # saves a process that only starts others the import of torch
        return False
    import torch

    return torch.cuda.is_available()


def start() -> None:
    """Start the server, which ends with this process. Clients may call at once and wait for its imports."""
    folder = Path(tempfile.mkdtemp(prefix="forkserver-"))
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(CLIENT.format(python=sys.executable, address=ADDRESS))
    (folder / "bin" / "python").chmod(0o755)
    (folder / "bin" / "python3").symlink_to("python")
    os.environ[ADDRESS] = str(folder / "socket")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.environ[ADDRESS])
    listener.listen(64)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [sys.executable, __file__, str(listener.fileno())],
        env=environment, pass_fds=[listener.fileno()], stdin=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    listener.close()
    atexit.register(stop, server, folder)


def stop(server: subprocess.Popen, folder: Path) -> None:
    server.stdin.close()
    server.wait()
    for path in (folder / "bin" / "python", folder / "bin" / "python3", folder / "socket"):
        path.unlink()
    (folder / "bin").rmdir()
    folder.rmdir()


# --- the server ------------------------------------------------------------------------------------------------------


def load_everything() -> None:
    """Import everything, and load a model, at which libraries import what they have put off and fill their tables."""
    import importlib

    import torch

    import grpo_core

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(grpo_core.__path__, "grpo_core."):
        if not module.name.endswith(("__main__", "_kernel", "kernels")):
            importlib.import_module(module.name)
    from grpo_core.config.sections import LoraConfig, ModelConfig
    from grpo_core.model.loading import load_tokenizer
    from grpo_core.model.policy import load_policy

    with torch.random.fork_rng(), warnings.catch_warnings(record=True), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("always")  # what is shown once is shown in the children still
        load_policy(ModelConfig(), LoraConfig(), dtype=torch.float32, temperature=1.0)
        load_tokenizer(ModelConfig.path)
    from grpo_core.training import setup

    # A run ends with gc.unfreeze(), after which a collection before the next run would go through all that is loaded here.
    setup.gc = SimpleNamespace(collect=lambda: gc.collect(1), freeze=gc.freeze)
    gc.collect()
    gc.freeze()  # the children's garbage collectors leave these memory pages alone


def serve(listener: socket.socket) -> None:
    """Fork a child for every request until stdin ends, and then kill those that are left."""
    children = {}  # process id -> the client's connection
    with selectors.DefaultSelector() as events:
        events.register(sys.stdin.buffer, selectors.EVENT_READ, ("end", 0))
        events.register(listener, selectors.EVENT_READ, ("request", 0))
        while True:
            for key, _ in events.select():
                what, pid = key.data
                if what == "request":
                    connection, _ = listener.accept()
                    if (pid := fork(connection, [listener, *children.values()], events)) is None:
                        connection.close()  # its client has died
                        continue
                    children[pid] = connection
                    events.register(connection, selectors.EVENT_READ, ("client died", pid))
                    events.register(os.pidfd_open(pid), selectors.EVENT_READ, ("child ended", pid))
                elif what == "child ended":
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    connection = children.pop(pid)
                    with contextlib.suppress(KeyError):
                        events.unregister(connection)
                    with contextlib.suppress(OSError):
                        connection.sendall(b"%d\n" % code)
                    connection.close()
                    events.unregister(key.fileobj)
                    os.close(key.fileobj)
                elif what == "client died":
                    events.unregister(key.fileobj)
                    os.kill(pid, signal.SIGKILL)
                else:
                    for pid in children:
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                    return


def fork(connection: socket.socket, others: list[socket.socket], events: selectors.BaseSelector) -> int | None:
    """Read a request and start the child; returns its process id, or None if there is no request."""
    try:
        size, ancillary, *_ = connection.recvmsg(16, socket.CMSG_SPACE(STREAMS * array.array("i").itemsize))
        request = json.loads(connection.makefile("rb").read(int(size)))
        streams = array.array("i", ancillary[0][2]).tolist()
    except (OSError, ValueError, IndexError):
        return None
    pid = os.fork()
    if pid == 0:
        for place, stream in enumerate(streams):
            os.dup2(stream, place)
        for stream in streams:
            os.close(stream)
        events.close()
        for one in (connection, *others):
            one.close()
        run(*request)
    for stream in streams:
        os.close(stream)
    connection.sendall(b"%d\n" % pid)
    return pid


def run(words: list[str], environment: dict[str, str], folder: str) -> None:
    """Be the process `python WORDS`; never returns."""
    import ctypes

    import torch

    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the server
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        torch.set_num_threads(1)  # makes a new thread pool, before several threads do so at once
        sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())
        execute(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def execute(words: list[str]) -> None:
    import runpy

    own = {str(ROOT), str(ROOT / "tests")}
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*paths, *(path for path in sys.path if path not in own and path not in paths)]
    what, rest = words[0], words[1:]
    if what == "-m":
        sys.argv, sys.path[:0] = rest, [os.getcwd()]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what in ("-c", "-"):
        sys.argv, sys.path[:0] = [what, *(rest[1:] if what == "-c" else rest)], [""]
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0] if what == "-c" else sys.stdin.read(), "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path[:0] = words, [str(Path(what).resolve().parent)]
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    load_everything()
    with socket.socket(fileno=int(sys.argv[1])) as ours:
        serve(ours)
