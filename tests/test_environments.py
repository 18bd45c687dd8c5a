"""Environments and tools in the sampler, the trainer, the evaluation and the commands."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_boundary import FOLDER, tokenizer_of
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_core.batch import Task
from grpo_core.commands.dry_run import _format_reward
from grpo_core.commands.evaluate import _note_failures
from grpo_core.commands.replay import run_replay
from grpo_core.commands.sample import describe_turns, format_turns
from grpo_core.config.environment_functions import build_environment
from grpo_core.config.files import load
from grpo_core.data.encoding import apply_chat_template
from grpo_core.data.tool_schemas import offer_tools_of
from grpo_core.environments.driver import PlayedCompletion, PlayedTurn
from grpo_core.environments.interface import Turn
from grpo_core.environments.scores import add_environment
from grpo_core.environments.setup import Environments, find_parser
from grpo_core.model.new_model import new_model
from grpo_core.monitor.completion_rows import make_turn_columns
from grpo_core.sampling.sampler import Sampler
from grpo_core.schema import ConfigError
from grpo_core.scoring.scoring import Scores
from grpo_core.training.saved_batches import _describe_completions, read_dump

TINY = ROOT / "configs" / "tiny.yaml"
OWN_CALCULATOR = """
from grpo_core.environments import calculator

class Calculator(calculator.Calculator):
    def step(self, turn):
        return super().step(turn)
