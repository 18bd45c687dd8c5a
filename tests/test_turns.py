"""Completions of several turns: every decoder draws them alike, whoever waits, at the log-probs of the whole row."""

from dataclasses import replace

import pytest
import torch
from fakes import EOS, PAD, VOCAB, Alphabet, FixedTasks, tiny_policy
from test_module_decoder import DEVICE, ELSEWHERE, adapted
from test_module_decoder import tasks as longer_tasks
from turn_fakes import ScriptedTurns

from grpo_core.batch import SamplingParams
from grpo_core.distributed.ranks import draw_uniforms
from grpo_core.model.policy import Policy
from grpo_core.sampling.draw import draw
from grpo_core.sampling.sampler import Sampler
from grpo_core.sampling.stop_strings import StopStrings
from grpo_core.sampling.turn_rows import TurnRows
from grpo_core.schema import ConfigError

TASKS, GROUP, WIDTH = FixedTasks().batch(0), 3, 40
ROWS = len(TASKS) * GROUP
DELAYS = {
    "at once": lambda row, number: 0,
    "late": lambda row, number: 1 + (5 * row + 3 * number) % 7,
    "one after the other": lambda row, number: 40 * row,
}


def script(row, number, turn):
    """Answers of 0 to 3 tokens, one of which is an end-of-sequence token; four turns, of which some have a limit."""
    if number == 3 or (row + number) % 6 == 5:
        return None
    ids = [2 + (row + 5 * number + i) % (VOCAB - 2) for i in range((row + number) % 4)]
    return [EOS if i == 1 else token for i, token in enumerate(ids)], (3 if row % 3 == 0 else None)


def sample(policy, decoder, *, turns=None, tasks=TASKS, group_size=GROUP, width=WIDTH, settings=None, limits=None, **options):
    """Rollouts of the scripted turns by a decoder, and the turns."""
    options.setdefault("stop", ())
    sampler = Sampler(policy.causal_lm, Alphabet(), max_new_tokens=width, decoder=decoder, notify=[].append, **options)
    rows = len(tasks) * group_size
    turns = turns or ScriptedTurns(script, first_limit=9)
    turns.limits = torch.full((rows,), width) if limits is None else limits
    rollouts = sampler.generate(tasks, group_size, turns=turns, settings=settings, limits=limits)
    check(rollouts, turns)
    return rollouts, turns, sampler.decoder_name


def check(rollouts, turns):
    """The rollouts are what the turns saw: their stretches, and the masks of them."""
    valid, drawn = rollouts.valid_mask, rollouts.completion_mask
    lengths = rollouts.valid_lengths()
    assert torch.equal(valid, torch.arange(valid.shape[1], device=valid.device) < lengths[:, None])
    assert torch.equal(drawn, rollouts.turn_ids >= 0) and not (drawn & ~valid).any()
    assert (rollouts.completion_ids[~valid] == PAD).all() and (rollouts.rollout_logprobs[~drawn] == 0).all()
    assert (rollouts.rollout_logprobs[drawn] < 0).all() and int(lengths.max()) == valid.shape[1]
    assert len(turns.turns) == len(rollouts) and not turns.waiting
    for row, seen in turns.turns.items():
        ids, numbers = rollouts.completion_ids[row], rollouts.turn_ids[row]
        assert [ids[numbers == number].tolist() for number in range(int(numbers.max()) + 1)] == [turn for turn, _ in seen]
        assert bool(rollouts.truncated[row]) == (seen[-1][1] == "limit")


