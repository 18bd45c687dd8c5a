"""A reward in a process of its own: whatever it does, the batch has an answer in time and the next one too."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_core.batch import Task
from grpo_core.schema import ConfigError
from grpo_core.scoring.reward_worker import RewardWorker, serve
from grpo_core.scoring.scoring import Reward, build_reward, score

MINE = '''
import os, subprocess, sys, threading, time

def count(completions, answer, *, factor: float = 1.0):
    return [factor * len(text) for text in completions]

def when(completions, prompts):
    """Does what the first completion says, and is well behaved otherwise."""
    what = completions[0]
    if what == "raise":
        raise ValueError("no such thing")
    if what == "hang":
        time.sleep(1000)
    if what == "exit":
        sys.exit(0)
    if what == "leave":
        os._exit(7)
    if what == "crash":
        os.kill(os.getpid(), 11)
    if what == "print":
        print("{" * 100_000)
    if what == "fork":
        os.fork()
    if what == "orphan":  # a copy of it lives on and holds the connection
        if os.fork() == 0:
            time.sleep(5)
        os._exit(3)
    if what == "later":
        threading.Timer(0.05, os._exit, [9]).start()
    if what == "child":
        child = subprocess.Popen(["sleep", "1000"])
        open(completions[1], "w").write(str(child.pid))
        time.sleep(1000)
    return [1.0] * len(completions)

def pid(completions):
    return [float(os.getpid() % 1000)] * len(completions)
'''


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    file = tmp_path_factory.mktemp("mine") / "mine.py"
    file.write_text(MINE)
    return str(file)


@pytest.fixture(scope="module")
def worker(mine):
    worker = RewardWorker(f"{mine}:when", {}, timeout=1.5)
    yield worker
    worker.close()


def call(worker, completions, **columns):
    worker.submit(completions, {"prompts": ["p"] * len(completions), **columns})
    return worker.result()


def test_it_answers_with_columns_and_arguments(mine):
    worker = build_reward(f"{mine}:count", {"factor": 2.0}, timeout=30)
    assert isinstance(worker, RewardWorker)
    outcome = call(worker, ["a", "bbb"], answer=["x", None])
    assert outcome.values == [2.0, 6.0] and outcome.failed == [False, False] and outcome.why is None
    worker.close()


@pytest.mark.parametrize("what, why", [
    ("raise", "raised ValueError: no such thing (mine.py, line 11)"),
    ("hang", "took more than 1.5 s"),
    ("exit", "raised SystemExit: 0 (mine.py, line 15)"),
    ("leave", "ended with exit code 7"),
    ("crash", "was ended by SIGSEGV"),
    ("print", None),
    ("fork", None),
    ("orphan", "ended with exit code 3"),
])  # fmt: skip
def test_whatever_it_does_there_is_an_answer_and_the_next_batch_is_served(worker, what, why):
    start = time.monotonic()
    outcome = call(worker, [what, "b"])
    assert time.monotonic() - start < (1 if what == "orphan" else 3)
    if why is None:
        assert outcome.values == [1.0, 1.0] and outcome.failed == [False, False]
    else:
        assert (outcome.values, outcome.failed, outcome.why) == ([None, None], [True, True], why)
    for _ in range(2):
        assert call(worker, ["fine", "b"]).values == [1.0, 1.0]


def test_one_that_ends_between_batches_is_replaced(worker):
    assert call(worker, ["later"]).values == [1.0]
    time.sleep(0.3)
    assert call(worker, ["fine"]).values == [1.0]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # it may end between opening and reading
        return False


def test_what_it_started_ends_with_it(worker, tmp_path):
    note = tmp_path / "pid"
    assert call(worker, ["child", str(note)]).failed == [True, True]
    time.sleep(0.2)
    assert not alive(int(note.read_text()))


def test_several_run_at_the_same_time_and_one_that_hangs_harms_no_other(mine):
    slow = [Reward(name, 1.0, build_reward(f"{mine}:{name}", timeout=2)) for name in ("when", "count", "pid")]
    also = Reward("also", 1.0, build_reward(f"{mine}:when", timeout=2))
    tasks = [Task(0, "p", [1], {"answer": "a"})]
    start = time.monotonic()
    scores = score([*slow, also], tasks, ["hang", "b"], 2)
    assert time.monotonic() - start < 3.5
    assert scores.failed["when"].all() and scores.failed["also"].all() and not scores.failed["count"].any()
    assert scores.by_name["count"].tolist() == [[4, 1]] and scores.rewards.isfinite().all()
    assert sorted(scores.failures) == ["reward also took more than 2 s", "reward when took more than 2 s"]
    for reward in (*slow, also):
        reward.function.close()


def test_a_registered_reward_stays_in_this_process():
    assert not isinstance(build_reward("correct_answer", {"strict": True}, timeout=1), RewardWorker)


def test_a_file_that_cannot_be_loaded_there_is_one_sentence(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        f"import os\nassert os.getpid() == {os.getpid()}, 'elsewhere'\ndef f(completions):\n    return [0.0]\n"
    )
    with pytest.raises(ConfigError, match=r"reward .*mine.py:f reward .* cannot be loaded: AssertionError: elsewhere"):
        build_reward(f"{file}:f", timeout=5)


def test_its_process_ends_with_this_one_and_prints_elsewhere(mine):
    code = "import os, sys, time; from grpo_core.scoring.reward_worker import RewardWorker; worker = RewardWorker(sys.argv[1], {}, 5)"
    code += "; worker.submit(['print'], {'prompts': ['p']}); worker.result(); worker.submit(['hang'], {'prompts': ['p']}); time.sleep(0.3)"
    code += "; print(worker._process.pid, flush=True); os.kill(os.getpid(), 9)"
    out = subprocess.run(
        [sys.executable, "-c", code, f"{mine}:when"], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    deadline = time.monotonic() + 5
    while alive(int(out.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


LOADS = """
import os, time
from pathlib import Path