"""
GAME = '''
from grpo_core import Reply

class Game:
    """Counts the letters of a completion, and ends after three turns."""
    def __init__(self, row, seed):
        self.turns = 0
    def step(self, turn):
        self.turns += 1
        if row_fails(turn):
            raise ValueError("no letters")
        return Reply(None if self.turns == 3 else f" {len(turn.text)}.", reward=float(self.turns))

def row_fails(turn):
    return False
'''


@pytest.fixture
def game(tmp_path):
    (tmp_path / "game.py").write_text(GAME)
    return f"{tmp_path}/game.py:Game"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return new_model(["Ada has 7 boxes with 6 pens. 7 * 6 = 42\n"] * 5, vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2)


def sampler_of(model, **options):
    return Sampler(*model, **{"max_new_tokens": 40, "decoder": "plain", **options})


def tasks_of(tokenizer, count=3):
    texts = [f"Ada has {i} boxes" for i in range(count)]
    return [Task(i, text, tokenizer(text)["input_ids"], {"answer": i}, seed=("train", 0, 0, i)) for i, text in enumerate(texts)]


@pytest.mark.parametrize("decoder", ["plain", "auto"])
def test_completions_of_several_turns(model, game, decoder):
    config = load(TINY, [f"environment.name={game}", "environment.max_turn_tokens=4", "rewards=[]", "environment.max_turns=1000000000"])
    sampler, tasks = sampler_of(model, decoder=decoder), tasks_of(model[1])
    environments = Environments(config, sampler)
    try:
        rollouts, played = environments.generate(tasks, 2)
        assert [len(x.turns) for x in played] == [3] * 6
        for row, completion in enumerate(played):
            drawn = int((rollouts.turns[row] >= 0).sum())
            assert drawn == int(rollouts.lengths()[row]) and int(rollouts.turns[row].max()) == 2
            assert int(rollouts.valid_lengths()[row]) == drawn + completion.given_tokens
            assert rollouts.completions[row] == "".join(turn.text + (turn.answer or "") for turn in completion.turns)
            assert [turn.answer for turn in completion.turns] == [*(f" {len(turn.text)}." for turn in completion.turns[:2]), None]
        again, _ = environments.generate(tasks, 2)
        assert torch.equal(again.completion_ids, rollouts.completion_ids)
        scores = environments.add_to_scores(Scores(torch.full((3, 2), torch.nan), {}), played)
        assert scores.rewards.tolist() == [[6.0, 6.0]] * 3 and scores.turn_rewards.tolist() == [[[1.0, 2.0, 3.0]] * 2] * 3
    finally:
        environments.close()


def played_of(*rewards, failure=None):
    return PlayedCompletion([PlayedTurn("a", "eos", None, reward) for reward in rewards], failure=failure)


NAN = float("nan")


@pytest.mark.parametrize("weight, others, expected", [
    (1.0, None, [[3.0, 0.0], [NAN, 2.0]]),
    (2.0, None, [[6.0, 0.0], [NAN, 4.0]]),
    (1.0, [[1.0, NAN], [1.0, NAN]], [[4.0, NAN], [1.0, 2.0]]),
    (0.0, [[1.0, NAN], [1.0, NAN]], [[1.0, NAN], [1.0, NAN]]),
    (None, [[1.0, NAN], [1.0, 0.0]], [[1.0, NAN], [1.0, 0.0]]),
])  # fmt: skip
def test_the_rewards_of_turns_and_those_of_functions(weight, others, expected):
    """Of four completions: rewards 1 and 2, none, a failure after a reward of 5, and 2."""
    played = [played_of(1.0, None, 2.0), played_of(None), played_of(5.0, failure="raised X"), played_of(2.0)]
    scores = Scores(torch.full((2, 2), NAN), {})
    if others is not None:
        values = torch.tensor(others)
        scores = Scores(values, {"a": values}, (1.0,), {"a": torch.zeros(2, 2, dtype=torch.bool)})
    scores = add_environment(scores, played, label="environment e", weight=weight)
    torch.testing.assert_close(scores.rewards, torch.tensor(expected), equal_nan=True)
    assert scores.failed["environment"].tolist() == [[False, False], [True, False]]
    assert scores.failures == ("environment e raised X",) and scores.turns == tuple(played)
    by_turn = torch.tensor([[[1.0, 0.0, 2.0], [0.0, NAN, NAN]], [[0.0, NAN, NAN], [2.0, NAN, NAN]]])
    factor = 0.0 if weight is None else weight
    torch.testing.assert_close(scores.turn_rewards, by_turn * factor, equal_nan=True)
    assert len(scores.weights) == len(scores.by_name) and ("environment" in scores.by_name) == (weight is not None)


def test_evaluate_says_why_an_environment_and_a_reward_failed():
    failed = {"environment": torch.ones(1, 2, dtype=torch.bool), "a": torch.ones(1, 2, dtype=torch.bool)}
    scores = Scores(torch.zeros(1, 2), {}, (), failed, ("reward a raised X", "environment e.py:E raised Y", "environment e.py:E raised Z"))
    failures = {}
    _note_failures(SimpleNamespace(environments=SimpleNamespace(label="environment e.py:E")), scores, failures)
    assert failures == {"environment": "environment e.py:E raised Y", "a": "reward a raised X"}
    _note_failures(SimpleNamespace(environments=None), scores, alone := {})
    assert alone == {"a": "reward a raised X"}


def test_a_template_whose_calls_are_in_another_form_needs_a_parser(model):
    _, tokenizer = model
    config = load(TINY, ["data.prompt=chat"]).data
    for name, form in (("qwen", "tagged_json"), ("llama_3", "llama_3_json")):
        tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
        assert find_parser(tokenizer, config) == form
    tokenizer.chat_template = (FOLDER / "mistral.jinja").read_text()
    with pytest.raises(ConfigError, match="set tool_parser to a function"):
        find_parser(tokenizer, config)
    tokenizer.chat_template = "<tool_call>" + "{% for m in messages %}{{ m.content }}{{ '<tool_call>probe_of_a_tool()</tool_call>' if m.tool_calls else '' }}{% endfor %}"
    with pytest.raises(ConfigError, match="set tool_parser to a function"):
        find_parser(tokenizer, config)


TOOLS = '''
def double(text: str) -> str:
    """Write a text twice.

    Args:
        text: The text.
    """
    return text + text

def parse(turn):
    return [{"name": "double", "arguments": {"text": turn[:2]}}, {"name": "other", "arguments": {}}] if turn else []
'''


def test_tools_are_described_and_called(model, tmp_path):

    (tmp_path / "tools.py").write_text(TOOLS)
    words = [f'tools=["{tmp_path}/tools.py:double"]', f"tool_parser={tmp_path}/tools.py:parse", "data.prompt=chat"]
    config = load(TINY, [*words, "environment.max_turns=2", "environment.max_turn_tokens=3"])
    tokenizer = model[1]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (FOLDER / "qwen.jinja").read_text().strip()
    model[0].resize_token_embeddings(len(tokenizer))
    offer_tools_of(config, tokenizer)
    try:
        assert '"name": "double"' in apply_chat_template(tokenizer, [{"role": "user", "content": "x"}], config.data)
        environments = Environments(config, sampler_of(model, max_new_tokens=300))
        try:
            _, played = environments.generate(tasks_of(tokenizer, 2), 2)
            scores = environments.add_to_scores(Scores(torch.zeros(2, 2), {}), played)
        finally:
            environments.close()
        called = [x for x in played if x.calls]
        assert called and all(x.errors == x.calls // 2 for x in called) and "environment" not in scores.by_name
        for completion in called:
            first = completion.turns[0]
            assert first.answer == 2 * first.text[:2] + "\nerror: there is no tool other; known: double"
        tokenizer.chat_template = "{{ messages[0].content }}"
        with pytest.raises(ConfigError, match="leaves the tool double out of the prompts"):
            offer_tools_of(config, tokenizer)
    finally:
        tokenizer.offered_tools = []


def test_the_calculator():
    calculator = build_environment("calculator", {"most_digits": 3})({}, 0)
    answers = {
        "so 3 * 4 =": " 12", "(3 - 10)*2 =": " -14", "x =": " ?", "9 / 3 =": " 3", "9 / 2 =": " ?", "9 / 0 =": " ?", "99 * 99 =": " ?", "7 =": " 7", "- =": " ?",
        "3 * 4 = 12. 12 + 500 =": " 512", "999 + 0 =": " 999", "999 + 1 =": " ?", "-999 - 1 =": " ?", "99**99 =": " ?", f"{'9' * 5000} * 9 =": " ?", f"{'(' * 5000}9 =": " ?",
    }  # fmt: skip
    assert {text: calculator.step(Turn(text, text, 0, "stop")) for text in answers} == answers
    assert calculator.step(Turn(" 4 =", "3 * 4 =", 0, "stop")) == " 12"  # the expression may have begun in an earlier turn
    for text, ended_by in (("3 * 4 =", "eos"), ("3 * 4 =", "turn_limit"), ("3 * 4\n", "stop")):
        assert calculator.step(Turn(text, text, 0, ended_by)) is None


WORDS = ["trainer.num_steps=2", "trainer.completions_per_step=16", "evaluation.num_tasks=4", "log.evaluation_completions=4", "environment.max_turns=3", "data.limit=200"]


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines() if line]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps with the calculator, which is asked after every equals sign."""
    from conftest import group_of_one

    from grpo_core.cli import main

    folder = tmp_path_factory.mktemp("runs")
    broken = 'if __import__("os").path.exists(__file__ + ".broken"):\n            1 // 0\n        return super()'
    (folder / "calculator.py").write_text(OWN_CALCULATOR.replace("return super()", broken))
    words = [*WORDS, f"output_dir={folder}", f"environment.name={folder}/calculator.py:Calculator", "sampling.stop= ="]
    with group_of_one():
        assert main(["train", "--config", str(TINY), *words, "checkpoint.every=1", "debug.dump_batches=1"]) == 0
    return folder / "tiny"


