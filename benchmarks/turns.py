"""Time completions of several turns against one turn of the same drawn tokens, on a GPU.

    python benchmarks/turns.py    on a GPU; stores rows in benchmarks/results/turns.json
    python benchmarks/turns.py --check         tiny shapes on a CPU; records nothing

Qwen2.5-1.5B's shape with random weights in bf16 and a LoRA of rank 16: 256 completions in groups of 8, prompts of 128 tokens, four
turns of 128 drawn tokens, and after each but the last an answer of 32 tokens. Measured in one process, each the median of three:

- `turns`: the answers come at once. Its reach is 1.2 of one turn of 512 tokens and one prefill of all answers, each measured alone.
- `waits`: every answer takes between 0 and 2 seconds, drawn for its row and turn. Its reach is 1.3 of the largest sum of one row's
  waits and the time of `turns`.
- `rounds`: what a trainer does that calls a sampler for each turn: the prompt and all earlier turns are prefilled again.
"""

import argparse
import datetime
import heapq
import json
import random
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import sampling

from grpo_core.batch import Task
from grpo_core.sampling.sampler import Sampler
from grpo_core.sampling.turns import Answer

OUT = ROOT / "benchmarks" / "results" / "turns.json"
SIZES = {"rows": 256, "group": 8, "prompt": 128, "turns": 4, "drawn": 128, "given": 32, "longest_wait": 2.0}
CHECK = {"rows": 16, "group": 8, "prompt": 16, "turns": 3, "drawn": 8, "given": 4, "longest_wait": 0.1}
TIMES = 3


class TimedAnswers:
    """Answers of fixed length, each a drawn time after its turn was reported; `longest_wait` 0 is at once."""

    def __init__(self, sizes, longest_wait):
        self.sizes, self.longest_wait, self.first_limit = sizes, longest_wait, sizes["drawn"]
        self.turns = [0] * sizes["rows"]
        self.waits = [0.0] * sizes["rows"]  # seconds, summed
        self.coming = []  # heap of (time, row)

    def report(self, turns):
        now = time.perf_counter()
        for turn in turns:
            self.turns[turn.row] += 1
            wait = random.Random(f"{turn.row}-{self.turns[turn.row]}").uniform(0, self.longest_wait)
            wait = 0.0 if turn.ended_by == "limit" else wait  # the end of the completion
            self.waits[turn.row] += wait
            heapq.heappush(self.coming, (now + wait, turn.row, turn.ended_by))

    def take_answers(self, wait):
        if wait and self.coming:
            time.sleep(max(0.0, self.coming[0][0] - time.perf_counter()))
        answers, now = [], time.perf_counter()
        while self.coming and self.coming[0][0] <= now:
            _, row, ended_by = heapq.heappop(self.coming)
            ids = None if ended_by == "limit" else range(10, 10 + self.sizes["given"])
            answers.append(Answer(row, ids, self.sizes["drawn"]))
        return answers


def timed(call):
    """Return the seconds of a call."""
    if sampling.GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if sampling.GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def repeat(call):
    """Return the median seconds of some calls after a first one."""
    call()
    return statistics.median(timed(call) for _ in range(TIMES))


def measure(sizes):
    """Return the seconds of each way, by name."""
    if sampling.GPU:
        policy = sampling.make_qwen()
    else:
        sampling.SHAPE.update(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        policy = sampling.make_qwen()
    model, rows, group = policy.causal_lm, sizes["rows"], sizes["group"]
    tasks = sampling.make_tasks(rows // group, sizes["prompt"], 60_000)
    drawn, given = sizes["turns"] * sizes["drawn"], (sizes["turns"] - 1) * sizes["given"]
    sampler = Sampler(model, sampling.StubTokenizer(), max_new_tokens=drawn + given)
    answers = []

    def run_turns(longest_wait):
        answers.append(TimedAnswers(sizes, longest_wait))
        rollouts = sampler.generate(tasks, group, turns=answers[-1])
        assert int(rollouts.completion_mask.sum()) == rows * drawn, "every row draws all of its tokens"

    def run_rounds():
        prompts, done = [task.prompt_ids for task in tasks for _ in range(group)], 0
        while True:
            part = [Task(i, "", ids, {}, (0, 0, i)) for i, ids in enumerate(prompts)]
            ids = sampler.generate(part, 1, max_new_tokens=sizes["drawn"]).completion_ids.tolist()
            done += 1
            if done == sizes["turns"]:
                return
            prompts = [[*prompt, *turn, *range(10, 10 + sizes["given"])] for prompt, turn in zip(prompts, ids, strict=True)]

    def prefill_answers():
        """One forward over the given tokens of all rows, as if they followed each other in one row."""
        ids = torch.randint(10, 60_000, (rows, given), device=sampling.DEVICE)
        with torch.no_grad():
            model(input_ids=ids, logits_to_keep=1, use_cache=False)

    one_turn = repeat(lambda: sampler.generate(tasks, group, max_new_tokens=drawn))
    prefill = repeat(prefill_answers)
    turns = repeat(lambda: run_turns(0.0))
    waiting = repeat(lambda: run_turns(sizes["longest_wait"]))
    return {
        "one_turn": one_turn, "prefill": prefill, "turns": turns, "waits": waiting, "largest_wait": max(answers[-1].waits),
        "rounds": repeat(run_rounds), "decoder": sampler.decoder_name,
    }  # fmt: skip


def to_rows(sizes, seconds):
    """Return the rows of benchmarks/results."""
    peers = {
        "turns": (seconds["one_turn"] + seconds["prefill"], "one turn of as many drawn tokens, and one prefill of the answers", 1.2),
        "waits": (seconds["largest_wait"] + seconds["turns"], "the largest sum of one row's waits, and the time without waits", 1.3),
        "rounds": (seconds["turns"], "turns whose keys and values are kept", None),
    }
    stamp = {
        "card": torch.cuda.get_device_name() if sampling.GPU else "none",
        "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
        "command": "python benchmarks/turns.py", "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    what = "{rows} rows × {turns} turns of {drawn} drawn tokens, answers of {given}, prompt {prompt}".format(**sizes)
    return [
        {
            "bench": f"turns/{name}", "what": what, "ours": seconds[name], "peer": peer, "peer_name": peer_name,
            "ratio": seconds[name] / peer, "unit": "s", "reach": reach and f"at most {reach}",
            "met": seconds[name] <= reach * peer if reach else None, **stamp, "detail": seconds,
        }
        for name, (peer, peer_name, reach) in peers.items()
    ]  # fmt: skip


def main():
    """Measure, print and store the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    sizes = CHECK if check else SIZES
    rows = to_rows(sizes, measure(sizes))
    for row in rows:
        print(json.dumps(row), flush=True)
    if not check:
        OUT.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