def agree(got, want, tolerance=1e-4):
    for name in ("completion_ids", "completion_mask", "valid_mask", "turn_ids", "truncated"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    torch.testing.assert_close(got.rollout_logprobs, want.rollout_logprobs, atol=tolerance, rtol=0)
    assert got.completions == want.completions


def forced(policy, rollouts, tasks, group_size=GROUP):
    """Draw every token again from the logits of the whole row: the tokens, and their log-probs."""
    keys = [(*task.seed, i) for task in tasks for i in range(group_size)]
    noise = draw_uniforms(keys, WIDTH)
    tokens, logprobs = torch.zeros_like(rollouts.completion_ids).cpu(), torch.zeros_like(rollouts.rollout_logprobs).cpu()
    for row in range(len(rollouts)):
        prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]]
        ids = rollouts.completion_ids[row][rollouts.valid[row]]
        with torch.no_grad():
            logits = policy.causal_lm(torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1].float()
        at = torch.arange(len(ids))
        tokens[row, at], logprobs[row, at] = draw(logits.cpu(), 1.0, noise[row, at].cpu())
    return tokens.to(DEVICE), logprobs.to(DEVICE)


@pytest.fixture(scope="module")
def policy():
    policy = tiny_policy(lora_noise=0.1)
    policy.model.to(DEVICE)
    return policy


@pytest.fixture(scope="module")
def plain(policy):
    return sample(policy, "plain")[0]


def test_the_script_has_every_kind_of_turn(policy):
    rollouts, turns, name = sample(policy, "plain")
    ends = [end for seen in turns.turns.values() for _, end in seen]
    assert name == "plain" and {"eos", "turn_limit", "limit"} <= {*ends} and max(map(len, turns.turns.values())) == 4
    given = (rollouts.valid & ~rollouts.completion_mask).sum(dim=1)
    assert (given == 0).any() and (given > 3).any() and 0 < rollouts.truncated.sum() < ROWS
    assert (rollouts.completion_ids[rollouts.valid & ~rollouts.completion_mask] == EOS).any()


@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize("rows_at_once", [None, 5, 1])
def test_the_fused_decoder_draws_what_the_plain_one_draws(policy, plain, delay, rows_at_once):
    turns = ScriptedTurns(script, first_limit=9, delay=DELAYS[delay])
    rollouts, turns, name = sample(policy, "auto", turns=turns, rows_at_once=rows_at_once)
    assert name == "fused" and (turns.waits > 0) == (delay != "at once")
    agree(rollouts, plain)