def test_a_run_with_an_environment(trained):
    rows, metrics = lines_of(trained / "completions.jsonl"), lines_of(trained / "metrics.jsonl")
    assert any(len(row["turns"]) > 1 for row in rows) and metrics[0]["turns"] > 1 and metrics[0]["given_tokens"] > 0
    for row in rows:
        assert row["text"] == "".join(turn["text"] + (turn["answer"] or "") for turn in row["turns"])
        assert row["environment_failure"] is None and row["rewards"]["environment"] == 0
    assert {row["environment_failures"] for row in metrics} == {0} and all("failed/environment" in row for row in metrics)
    assert len(lines_of(trained / "evaluation_completions.jsonl")[0]["turns"]) >= 1
    assert [path.name for path in sorted((trained / "turns").glob("*"))] == [f"step-00000{step}-rank-0.jsonl" for step in (0, 1)]
    assert sum("complete" in line for line in lines_of(trained / "turns" / "step-000001-rank-0.jsonl")) == 1


def test_a_step_that_is_taken_again_reads_its_answers(trained, here, tmp_path):
    """The environment of the second start fails whenever it is asked, which only the evaluation does."""
    shutil.copytree(trained, tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "checkpoints" / "step-000002")
    broken = trained.parent / "calculator.py.broken"
    broken.touch()
    try:
        done = here("train", "--config", TINY, f"resume={tmp_path / 'tiny'}")
    finally:
        broken.unlink()
    assert done.returncode == 0, done.stderr
    before, after = (lines_of(folder / "completions.jsonl") for folder in (trained, tmp_path / "tiny"))
    assert [row for row in after if row["step"] == 1] == [row for row in before if row["step"] == 1]
    assert any(turn["answer"] for row in after if row["step"] == 1 for turn in row["turns"])
    assert "raised ZeroDivisionError" in done.stdout and "asked again" not in done.stdout