loaded = Path(__file__).with_suffix(".loaded")
if loaded.exists():
    time.sleep(1.2)  # the first start is fast, so that the test is
loaded.touch()
if Path(__file__).with_suffix(".broken").exists():
    raise OSError("the disk is gone")

def slow_once(completions):
    if completions[0] == "hang":
        time.sleep(1000)
    if completions[0] == "exit":
        os._exit(3)
    return [2.0] * len(completions)
"""


@pytest.fixture
def loads(tmp_path):
    file = tmp_path / "loads.py"
    file.write_text(LOADS)
    worker = RewardWorker(f"{file}:slow_once", {}, timeout=0.6)
    yield worker
    worker.close()


@pytest.mark.parametrize("what", ["hang", "exit"])
def test_fault_21_loading_again_has_its_own_allowance(loads, what):
    """FAULTS #21: each restart was ended while it loaded, so a reward that was slow once never came back."""
    assert call(loads, [what]).failed == [True]
    assert call(loads, ["fine"]).values == [2.0]
    assert call(loads, ["hang"]).why == "took more than 0.6 s"  # the limit of a batch is still that of the batch


def test_fault_21_rewards_that_load_again_do_so_side_by_side(loads):
    """FAULTS #21: one that loads takes no time from the batch of another."""
    others = [Reward("again", 1.0, loads), Reward("other", 1.0, RewardWorker(loads.name, {}, timeout=0.6))]
    call(loads, ["exit"])
    start = time.monotonic()
    scores = score(others, [Task(0, "p", [1], {})], ["fine"], 1)
    assert not scores.failures and scores.rewards.tolist() == [[4.0]] and time.monotonic() - start < 3
    others[1].function.close()


def test_fault_21_a_file_that_breaks_later_fails_each_batch_with_its_own_reason(loads):
    """FAULTS #21: waiting for a start that has failed neither repeats it at once nor hides why it failed."""
    Path(loads.name.partition(":")[0]).with_suffix(".broken").touch()
    assert call(loads, ["exit"]).failed == [True]
    scores = score([Reward("mine", 1.0, loads)], [Task(0, "p", [1], {})], ["fine"], 1)
    assert "cannot be loaded: OSError: the disk is gone" in scores.failures[0]


LEAVES = """
import os, signal, subprocess, threading

def leaves(completions):
    how, note, session = completions
    child = subprocess.Popen(["sleep", "1000"], start_new_session=session == "own")
    open(note, "w").write(str(child.pid))
    ends = {"exits": lambda: os._exit(5), "crashes": lambda: os.kill(os.getpid(), signal.SIGKILL), "stays": int}
    threading.Timer(0.1, ends[how]).start()
    return [0.0] * 3
"""


def wait_until_gone(pid, seconds=3):
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


@pytest.mark.parametrize("session", ["same", "own"])
@pytest.mark.parametrize("how", ["exits", "crashes", "stays"])
def test_fault_22_what_a_reward_started_ends_with_its_process(tmp_path, how, session):
    """FAULTS #22: the children of a process that ended between two batches stayed, as did those of a session of their own."""
    file, note = tmp_path / "leaves.py", tmp_path / "pid"
    file.write_text(LEAVES)
    worker = RewardWorker(f"{file}:leaves", {}, timeout=30)
    assert call(worker, [how, str(note), session]).values == [0.0] * 3
    child = int(note.read_text())
    if how == "stays":
        assert alive(child)
        worker.close()
        assert not alive(child)  # before close returns
    else:
        assert wait_until_gone(child)  # without another batch
        assert call(worker, ["stays", str(note), session]).failed == [False] * 3
        worker.close()
        assert not alive(int(note.read_text()))