def test_every_drawn_token_is_that_of_the_noise_at_its_place(policy, plain):
    tokens, logprobs = forced(policy, plain, TASKS)
    mask = plain.completion_mask
    assert torch.equal(tokens[mask], plain.completion_ids[mask])
    torch.testing.assert_close(logprobs * mask, plain.rollout_logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(policy.logprobs(plain), plain.rollout_logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("decoder", ["plain", "auto"])
def test_greedy_turns_and_limits_of_single_rows(policy, decoder):
    limits = torch.tensor([1, 2, 5, 9, 10, 17, 23, 30, 37, 39, 40, 40])
    turns = ScriptedTurns(script, first_limit=9, delay=DELAYS["late"])
    settings = SamplingParams(1.0, True)
    rollouts, turns, _ = sample(policy, decoder, turns=turns, settings=settings, limits=limits)
    assert (rollouts.valid_lengths().cpu() <= limits).all() and turns.turns[0][0][1] in ("limit", "eos")
    for row in range(ROWS):
        prompt, ids = rollouts.prompt_ids[row][rollouts.prompt_mask[row]], rollouts.completion_ids[row][rollouts.valid[row]]
        with torch.no_grad():
            best = policy.causal_lm(torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1].argmax(dim=-1)
        mask = rollouts.completion_mask[row][: len(ids)]
        assert torch.equal(best[mask], ids[mask])


@pytest.mark.parametrize("decoder", ["plain", "auto"])
def test_without_answers_completions_are_those_without_turns(policy, decoder):
    rollouts, _, _ = sample(policy, decoder, turns=ScriptedTurns(lambda *_: None), stop=["fe", "k"])
    sampler = Sampler(policy.causal_lm, Alphabet(), max_new_tokens=WIDTH, decoder=decoder, stop=["fe", "k"])
    single = sampler.generate(TASKS, GROUP)
    assert single.valid_mask is None and single.turn_ids is None
    for name in ("completion_ids", "completion_mask", "truncated", "completions"):
        assert (torch.equal if name != "completions" else tuple.__eq__)(getattr(rollouts, name), getattr(single, name)), name
    torch.testing.assert_close(rollouts.rollout_logprobs, single.rollout_logprobs, atol=1e-5, rtol=0)


STOP = ["fe", "k"]


def stopping(row, number, turn):
    """An answer that ends with the first letter of a stop string, and one that has a whole one."""
    return None if number == 4 else ([5], [4], [10, 3], [])[(row + number) % 4]


@pytest.mark.parametrize("delay", DELAYS)
def test_a_stop_string_ends_a_turn_and_is_looked_for_in_it_alone(policy, delay, monkeypatch):
    """A turn ends with the token that completes one, though the decoder looks seldom; what was given does not count."""
    from grpo_core.sampling import graph_decoder

    monkeypatch.setattr(graph_decoder, "STEPS_WITH_TURNS", 6)
    want, _, _ = sample(policy, "plain", turns=ScriptedTurns(stopping), stop=STOP)
    got, turns, name = sample(policy, "auto", turns=ScriptedTurns(stopping, delay=DELAYS[delay]), stop=STOP)
    assert name == "fused"
    agree(got, want)
    ends = []
    for seen in turns.turns.values():
        for ids, end in seen:
            texts = [Alphabet().batch_decode([ids[: n + 1]])[0] for n in range(len(ids))]
            has_stop = [any(text in drawn for text in STOP) for drawn in texts]
            assert has_stop == [False] * (len(ids) - 1) + [end == "stop"]
            ends.append(end)
    assert ends.count("stop") > 8 and {"eos", "limit"} <= {*ends}
    tokens, _ = forced(policy, got, TASKS)
    assert torch.equal(tokens[got.completion_mask], got.completion_ids[got.completion_mask])


def test_groups_are_passed_on_when_their_completions_are_over(policy):
    for decoder in ("plain", "auto"):
        turns, groups = ScriptedTurns(stopping, delay=DELAYS["late"], limits=[WIDTH] * ROWS), {}
        sampler = Sampler(policy.causal_lm, Alphabet(), max_new_tokens=WIDTH, decoder=decoder, stop=STOP)
        rollouts = sampler.generate(TASKS, GROUP, turns=turns, on_group=groups.__setitem__)
        assert [text for group in range(len(TASKS)) for text in groups[group]] == [*rollouts.completions]
        whole = [ids[:n] for ids, n in zip(rollouts.completion_ids.tolist(), rollouts.valid_lengths().tolist(), strict=True)]
        assert list(rollouts.completions) == Alphabet().batch_decode(whole)


def test_a_watching_user_sees_drawn_and_given_tokens(policy):
    seen = {}

    def watch(rows, tokens):
        for row, token in zip(rows, tokens, strict=True):
            seen.setdefault(row, []).append(token)

    sampler = Sampler(policy.causal_lm, Alphabet(), max_new_tokens=WIDTH)
    rollouts = sampler.generate(TASKS, GROUP, turns=ScriptedTurns(script, limits=[WIDTH] * ROWS), watch=watch)
    for row, ids in enumerate(rollouts.completion_ids):
        assert seen[row] == ids[rollouts.valid[row]].tolist()


# a gated delta rule; attention alone; convolutions; a state space; experts; a state space alone; a window
@pytest.mark.parametrize("name", ["qwen3_5_text", *(
    pytest.param(name, marks=ELSEWHERE) for name in ("llama", "lfm2", "granitemoehybrid", "qwen3_moe", "mamba2", "gemma3_text")
)])  # fmt: skip
@pytest.mark.parametrize("stop", [(), ("k",)])
def test_the_modules_draw_what_the_plain_decoder_draws(name, stop):
    """Rows that wait keep their states, which the steps of others change."""
    policy, tasks = adapted(name), longer_tasks(61)
    options = {"tasks": tasks, "stop": stop}
    want, _, _ = sample(policy, "plain", **options)
    for delay, rows_at_once in (("late", None), ("one after the other", 5), ("at once", None)):
        turns = ScriptedTurns(script, first_limit=9, delay=DELAYS[delay])
        got, _, used = sample(policy, "modules", turns=turns, rows_at_once=rows_at_once, **options)
        assert used == "modules"
        agree(got, want)
    _, logprobs = forced(policy, want, tasks)
    mask = want.completion_mask
    torch.testing.assert_close(logprobs * mask, want.rollout_logprobs, atol=1e-5 if DEVICE.type == "cpu" else 1e-4, rtol=0)
    torch.testing.assert_close(policy.logprobs(want), want.rollout_logprobs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("decoder", ["modules", "plain"])
def test_the_experts_of_given_tokens_are_recorded(decoder):
    policy = adapted("qwen3_moe")
    assert policy.routers is not None
    turns = ScriptedTurns(script, first_limit=9, delay=DELAYS["late"])
    rollouts, _, used = sample(policy, decoder, tasks=longer_tasks(61), turns=turns, routers=policy.routers)
    assert used == decoder
    replay = Policy(policy.model, replays_routing=True)
    replay.layout = policy.layout
    stats = replay.forward(rollouts)
    assert (stats.routing_mismatch[rollouts.completion_mask] == 0).all()
    torch.testing.assert_close(stats.logprobs, rollouts.rollout_logprobs, atol=2e-5, rtol=0)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a captured graph does not call the step again")
def test_memory_that_ends_after_an_answer_is_refused(policy, monkeypatch):
    """Before the first turn was reported, fewer rows are tried; a turn cannot be answered twice."""
    from grpo_core.sampling import fused_model

    notes, steps = [], []
    prefill, step = fused_model.FusedModel.prefill, fused_model.FusedModel.step

    def fail_once(self, prompts):
        if not notes:
            raise torch.OutOfMemoryError
        return prefill(self, prompts)

    monkeypatch.setattr(fused_model.FusedModel, "prefill", fail_once)
    sampler = Sampler(policy.causal_lm, Alphabet(), max_new_tokens=WIDTH, notify=notes.append)
    sampler.generate(TASKS, GROUP, turns=ScriptedTurns(script, limits=[WIDTH] * ROWS))
    assert len(notes) == 1 and sampler.rows_at_once == 6

    def fail_late(self, state):
        steps.append(1)
        if len(steps) > 30:
            raise torch.OutOfMemoryError
        return step(self, state)

    monkeypatch.setattr(fused_model.FusedModel, "step", fail_late)
    with pytest.raises(ConfigError, match="turns have been answered; lower sampling.rows_at_once"):
        sampler.generate(TASKS, GROUP, turns=ScriptedTurns(script, limits=[WIDTH] * ROWS))


def test_an_answer_without_room_or_without_a_turn_is_a_fault():
    turns = ScriptedTurns(lambda *_: [3, 4])
    rows = TurnRows(turns, [3, 9], None)
    rows.report([0], [[5]], [True])
    with pytest.raises(AssertionError, match="leaves no room"):
        rows.take_answers(wait=True)
    turns.take_answers = lambda wait: [replace(turns._answer(0, turns_of(rows)), row=1)]
    with pytest.raises(AssertionError, match="no turn without one"):
        rows.take_answers(wait=True)


def turns_of(rows):
    from grpo_core.sampling.turns import EndedTurn

    return EndedTurn(0, [5], "eos")


def test_the_length_up_to_a_stop_string():
    stop = StopStrings(STOP, Alphabet().batch_decode)
    assert stop.find([5, 4, 3]) == 2 and stop.find([5, 3, 4]) is None and stop.find([10]) == 1