def test_a_step_that_is_taken_again_with_other_code_is_asked_again(trained, here, tmp_path):
    shutil.copytree(trained, tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "checkpoints" / "step-000002")
    example = trained.parent / "calculator.py"
    text = example.read_text()
    try:
        example.write_text(text.replace("return super().step(turn)", 'return super().step(turn) and " one"'))
        done = here("train", "--config", TINY, f"resume={tmp_path / 'tiny'}")
    finally:
        example.write_text(text)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("were recorded in step 2 are not read, because the code or the settings of the environment") == 1
    answers = {turn["answer"] for row in lines_of(tmp_path / "tiny" / "completions.jsonl") if row["step"] == 1 for turn in row["turns"]}
    assert answers == {" one", None}


@pytest.mark.soak
def test_a_recording_of_other_turns_asks_again_with_a_warning(trained, here, tmp_path):
    shutil.copytree(trained, tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "checkpoints" / "step-000002")
    file = tmp_path / "tiny" / "turns" / "step-000001-rank-0.jsonl"
    file.write_text(re.sub(r'"turns": "\w+"', '"turns": "0"', file.read_text()))
    done = here("train", "--config", TINY, f"resume={tmp_path / 'tiny'}")
    assert done.returncode == 0 and done.stdout.count("the environments are asked again") == 1
    assert sum("complete" in line for line in lines_of(file)) == 2


def test_evaluate_and_sample_ask_the_environment(trained, here, tmp_path):
    done = here("evaluate", trained, "--samples", 1, "--limit", 4, "--no-base", "--output", tmp_path / "evaluate")
    assert done.returncode == 0, done.stderr
    rows = lines_of(tmp_path / "evaluate" / "completions.jsonl")
    assert len(rows) == 8 and all(row["turns"] for row in rows) and "reward environment" in done.stdout
    done = here("sample", trained, "Ada has 7 boxes with 6 pens each. How many pens does she have?", "--samples", 2)
    assert done.returncode == 0 and done.stdout.count("[turn 1]") == 2, done.stderr
    done = here("sample", trained, "Ada has 7 boxes with 6 pens each. How many pens does she have?")
    assert done.returncode == 0 and done.stdout.count("[turn 1]") == 1 and " turn" in done.stdout.splitlines()[-1], done.stderr
    assert ("=\n[answer]\n " in done.stdout) == ("[turn 2]" in done.stdout)


