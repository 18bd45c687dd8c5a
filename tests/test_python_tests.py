"""The reward `python_tests`: code that passes its tests counts, and code that breaks a limit costs only itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_core.config.files import load
from grpo_core.objective.rewards import REWARDS
from grpo_core.schema import ConfigError
from grpo_core.scoring.python_tests import CHILD, find_code, python_tests, read_tests, run_tests
from grpo_core.scoring.reward_worker import RewardWorker
from grpo_core.scoring.scoring import build_reward

GOOD = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]
LIMITS = {"seconds": 10.0, "memory": 2**30, "file_size": 2**20}


def block(code):
    return f"Here it is:\n```python\n{code}\n```\nDone."


def judge(code, tests=TESTS, **args):
    return python_tests([block(code)], tests=[tests], **{"seconds": 10.0, **args})[0]


@pytest.mark.parametrize("value, tests", [
    ("assert f()", ["assert f()"]), (TESTS, TESTS), (json.dumps(TESTS), TESTS),
    ([{"input": "1\n", "output": "2", "type": "stdin_stdout"}], [["1\n", "2"]]), ({"inputs": ["1"], "outputs": ["2"]}, [["1", "2"]]),
    ('{"inputs": ["1", "3"], "outputs": ["2", "4"]}', [["1", "2"], ["3", "4"]]),
    (None, None), ("", None), ([], None), (["assert f()", ""], None), ([{"input": "1"}], None), ({"inputs": [1], "outputs": [2]}, None),
    ({"inputs": ["a"], "outputs": ["a", "b"]}, None), ({"inputs": ["a", "b"], "outputs": ["a"]}, None), ({"inputs": [], "outputs": []}, None),
    ({"fn_name": "f", "inputs": ["1"], "outputs": ["2"]}, None), ("[broken", None), (3, None), ([["a"]], None),
    ("5", None), ("the answer is 5", None), ("x", None), (["5", "6"], None), ("def check(candidate):\n    assert candidate(1) == 2", None),
    ("import math\nclass T:\n    def test(self):\n        assert f()", None), ("x = 5", None), ("\0", None), ("(" * 9999, None),
    ("def check(f):\n    assert f(1) == 2\n\ncheck(add)", ["def check(f):\n    assert f(1) == 2\n\ncheck(add)"]), ("if f() != 1:\n    raise ValueError", ["if f() != 1:\n    raise ValueError"]),
    (["x = 5", "assert f('\\d') == x"], ["x = 5", "assert f('\\d') == x"]),
])  # fmt: skip
def test_the_column(value, tests):
    assert read_tests(value) == tests
    if tests is None:
        assert judge(GOOD, value) is None


@pytest.mark.parametrize("text, code", [
    (block("x = 1"), "x = 1\n"), ("```\nx = 1\n```", "x = 1\n"), ("```py\nx = 1\n```\nand\n```Python\nx = 2\n```", "x = 2\n"),
    ("```python\nx = 1\n```\n```python\ncut", "x = 1\n"), ("```bash\nls\n```", None), ("x = 1", None), ("", None), ("```python\ncut", None),
    ("```python\ncut\n```python\nx = 1\n```", "x = 1\n"), ("  ```python\n  x = 1\n  ```", "x = 1\n"), ("```python title=a\nx\n```", "x\n"),
    ("1. Code:\n   ```python\n   def f():\n\n       return 1\n   ```", "def f():\n\n    return 1\n"),
    ("- ```python\n  if a:\n    b\n  ```", "if a:\n  b\n"), ("10) ```\n    x\n    ```\n- ```bash\n  ls\n  ```", "x\n"),
    ("\t```py\n\tif a:\n\t\tb\n\t```", "if a:\n\tb\n"), ("   ```py\nif a:\n  b\n   ```", "if a:\n  b\n"),
    ("  ```py\n  s = '''\na\n   b'''\n  ```", "s = '''\na\n b'''\n"), ("```py\n  x\n```", "  x\n"), ("```py\ns = 1\n- ```\n```", "s = 1\n- ```\n"),
    (" ```py\n   x\n ```", "  x\n"), ("```\r\nx\r\n```\r", "x\r\n"), ("  ```py\n  ```", ""),
    ("a ```python b``` c\n```\nx\n```", "x\n"), ("```python\ns = '```'\n```", "s = '```'\n"), ("```json\n1\n```\n```\nx\n```\n```", "x\n"),
])  # fmt: skip
def test_the_code_of_a_completion(text, code):
    assert find_code(text) == code


@pytest.mark.parametrize("piece", ["```python\n", "```\n", "```", "` ", "```python\nx", " ", "\n", "1", "- ", "  ```py\n", "\t"])
def test_code_is_found_in_linear_time(piece):
    start = time.process_time()
    find_code(piece * (200_000 // len(piece)))
    find_code(piece * (200_000 // len(piece)) + "```")
    assert time.process_time() - start < 1


def test_what_counts():
    half = "def add(a, b):\n    return 0"
    assert judge(GOOD) == 1.0 and judge(half) == 0.0 and judge(half, share=True) == 0.5
    assert python_tests(["no code", f"<think>{block(GOOD)}</think> No.", block("def add(")], tests=[TESTS] * 3) == [0.0] * 3
    assert python_tests([f"<think>{block(GOOD)}</think> No."], tests=[TESTS], outside_thinking=False) == [1.0]
    dataclass = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef add(a, b):\n    return P(a + b).x"
    main = GOOD + "\nif __name__ == '__main__':\n    raise SystemExit(1)"
    assert python_tests([block(dataclass), block(main)], tests=[TESTS] * 2) == [1.0, 1.0]


def test_programs_with_stdin_and_stdout():
    tests = [["3\n", "6\n"], ["5", "10"]]
    main = "if __name__ == '__main__':\n    print(int(input()) * 2)\n    raise SystemExit"
    raw = "import os, sys\nsys.stdout.buffer.write(b'%d ' % (2 * int(open(0).read())))"
    wrong = "print(6)"
    fails = "print(int(input()) * 2)\nraise ValueError"
    answers = [run_tests(code, tests, LIMITS) for code in (main, raw, wrong, fails)]
    assert answers == [[True, True], [True, True], [True, False], [False, False]]


@pytest.mark.parametrize("code", [
    "input = open(0).readline\nprint(int(input()))",
    "import sys\nsys.stdin = open(0)\nprint(input())",
    "import sys\nsys.stdout = open(1, 'w')\nprint(input())",
    "import threading as t\nt.stack_size(512 << 20)\nx = t.Thread(target=lambda: print(input()))\nx.start()\nx.join()",
    "import threading, time\ndef main():\n    time.sleep(0.05)\n    print(input())\nthreading.Thread(target=main).start()",
    "from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(2)\npool.submit(lambda: print(input()))",
    "out = open(1, 'w')\nout.write(input())",
    "class A:\n    out = open(1, 'w')\n    def __init__(self): self.me = self\na = A()\na.out.write(input())",
    "import sys\nsys.__stdout__.write(input())",
    "import sys\nsys.stdout, n = open('/dev/null', 'w'), input()\nsys.__stdout__.write(n)",
    "import atexit\nn = int(input())\natexit.register(lambda: print(n))",
    "class A:\n    def __init__(self): self.n = input()\n    def __del__(self): print(self.n)\na = A()",
    "import sys\nprint(input())\nsys.stdout.close()",
    "import fileinput\nfor line in fileinput.input(): print(line)",
    "import os, sys\nprint(input())\nsys.stdout.flush()\nos._exit(0)",
    "import sys\nassert len(sys.argv) == 1\nprint(open('/dev/stdin').read())\nexit()",
    "import os\nos.write(1, os.read(0, 100))\nos.close(0)\nos.close(1)",
])  # fmt: skip
def test_a_program_reads_prints_and_ends_as_in_an_interpreter_of_its_own(code):
    assert run_tests(code, [["3\n", "3\n"], ["4\n", "4\n"], ["5\n", "0"]], LIMITS) == [True, True, False]


@pytest.mark.parametrize("code, passed", [
    ("print(3)\nraise SystemExit(1)", [False, False]),
    ("import os\nprint(3, flush=True)\nos._exit(1)", [False, False]),
    ("import os\nprint(3)\nos._exit(0)", [False, False]),  # what it printed was never written
    ("import os\nprint(3)\nos.close(1)", [False, False]),
    ("import os, signal\nprint(3, flush=True)\nif input() == '1': os.kill(os.getpid(), signal.SIGKILL)", [False, True]),
    ("print('1' * 2**21)", [False, False]),
    ("import sys\nsys.setrecursionlimit(10**9)\nx = bytearray(2**30)\nprint(3)", [False, False]),
    ("import os\nos.fork()\nprint(3)", [False, False]),
    ("import subprocess\nsubprocess.run(['true'])\nprint(3)", [False, False]),
    ("def f(", [False, False]),
])  # fmt: skip
def test_limits_of_programs_with_stdin(code, passed):
    assert run_tests(code, [["1", "3"], ["2", "3"]], LIMITS) == passed


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end", ["time.sleep(100)", "threading.Thread(target=time.sleep, args=[100]).start()"])
def test_the_seconds_are_those_of_all_tests_and_no_process_is_left(end):
    mark = f"left_{os.getpid()}_{len(end)}"
    code = f"import os, threading, time\nos.setsid()\nopen('/proc/self/comm', 'w').write('{mark[-15:]}')\nprint(3)\nif input() == '2':\n    {end}"
    start = time.monotonic()
    assert run_tests(code, [["1", "3"], ["2", "3"], ["1", "3"]], {**LIMITS, "seconds": 1.5}) == [True]
    assert 1.5 <= time.monotonic() - start < 3
    time.sleep(0.1)
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat")]
    assert not [stat for stat in stats if f"({mark[-15:]}) " in stat and f"({mark[-15:]}) Z" not in stat]  # Z: only init has to note it


@pytest.mark.parametrize("tests", [[["1", "3"]], ["assert True"]])
def test_it_ends_within_its_seconds_also_where_nobody_is_left_to_end_it(tests):
    request = json.dumps({"code": "import time\ntime.sleep(100)", "tests": tests, **LIMITS, "seconds": 0.2})
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-I", str(CHILD), "2"], input=request.encode(), stderr=subprocess.DEVNULL, timeout=10)
    assert done.returncode == -signal.SIGALRM and 1.2 <= time.monotonic() - start < 3


@pytest.mark.parametrize("code, passed", [
    ("import os\nos._exit(0)", []),
    ("import sys\nsys.exit(0)", []),
    ("raise KeyboardInterrupt", []),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", []),
    ("def add(a, b):\n    raise SystemExit(0)", [False, False]),
    ("x = bytearray(2 * 2**30)", []),
    ("def add(a, b):\n    return [0] * 2**29 and 3", [False, False]),
    ("with open('f', 'wb') as file:\n    file.write(bytes(2**21))", []),
    ("def add(a, b):\n    return add(b, a)", [False, False]),
    ("import os\nos.fork()", []),
    ("import subprocess\nsubprocess.run(['true'])", []),
    ("import os\nos.system('true') == 0 or 1 / 0", []),
    ("import multiprocessing\nmultiprocessing.Process(target=print).start()", []),
    ("import threading\nthread = threading.Thread(target=print)\nthread.start()\nthread.join()\n" + GOOD, [True, True]),
    ("import os\nassert not {'SECRET', 'HF_TOKEN'} & {*os.environ} and os.listdir('.') == []\n" + GOOD, [True, True]),
    ("import grpo_core_is_not_here", []),
    ("print('1' * 1000)\n" + GOOD, [True, True]),
])  # fmt: skip
def test_limits(code, passed, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert run_tests(code, TESTS, LIMITS) == passed


def test_a_program_without_end_costs_its_seconds_and_what_passed_before_counts():
    start = time.monotonic()
    tests = [TESTS[0], "while True: pass", TESTS[1]]
    assert run_tests(GOOD, tests, {**LIMITS, "seconds": 1.0}) == [True] and 1 <= time.monotonic() - start < 3
    asleep = "import time\ntime.sleep(100)"
    assert run_tests(asleep, TESTS, {**LIMITS, "seconds": 0.5}) == [] and time.monotonic() - start < 4


def test_it_leaves_no_file_and_no_descriptor(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    assert judge("open('left', 'w').write('x')\n" + GOOD) == 1.0
    assert os.listdir(tmp_path) == []
    assert sys.platform != "linux" or len(os.listdir("/proc/self/fd")) == before


def test_several_run_at_once_and_those_beyond_the_time_of_the_batch_are_not_judged():
    start = time.monotonic()
    asleep = block("import time\ntime.sleep(100)")
    values = python_tests([asleep] * 6, tests=[TESTS] * 6, seconds=0.8, at_once=2, reward_timeout=2.5)
    assert values == [0.0] * 4 + [None] * 2 and time.monotonic() - start < 2.5


@pytest.mark.slow
def test_it_runs_in_a_process_of_its_own_within_its_time():
    reward = build_reward("python_tests", {"share": True}, timeout=20)
    assert isinstance(reward, RewardWorker) and reward.args == {"share": True, "reward_timeout": 20}
    reward.submit([block(GOOD), "none", "x"], {"tests": [TESTS, TESTS, None], "prompts": ["p"] * 3})
    assert reward.result().values == [1.0, 0.0, None]
    reward.close()
    with pytest.raises(ConfigError, match=r"at_once is 0; it must be above 0"):
        REWARDS.build("python_tests", {"at_once": 0})


@pytest.mark.parametrize("words, sentence", [
    (["rewards=[{name: python_tests, args: {seconds: 24}}]"], "rewards[0].args.seconds is 24; it must be below 24, 0.8 of reward_timeout"),
    (["rewards=[python_tests]", "trainer.reward_timeout=5"], "rewards[0].args.seconds is 5; it must be below 4, 0.8 of reward_timeout"),
    (["rewards=[{name: python_tests, args: {reward_timeout: 31}}]"],
     "rewards[0].args.reward_timeout is 31; it must be at most trainer.reward_timeout (30)"),
    (["evaluation.reward=python_tests", "trainer.reward_timeout=5"],
     "evaluation.reward is 'python_tests', whose argument seconds is 5; it must be below 4, 0.8 of reward_timeout"),
])  # fmt: skip
def test_its_seconds_must_fit_into_the_time_of_a_batch(words, sentence):
    with pytest.raises(ConfigError) as error:
        load("tiny", words)
    assert str(error.value) == sentence
    load("tiny", ["rewards=[{name: python_tests, args: {seconds: 24, reward_timeout: 31}}]", "trainer.reward_timeout=60"])


def test_the_rows_of_the_documents_judge_programs():
    text = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()
    rows = [json.loads(line) for line in text.split("### python_tests")[1].split("```json\n")[1].split("```")[0].splitlines()]
    right = ["def middle(values):\n    return sorted(values)[len(values) // 2]", "def vowels(text):\n    return sum(letter in 'aeiou' for letter in text)", "print(sum(map(int, input().split())))"]
    wrong = ["def middle(values):\n    return values[0]", "def vowels(text):\n    return 2", "print(3)"]
    for programs, value in ((right, 1.0), (wrong, 0.0)):
        assert python_tests([block(code) for code in programs], tests=[row["tests"] for row in rows], seconds=10.0) == [value] * 3
