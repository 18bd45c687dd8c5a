"""Groups are passed on when their last completion ends, with the texts that they have in the end, and judged while others decode; no draw and no number changes."""

import json
import threading
from dataclasses import replace

import pytest
import torch
from fakes import Alphabet, tiny_policy
from test_loop import make_run, rows

from grpo_core.batch import Task
from grpo_core.monitor.aggregates import Stats
from grpo_core.sampling.finished_groups import FinishedGroups
from grpo_core.sampling.graph_decoder import GraphDecoder
from grpo_core.sampling.live_rows import PaddedRows
from grpo_core.sampling.sampler import Sampler
from grpo_core.scoring.judge import Judge, JudgeSettings
from grpo_core.scoring.kept_answers import KeptAnswers
from grpo_core.scoring.scoring import Reward, ask_ahead
from grpo_core.training import rollouts
from grpo_core.training.rollouts import collect
from grpo_core.training.trainer import train

TASKS = [Task(i, "p", ids, {}, seed=(0, 0, i)) for i, ids in enumerate([[5, 6, 7], [8, 9], [4], [10, 11, 12, 13]])]
httpx = pytest.importorskip("httpx")
LIMITS = torch.tensor([3, 2, 4, 12, 12, 12, 2, 2, 2, 8, 12, 1])


def sample(decoder, stop=(), rows_at_once=None, on_group=None):
    policy = tiny_policy(lora_noise=0.2)
    sampler = Sampler(policy.causal_lm, Alphabet(), max_new_tokens=12, decoder=decoder, rows_at_once=rows_at_once, stop=stop)
    return sampler.generate(TASKS, 3, limits=LIMITS, on_group=on_group), sampler


@pytest.mark.parametrize("rows_at_once", [None, 4, 1])
@pytest.mark.parametrize("stop", [(), ("c", "hg")])
@pytest.mark.parametrize("decoder", ["plain", "auto"])
def test_every_group_is_passed_on_once_with_its_final_texts_and_no_draw_changes(decoder, stop, rows_at_once):
    groups = []
    drawn, sampler = sample(decoder, stop, rows_at_once, lambda group, texts: groups.append((group, texts)))
    assert sampler.decoder_name == ("plain" if decoder == "plain" else "fused")
    assert sorted(groups) == [(n, list(drawn.completions[3 * n : 3 * n + 3])) for n in range(4)]
    plain, _ = sample(decoder, stop, rows_at_once)
    for name in ("completion_ids", "completion_mask", "rollout_logprobs", "truncated"):
        assert torch.equal(getattr(drawn, name), getattr(plain, name))
    assert drawn.completions == plain.completions


@pytest.mark.parametrize("decoder, kind, name", [("plain", PaddedRows, "append"), ("auto", GraphDecoder, "_step")])
def test_a_group_is_passed_on_while_others_decode(decoder, kind, name, monkeypatch):
    steps, at, original = [], {}, getattr(kind, name)
    monkeypatch.setattr(Sampler, "check_model", lambda self: None)  # which tries the model
    monkeypatch.setattr(kind, name, lambda self, *given: steps.append(1) or original(self, *given))
    sample(decoder, on_group=lambda group, texts: at.setdefault(group, len(steps)))
    assert at[2] <= 2 and at[0] <= 5 and at[2] < at[1] == max(at.values()) and len(steps) >= 10


@pytest.mark.parametrize("compact", [True, False])
def test_a_row_is_read_from_the_device_once(compact, monkeypatch):
    added, add = [], FinishedGroups.add
    monkeypatch.setattr(FinishedGroups, "add", lambda self, rows, *given: added.extend(rows.tolist()) or add(self, rows, *given))
    monkeypatch.setattr(GraphDecoder.__init__, "__kwdefaults__", {"compact": compact})
    sample("auto", on_group=lambda group, texts: None)
    assert sorted(added) == [*range(12)]


class Answering(httpx.AsyncBaseTransport):
    """It scores a completion by its letters, and keeps the questions."""

    def __init__(self):
        self.asked, self.is_asked = [], threading.Event()

    async def handle_async_request(self, request):
        question = json.loads(request.content)["messages"][0]["content"]
        self.asked.append(question)
        self.is_asked.set()
        return httpx.Response(200, json={"choices": [{"message": {"content": f"Score: {sum(map(ord, question)) % 11}"}}]})


def judged_run(folder, transport, **sampling):
    judge = Judge(JudgeSettings("http://judge/v1", "m", template="{completion}"), KeptAnswers(None), transport=transport)
    run = make_run(folder, num_steps=3, change=lambda c: replace(c, sampling=replace(c.sampling, **sampling)))
    run.rewards.append(Reward("judge", 1.0, judge))
    return run


@pytest.mark.parametrize("sampling", [{}, {"dynamic_attempts": 2}])
def test_what_is_asked_ahead_changes_no_number_of_a_run(tmp_path, monkeypatch, sampling):
    asked = {}
    for name in ("ahead", "after"):
        transport = Answering()
        train(judged_run(tmp_path / name, transport, **sampling))
        asked[name] = sorted(transport.asked)
        monkeypatch.setattr(rollouts, "ask_ahead", lambda rewards, tasks: None)
    ahead, after = (
        [{k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per", "peak"))} for row in rows(tmp_path / name)]
        for name in ("ahead", "after")
    )
    assert ahead == after and asked["ahead"] == asked["after"] and ahead[0]["rewards/judge_std"] > 0


def test_the_judge_is_asked_before_the_last_group_has_ended(tmp_path):
    transport = Answering()
    run, asked = judged_run(tmp_path, transport), []
    generate = run.sampler.generate

    def generate_slowly(tasks, group_size, on_group):
        def wait(group, texts):
            on_group(group, texts)
            assert transport.is_asked.wait(5)
            asked.append(len(transport.asked))

        return generate(tasks, group_size, on_group=wait)

    run.sampler.generate = generate_slowly
    _, drawn, scores = collect(run, 0, Stats())
    assert len(asked) == 4 and asked[0] > 0 and {*transport.asked} == {*drawn.completions}
    assert scores.by_name["judge"].flatten().tolist() == [sum(map(ord, text)) % 11 for text in drawn.completions]


def test_without_a_judge_nothing_is_asked_ahead():
    assert ask_ahead([Reward("good", 1.0, len)], TASKS) is None