def test_a_dry_run_shows_turns_and_refuses_an_environment_that_fails_on_a_whole_group(game, here, tmp_path):
    words = [f"environment.name={game}", "rewards=[]", "environment.max_turn_tokens=5", "data.limit=50", f"output_dir={tmp_path}"]
    done = here("train", "--config", TINY, "--dry-run", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[turn 1, reward 1]") == 8 and done.stdout.count("[turn 3, reward 3]") == 8
    file = tmp_path / "game.py"
    file.write_text(file.read_text().replace("return False", "return True"))
    done = here("train", "--config", TINY, "--dry-run", *words)
    assert done.returncode == 2, done.stdout
    assert f"environment {game} raised ValueError: no letters (game.py, line 11), on all 8 completions of a group" in done.stderr


def test_a_reward_that_failed_is_not_a_number_in_a_dry_run():
    nan = float("nan")
    scores = Scores(torch.tensor([[nan, 1.0, nan]]), {}, failed={"environment": torch.tensor([[True, False, False]])})
    assert [_format_reward(scores, value, i, "environment") for i, value in enumerate([nan, 1.0, nan])] == ["failed", "1", "none"]
    assert [_format_reward(scores, nan, i) for i in (0, 2)] == ["failed", "none"]
    assert _format_reward(scores, nan, 0, "other") == "none"


def test_sample_takes_a_row_of_the_evaluation_data(trained, capsys):
    from grpo_core.commands.sample import run_sample

    assert run_sample(str(trained), None, row=2, max_new_tokens=8) == 0
    first, last = capsys.readouterr().out, (trained / "evaluation_completions.jsonl").read_text().splitlines()
    assert json.loads(last[1])["prompt"].strip() in first and "not computed" not in first
    for given, message in (
        ({"row": 10**6}, r"--row is 1000000; the evaluation data, .*, has [\d,]+ rows"),
        ({"row": 1, "answer": "3"}, "--row is 1 and --answer is given too"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_sample(str(trained), None, max_new_tokens=8, **given)
    with pytest.raises(ConfigError, match="--row is 1 and QUESTION is given too"):
        run_sample(str(trained), "What?", row=1)


def test_the_last_line_of_sample_names_the_columns_that_a_row_lacks_and_an_answer_without_room():
    task = Task(0, "p", [1], {"question": "q"})
    failed = PlayedCompletion([PlayedTurn("1", "eos")], failure="raised KeyError: 'answer' (my_env.py, line 5)")
    reason = "the environment raised KeyError: 'answer' (my_env.py, line 5); its row has the columns question, prompt"
    assert describe_turns(failed, task)[-1] == f"{reason} (--answer adds answer, --row takes a row of the data with all columns)"
    other = PlayedCompletion([PlayedTurn("1", "eos")], failure="took more than 3 s")
    assert describe_turns(other, task)[-1] == "the environment took more than 3 s"
    full = PlayedCompletion([PlayedTurn("1", "eos")], lacks_room=True)
    assert describe_turns(full, task) == ["1 turn", "ended by an answer that does not fit (sampling.max_new_tokens)"]
    assert make_turn_columns([other, full])["answer_without_room"] == [False, True]


def test_sample_prints_turns_and_answers_apart():
    turns = [PlayedTurn("look\n", "eos", "12\n", 0.5, calls=2, errors=1), PlayedTurn("3 =", "stop", " 3"), PlayedTurn("end", "eos")]
    parts = ["[turn 1, reward 0.5]", "look", "[answer to 2 tool calls, 1 error]", "12", "[turn 2]", "3 =", "[answer]", " 3", "[turn 3]", "end"]
    assert format_turns(PlayedCompletion(turns)) == "\n".join(parts)


def test_a_replay_of_a_batch_with_turns_has_the_runs_gradient(trained, tmp_path):
    """The masks are saved and loaded; other credit is computed again from the rewards of turns; given tokens have no part."""
    name = trained / "batches" / "step-000001"
    rollouts, row = read_dump(name).batch.rollouts, lines_of(trained / "metrics.jsonl")[1]
    assert rollouts.valid_mask.sum() > rollouts.completion_mask.sum() and rollouts.turn_ids.max() > 0
    assert torch.equal(rollouts.turn_ids >= 0, rollouts.completion_mask)
    assert run_replay(name, ["advantage.name=turn_level"], output=tmp_path / "replay.json") == 0
    summary = json.loads((tmp_path / "replay.json").read_text())
    for objective, norm in zip(summary["objectives"], (row["grad_norm"], None), strict=True):
        assert norm is None or objective["grad_norm"] == pytest.approx(norm, rel=1e-4)
        for classes in objective["classes"].values():
            assert sum(part["tokens"] for part in classes.values()) == int(rollouts.completion_mask.sum())
        assert [len(values) for values in objective["tokens"]["weight"]] == rollouts.lengths().tolist()
    assert summary["logprob_gap_max"] < 1e-5
    saved = json.loads(name.with_name("step-000001-rank-0.json").read_text())["completions"]
    for completion, replayed, played in zip(saved, summary["completions"], lines_of(trained / "completions.jsonl")[16:], strict=True):
        drawn = [token for token, turn in zip(completion["tokens"], completion["turns"], strict=True) if turn >= 0]
        assert replayed["tokens"] == drawn and len(drawn) == played["length"]
        assert completion["turns"].count(-1) == played["given_tokens"] and max(completion["turns"]) == len(played["turns"]) - 1
        assert [x is None for x in completion["logprobs"]] == [turn == -1 for turn in completion["turns"]]


def test_a_batch_with_credit_of_turns_is_saved_with_the_advantage_of_each_token():
    mask = torch.tensor([[True, True, False, True]])
    tensors = {"completion_mask": mask, "valid_mask": torch.ones(1, 4, dtype=torch.bool), "completion_ids": torch.arange(4)[None]}
    tensors |= {"turn_ids": torch.tensor([[0, 0, -1, 1]]), "old_logprobs": torch.zeros(1, 4), "advantages": torch.tensor([[1.0, 1.0, 0.0, -1.0]])}
    batch = SimpleNamespace(mean_advantages=lambda: torch.tensor([0.3]))
    tokenizer = SimpleNamespace(decode=lambda ids: chr(97 + ids[0]))
    (saved,) = _describe_completions(tokenizer, [Task(0, "p", [1], {})], batch, tensors, torch.zeros(1, 4))
    assert saved["tokens"] == list("abcd") and saved["advantages"] == [1, 1, 0, -1] and saved["ratio"] == [1, 1, None, 1]


def test_a_dry_run_asks_the_environment(trained, here, tmp_path):
    words = [f"output_dir={tmp_path}", f"environment.name={trained.parent / 'calculator.py'}:Calculator", "sampling.stop= ="]
    done = here("launch", "--dry-run", "--config", TINY, *WORDS, *words)
    assert done.returncode == 0 and "environment 0" in done.stdout, done.stderr + done.stdout


def test_credit_of_turns_and_fresh_prompts(game, here, tmp_path):
    """The environment alone gives rewards, which are credited to turns; groups without a signal are drawn again."""
    words = ["rewards=[]", "advantage.name=turn_level", "sampling.dynamic_attempts=1", "environment.max_turn_tokens=6", "evaluation.num_tasks=0"]
    done = here("train", "--config", TINY, *WORDS[:2], "data.limit=200", f"output_dir={tmp_path}", f"environment.name={game}", *words)
    assert done.returncode == 0, done.stderr
    rows, metrics = lines_of(tmp_path / "tiny" / "completions.jsonl"), lines_of(tmp_path / "tiny" / "metrics.jsonl")
    assert all(row["rewards"] == {"environment": 6.0} and len(row["turns"]) == 3 for row in rows)
    assert all(row["resampled_groups"] > 0 and row["reward"] == 6 and row["turns"] == 3 for row in metrics)


@pytest.mark.parametrize("family", ["qwen", "llama_3", "mistral", "hermes", "gpt_oss"])
def test_the_sampler_saw_prompt_and_stretches_and_its_log_probs_are_the_models(family, game):
    tokenizer, eos_ids = tokenizer_of(family)
    torch.manual_seed(1)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    network = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=512, **size)).eval()
    network.generation_config.eos_token_id = eos_ids
    config = load(TINY, ["data.prompt=chat", f"environment.name={game}", "environment.max_turn_tokens=5"])
    text = apply_chat_template(tokenizer, [{"role": "user", "content": "1 + 2?"}], config.data)
    tasks = [Task(i, text, tokenizer(text, add_special_tokens=False)["input_ids"], {}, seed=("train", 0, 0, i)) for i in range(2)]
    environments = Environments(config, Sampler(network, tokenizer, max_new_tokens=200))
    try:
        rollouts, played = environments.generate(tasks, 2)
    finally:
        environments.close()
    for row, completion in enumerate(played):
        valid = int(rollouts.valid_lengths()[row])
        ids, turns = rollouts.completion_ids[row, :valid], rollouts.turns[row, :valid].tolist()
        expected, drawn = [], [[int(i) for i, turn in zip(ids, turns, strict=True) if turn == number] for number in range(3)]
        for own, turn in zip(drawn, completion.turns, strict=True):
            expected += own
            if turn.answer is not None:
                expected += environments.boundary.encode([turn.answer], turn.text, turn.ended_by, own[-1])
        assert ids.tolist() == expected and len(drawn) == 3
        whole = torch.tensor([tasks[0].prompt_ids + expected])
        with torch.no_grad():
            logprobs = network(whole).logits[0].log_softmax(dim=-1)
        places = [len(tasks[0].prompt_ids) + place - 1 for place, turn in enumerate(turns) if turn >= 0]
        own = torch.stack([logprobs[place, whole[0, place + 1]] for place in places])
        torch.testing.assert_close(rollouts.rollout_logprobs[row, :valid][[turn >= 0 for turn in turns]], own, atol=1e-5, rtol=0)
        assert not rollouts.rollout_logprobs[row][rollouts.turns[row] < 0].any()


CLOSES = '''
from pathlib import Path

class Closes:
    def __init__(self, row, seed, *, folder: str = ""):
        self.file = Path(folder) / str(seed)
    def step(self, turn):
        return None
    async def close(self):
        self.file.write_text("closed")
'''


def test_every_object_is_closed(model, tmp_path):
    (tmp_path / "closes.py").write_text(CLOSES)
    (tmp_path / "notes").mkdir()
    config = load(TINY, [f"environment.name={tmp_path}/closes.py:Closes", f"environment.args.folder={tmp_path}/notes"])
    environments = Environments(config, sampler_of(model))
    environments.generate(tasks_of(model[1]), 2)
    environments.close()
    assert len([*(tmp_path / "notes").iterdir()]) == 6