def test_fault_22_what_a_reward_started_ends_with_a_rank_that_is_killed(tmp_path):
    """FAULTS #22: only the reward's own process ended with its rank."""
    file, note = tmp_path / "leaves.py", tmp_path / "pid"
    file.write_text(LEAVES)
    code = "import os, sys; from grpo_core.scoring.reward_worker import RewardWorker; worker = RewardWorker(sys.argv[1], {}, 30)"
    code += "; worker.submit(['stays', sys.argv[2], 'own'], {}); worker.result(); os.kill(os.getpid(), 9)"
    command = [sys.executable, "-c", code, f"{file}:leaves", str(note)]
    subprocess.run(command, cwd=Path(__file__).parents[1])
    assert wait_until_gone(int(note.read_text()))


def test_n6_a_worker_whose_rank_is_gone_ends_in_silence(mine, capfd):
    """FAULTS N6: the next process, still loading when the run ended, printed a ConnectionResetError."""
    for unread in (False, True):
        ours, theirs = socket.socketpair()
        if unread:  # what was sent and not read makes the other end's read a reset, not an end
            theirs.sendall(b"x")
        thread = threading.Thread(target=serve, args=(theirs, f"{mine}:count", {}))
        thread.start()
        time.sleep(0.1)
        ours.close()
        thread.join(timeout=5)
        assert not thread.is_alive()
        theirs.close()
    closed, theirs = socket.socketpair()
    closed.close()
    serve(theirs, f"{mine}:count", {})  # before it is ready
    theirs.close()
    assert capfd.readouterr().err == ""


def test_fault_22_a_closed_connection_says_that_the_process_has_ended_before_its_supervisor_does():
    worker = RewardWorker.__new__(RewardWorker)
    worker._socket, other = socket.socketpair()
    worker._process = SimpleNamespace(poll=lambda: None)
    assert not worker._has_ended()
    other.close()
    assert worker._has_ended()
    worker._socket.close()


INTERRUPTS = """
import os, signal, subprocess, time

def send(completions):
    what = completions[0]
    if what == "parent":  # the supervisor
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(0.2)
    if what == "group":
        os.killpg(0, signal.SIGINT)
        time.sleep(1)
    if what == "self":
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            return [7.0]
    if what == "raise":
        raise KeyboardInterrupt
    if what == "later":
        subprocess.Popen(["sh", "-c", f"sleep 0.1; kill -INT {os.getpid()} {os.getppid()}"])
    if what == "child":  # a program that it starts can be interrupted
        child = subprocess.Popen(["sleep", "5"])
        child.send_signal(signal.SIGINT)
        return [float(child.wait())]
    return [1.0]
"""


@pytest.mark.parametrize("what, value, why", [
    ("parent", 1.0, None),
    ("group", None, "was interrupted: KeyboardInterrupt (mine.py, line 1"),
    ("self", 7.0, None),
    ("raise", None, "was interrupted: KeyboardInterrupt (mine.py, line 18"),
    ("later", 1.0, None),
    ("child", -2.0, None),
])  # fmt: skip
def test_attack_4_a_reward_that_sends_sigint_prints_no_traceback(tmp_path, capfd, what, value, why):
    (tmp_path / "mine.py").write_text(INTERRUPTS)
    worker = RewardWorker(f"{tmp_path / 'mine.py'}:send", {}, timeout=20)
    try:
        process = worker._process
        outcome = call(worker, [what])
        assert outcome.values == [value] and (outcome.why or "").startswith(why or "") and (why is None) == (outcome.why is None)
        time.sleep(0.4 if what == "later" else 0)
        assert call(worker, ["well"]).values == [1.0]
        assert worker._process is process and process.poll() is None  # nothing ended it
    finally:
        worker.close()
    assert "Traceback" not in capfd.readouterr().err


def test_attack_4_an_interrupt_while_the_file_is_imported_is_a_sentence(tmp_path, capfd):
    (tmp_path / "mine.py").write_text("raise KeyboardInterrupt\n\ndef send(completions):\n    return [1.0]\n")
    with pytest.raises(ConfigError, match="was interrupted: KeyboardInterrupt"):
        RewardWorker(f"{tmp_path / 'mine.py'}:send", {}, timeout=20)
    assert "Traceback" not in capfd.readouterr().err


def test_attack_4_a_rewards_own_handler_of_sigint_stays(tmp_path):
    text = "import os, signal\ncount = 0\ndef see(*arguments):\n    global count\n    count += 1\n\nsignal.signal(signal.SIGINT, see)\n"
    text += "\ndef send(completions):\n    os.kill(os.getpid(), signal.SIGINT)\n    return [float(count)]\n"
    (tmp_path / "mine.py").write_text(text)
    worker = RewardWorker(f"{tmp_path / 'mine.py'}:send", {}, timeout=20)
    try:
        assert [call(worker, ["a"]).values for _ in range(2)] == [[1.0], [2.0]]
    finally:
        worker.close()
