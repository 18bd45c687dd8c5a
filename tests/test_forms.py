"""Data in the forms of other projects: recognised where data.path is given on the command line."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from test_run import SHORT, read

from grpo_core import load_config, open_source
from grpo_core.config import files
from grpo_core.config.sections import RewardConfig
from grpo_core.data.forms import FORMS, _describe_changes, recognise
from grpo_core.data.prompts import make_tasks
from grpo_core.data.rows import load_splits, peek_rows
from grpo_core.data.tasks import read_tasks
from grpo_core.model.loading import load_tokenizer
from grpo_core.objective.rewards import REWARDS
from grpo_core.schema import ConfigError

TINY = ROOT / "configs" / "tiny.yaml"
FORMATS = ROOT / "tests" / "fixtures" / "formats"
TRUTH = "reward_model.ground_truth"
def renamed(columns):
    """Return the columns that get another name; those that keep their own beside it are left out."""
    return {name: path for name, path in columns.items() if name != path}


# fixture -> the form's name, data.columns, data.prompt, the beginning of data.template, the reward
EXPECTED = {
    "trl_prompt_solution": ("TRL", {"answer": "solution"}, "chat", "{prompt}", "correct_answer"),
    "trl_prompt_solution_latex": ("TRL", {"answer": "solution"}, "chat", "{prompt}", "math_equal"),
    "trl_text_solution": ("TRL", {"answer": "solution"}, "template", "{prompt}", "correct_answer"),
    "trl_answer_solution": ("TRL", {}, "chat", "{prompt}", "correct_answer"),
    "trl_last_turn": ("TRL", {}, "chat", "{prompt}", "correct_answer"),
    "verl": ("verl", {"answer": TRUTH}, "chat", "{prompt}", "correct_answer"),
    "verl_latex": ("verl", {"answer": TRUTH}, "chat", "{prompt}", "math_equal"),
    "verl_code": ("verl", {"tests": TRUTH}, "chat", "{prompt}", "python_tests"),
    "verl_countdown": ("Countdown in verl's form", {"nums": f"{TRUTH}.numbers", "target": f"{TRUTH}.target"}, "chat", "{prompt}", "countdown"),
    "open_r1": ("open-r1", {"question": "problem"}, "chat", "{question}\nThink", "math_equal"),
    "open_r1_answer": ("open-r1", {"question": "problem"}, "chat", "{question}\nThink", "math_equal"),
    "gsm8k": ("GSM8K", {}, "chat", "{question}", "correct_answer"),
    "math": ("MATH", {"question": "problem", "answer": "solution"}, "chat", "{question}\nThink", "math_equal"),
    "dapo_math": ("DAPO-Math", {"answer": TRUTH}, "chat", "{prompt}", "correct_answer"),
    "dapo_math_processed": ("DAPO-Math", {"answer": "solution"}, "chat", "{prompt}\nThink", "correct_answer"),
    "countdown": ("Countdown", {}, "chat", "Make {target} from the numbers {nums} with", "countdown"),
    "conversations": ("conversations", {}, "chat", "{messages}", "correct_answer"),
}  # fmt: skip
OF_TINY = "[{name: correct_answer, args: {strict: true}}, {name: has_think_tags, weight: 0.0}]"  # rewards of configs/tiny.yaml
UNSCORED = ("trl_prompt", "trl_prompt_messages", "conversations_text")


HAS_MATH = importlib.util.find_spec("math_verify") is not None


def can_run(reward):
    """Whether the library of a reward is installed; a reward that is not registered is a fault."""
    assert REWARDS.knows(reward), reward
    return reward != "math_equal" or HAS_MATH


@pytest.fixture
def has_math(monkeypatch):
    """Pretend that math-verify is installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name if name == "math_verify" else find(name, *rest))


def fixture(name):
    return str(FORMATS / f"{name}.jsonl")


def keys_of(name, *words, config=TINY, supervised=False):
    """The keys that the form of a fixture sets, and the sentence about them."""
    loaded = files.load(config, [f"data.path={fixture(name)}", *words])
    return recognise(loaded, {"data.path", *(word.split("=")[0] for word in words)}, supervised)


def test_every_fixture_is_expected_and_every_form_has_one():
    assert {path.stem for path in FORMATS.iterdir()} == {*EXPECTED, *UNSCORED}
    assert {form.name for form in FORMS} == {name for name, *_ in EXPECTED.values()}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_form_brings_its_columns_prompt_and_rewards(name, has_math):
    form, columns, prompt, template, reward = EXPECTED[name]
    keys, sentence = keys_of(name)
    assert (renamed(keys["data.columns"]), keys["data.prompt"], keys["rewards"], keys["evaluation.reward"]) == (columns, prompt, [reward], reward)
    assert keys["data.template"].startswith(template) and sentence.startswith(f"{fixture(name)} has the form of {form} (")
    assert f"rewards [{reward}] (not {OF_TINY})" in sentence and "\n" not in sentence
    if not can_run(reward):
        return
    notes = []
    config = files.load(TINY, [f"data.path={fixture(name)}"], recognise=recognise, notify=notes.append)
    assert notes == [sentence]
    assert (renamed(config.data.columns), config.data.template, config.evaluation.reward) == (columns, keys["data.template"], reward)
    assert [(x.name, x.weight, x.args) for x in config.rewards] == [(reward, 1.0, {})]
    assert config.data.max_prompt_tokens == 512 and "data.max_prompt_tokens 512 (not 128)" in sentence


@pytest.mark.parametrize("name", UNSCORED)
def test_data_that_does_not_say_how_it_is_scored_asks_for_rewards(name):
    with pytest.raises(ConfigError, match=r"does not say how completions are scored; name the rewards, such as rewards=my_rewards.py:my_reward$"):
        keys_of(name)
    keys, sentence = keys_of(name, "rewards=think_format")
    assert "rewards" not in keys and keys["evaluation.num_tasks"] == 0 and "evaluation.num_tasks 0 (not 500)" in sentence
    assert keys_of(name, "rewards=think_format", "evaluation.reward=think_format")[0]["evaluation.num_tasks"] == 1


def test_a_word_that_names_the_gold_answer_of_prompts_leaves_the_rewards_of_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "2 + 3 =", "extra": {"gold": "5"}}) + "\n")
    config = load_config(TINY, [f"data.path={path}", "data.columns={answer: extra.gold}"])
    assert (config.data.template, config.rewards[0].name, config.evaluation.num_tasks) == ("{prompt}", "correct_answer", 500)
    assert config.data.columns == {"answer": "extra.gold"}


def test_a_model_that_is_opened_with_a_word_for_the_data_has_its_form():
    notes = []
    opened = open_source("builtin:tiny", [f"data.path={fixture('gsm8k')}"], notify=notes.append)
    assert opened.config.data.template == "{question}" and len(notes) == 1 and "the form of GSM8K" in notes[0]


@pytest.mark.parametrize("words, missing", {
    ("rewards=think_format",): {"rewards"},
    ("evaluation.reward=text_match",): {"evaluation.reward"},
    ("data.template=Q: {question}",): {"data.template", "data.prompt", "data.system"},
    ("data.prompt=template",): {"data.prompt"},
    ("data.columns={question: problem, answer: answer}",): {"data.columns"},
}.items())  # fmt: skip
def test_other_words_win(words, missing, has_math):
    alone, given = keys_of("open_r1")[0], keys_of("open_r1", *words)[0]
    assert alone.keys() - given.keys() == missing and all(alone[key] == value for key, value in given.items())
    config = files.load(TINY, [f"data.path={fixture('gsm8k')}", *words], recognise=recognise)
    for word in words:
        key, _, text = word.partition("=")
        value = getattr(config.data, key.removeprefix("data."), None)
        assert text in (value, config.evaluation.reward, config.rewards[0].name) or key == "data.columns"


def test_a_word_for_one_column_is_laid_over_those_of_the_form():
    words = [f"data.path={fixture('verl')}", "data.columns.source=data_source", "rewards[0].weight=0.5"]
    config = files.load(TINY, words, recognise=recognise)
    assert config.data.columns == {"answer": TRUTH, "source": "data_source"}
    assert [(reward.name, reward.weight) for reward in config.rewards] == [("correct_answer", 0.5)]


def test_the_line_names_what_a_reward_loses_with_its_weight_and_arguments(tmp_path):
    long = "my_rewards.py:" + "a" * 130
    rewards = [{"name": "correct_answer", "weight": 0.5, "args": {"strict": True, "outside_thinking": True}}, "think_format", {"name": "combined", "weight": 0.0}]
    (tmp_path / "mine.yaml").write_text(f"base: tiny\nrewards: {json.dumps(rewards)}\n")
    sentence = keys_of("gsm8k", config=tmp_path / "mine.yaml")[1]
    assert "rewards [correct_answer] (not [{name: correct_answer, weight: 0.5, args: {strict: true, outside_thinking: true}}, think_format, {name: combined, weight: 0.0}])" in sentence
    config = files.load(TINY)
    config = replace(config, rewards=[RewardConfig(long), RewardConfig("combined")])
    assert f"(not [{long[:120]}..., combined])" in _describe_changes(config, {"rewards": ["think_format"]})


def test_where_the_path_stands_in_a_file_the_files_own_keys_win(tmp_path):
    (tmp_path / "mine.yaml").write_text(f"data: {{path: {fixture('gsm8k')}, template: 'Q: {{question}}'}}\nrewards: [think_format]\n")
    notes = []
    config = files.load(tmp_path / "mine.yaml", ["trainer.num_steps=2"], recognise=recognise, notify=notes.append)
    assert notes == [] and (config.data.template, config.data.prompt, config.rewards[0].name) == ("Q: {question}", "template", "think_format")


def test_the_configuration_that_is_written_repeats_the_run(tmp_path):
    config = load_config(str(TINY), [f"data.path={fixture('verl')}"])
    (tmp_path / "config.yaml").write_text(files.dump(config))
    again = load_config(tmp_path / "config.yaml")
    assert again == config and config.data.columns == {"answer": TRUTH}


def test_the_splits_of_the_configuration_files_own_data_do_not_hold_for_a_file(tmp_path, capsys):
    """The default on a GPU names the test split of its own data."""
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"question": "2 + 3?", "answer": "5"}\n')
    words = ["model.path=builtin:tiny", f"data.path={fixture('gsm8k')}"]
    config = load_config(str(ROOT / "configs" / "gsm8k_qwen2.5_1.5b.yaml"), words)
    assert (config.data.split, config.data.eval_split, config.data.eval_path) == ("train", None, None)
    told = capsys.readouterr().out
    assert load_config(ROOT / "configs" / "gsm8k_qwen2.5_1.5b.yaml", ["model.path=builtin:tiny", f"data.path={plain}"]).data.eval_split is None
    assert capsys.readouterr().out == f"note: {plain} is one file, which sets data.eval_split null (not 'test')\n"
    assert told.startswith(f"note: {fixture('gsm8k')} has the form of GSM8K") and "data.eval_split null (not 'test')" in told


@pytest.mark.parametrize("rows", [
    [{"question": "a", "answer": "5"}], [{"question": "a", "answer": "#### 5"}, {"question": "b", "answer": "6"}],
    [{"text": "a"}], [{"problem": "a", "solution": "b"}], [{"question": "a", "answer": None}],
])  # fmt: skip
def test_data_of_no_form_leaves_the_configuration_as_it_is(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = files.load(TINY, [f"data.path={path}"])
    config = replace(config, evaluation=replace(config.evaluation, num_tasks=1)) if len(rows) > 1 else config
    assert files.load(TINY, [f"data.path={path}"], recognise=recognise) == config


@pytest.mark.parametrize("gold, reward", [
    ({"inputs": ["1"], "outputs": ["2"]}, "python_tests"), ('{"fn_name": "f", "inputs": [[1]], "outputs": [2]}', "python_tests"),
    ([{"input": "1", "output": "2"}], "python_tests"), ('[{"input": "1", "output": "2", "testtype": "stdin"}]', "python_tests"),
    ("assert f() == 1", "python_tests"), (["assert f()", "\nassert g()"], "python_tests"), ('["assert f()"]', "python_tests"),
    ("[1, 2]", "math_equal"), ("[broken", "math_equal"), ("{1, 2}", "math_equal"), ('["a"]', "math_equal"), ("asserted", "math_equal"), ("3", "correct_answer"),
])  # fmt: skip
def test_gold_answers_that_are_tests_are_run(gold, reward, tmp_path, has_math):
    path = tmp_path / "rows.jsonl"
    for place, row in (("ground_truth", {"prompt": "p", "ground_truth": gold}),
                       (TRUTH, {"data_source": "x", "prompt": "p", "reward_model": {"ground_truth": gold}})):  # fmt: skip
        path.write_text(json.dumps(row) + "\n")
        keys, _ = recognise(files.load(TINY, [f"data.path={path}"]), {"data.path"})
        column = "tests" if reward == "python_tests" else "answer"
        assert (keys["rewards"], keys["evaluation.reward"], renamed(keys["data.columns"])) == ([reward], reward, {column: place})


def test_tests_beside_other_gold_answers_ask_for_rewards(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p", "answer": gold}) + "\n" for gold in ("5", "assert f() == 1")))
    with pytest.raises(ConfigError, match="does not say how completions are scored; name the rewards"):
        recognise(files.load(TINY, [f"data.path={path}"]), {"data.path"})


def test_the_built_in_problems_are_no_form_of_others():
    words = ["data.path=builtin:word_problems"]
    assert files.load(TINY, words, recognise=recognise) == files.load(TINY, words)


@pytest.mark.parametrize("name", [name for name, row in EXPECTED.items() if row[-1] == "math_equal"])
def test_a_form_that_needs_the_extra_names_the_command_that_installs_it(name, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "math_verify" else find(name, *rest))
    with pytest.raises(ConfigError, match=r"whose reward math_equal needs math-verify, which is not installed: pip install -e '.\[math\]'; or choose other"):
        keys_of(name)
    for word in ("evaluation.reward=text_match", "evaluation.num_tasks=0"):
        keys, _ = keys_of(name, "rewards=text_match", word)
        assert "rewards" not in keys and "evaluation.reward" not in keys


def test_sft_gets_the_targets_of_the_form():
    keys, _ = keys_of("gsm8k", config=ROOT / "configs" / "tiny_sft.yaml", supervised=True)
    assert keys["sft.targets"] == ["{answer}"] and keys["evaluation.reward"] == "correct_answer" and "rewards" not in keys
    keys, _ = keys_of("conversations_text", supervised=True)
    assert keys["evaluation.reward"] == "text_match"


def of_rows(tmp_path, row, *words, supervised=False):
    """The keys that the form of rows like `row` sets."""
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(row) + "\n") * 3)
    loaded = files.load(TINY, [f"data.path={path}", *words])
    return recognise(loaded, {"data.path", *(word.split("=")[0] for word in words)}, supervised)[0]


@pytest.mark.parametrize("prompt, last, answer, words, reward", [
    *((prompt, *case) for prompt in ("prompt", "messages") for case in (
        ("The sum follows.", "5", (), "correct_answer"),
        ("It is 5.", "5", (), "correct_answer"),
        ("It is 5.", "B", (), None),
        ("It is 5.", None, ("data.columns={answer: extra.gold}",), None),  # 'C'
        ("The sum follows.", "B", ("data.columns={other: answer, answer: extra.number}",), "correct_answer"),
    )),
    ("messages", "It is 5.", "B", ("data.columns={other: answer}",), "correct_answer"),  # rows with prompt and answer are of another form
])  # fmt: skip
def test_the_reward_follows_the_answers_that_it_will_read(tmp_path, prompt, last, answer, words, reward, has_math):
    """A column answer comes before the last turn of a conversation."""
    row = {prompt: [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": last}], "answer": answer, "extra": {"gold": "C", "number": 5}}
    if answer is None:
        del row["answer"]
    if reward is None and prompt == "messages" and not words:
        with pytest.raises(ConfigError, match="which does not say how completions are scored; name the rewards"):
            of_rows(tmp_path, row, *words)
    else:
        texts = "math_equal" if prompt == "prompt" and not words else None  # as TRL's prompts with an answer
        assert of_rows(tmp_path, row, *words).get("rewards", [None]) == [reward or texts]


def test_sft_trains_the_completions_of_trls_prompts(tmp_path):
    text = {"prompt": "2 + 3 =", "completion": " 5"}
    chat = {"prompt": [{"role": "user", "content": "2 + 3?"}], "completion": [{"role": "assistant", "content": "5"}]}
    keys = of_rows(tmp_path, text, supervised=True)
    assert (keys["sft.targets"], keys["data.prompt"], keys["data.columns"]) == (["{completion}"], "template", {})
    keys = of_rows(tmp_path, chat, supervised=True)
    assert (keys["sft.targets"], keys["data.prompt"], keys["data.columns"]) == (["{target}"], "chat", {"target": "completion.0.content"})
    with pytest.raises(ConfigError, match="does not say how completions are scored"):
        of_rows(tmp_path, text)


@pytest.mark.parametrize("row", [{"prompt": "2 + 3 ="}, {"nums": [2, 3], "target": 5}])
def test_sft_asks_for_targets_where_a_form_has_none(tmp_path, row):
    with pytest.raises(ConfigError, match=f"which has no targets; name them, such as sft.targets=.* with a column of {', '.join(row)}$"):
        of_rows(tmp_path, row, supervised=True)
    assert "sft.targets" not in of_rows(tmp_path, row, "sft.targets=[x]", supervised=True)


def test_conversations_of_which_some_end_with_the_assistant_need_no_targets(tmp_path):
    user, answer = {"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": [user, answer]}) + "\n" + json.dumps({"prompt": [user]}) + "\n")
    config = files.load(TINY, [f"data.path={path}"])
    assert recognise(config, {"data.path"}, True)[0]["data.template"] == "{prompt}"


@pytest.mark.parametrize("begin", ["", "\ufeff", "\n\n"])
def test_only_the_first_lines_of_a_file_are_read(tmp_path, begin):
    path = tmp_path / "rows.jsonl"
    path.write_text(begin + '{"a": 1}\n\n{"a": 2}\r\nno JSON\n')
    assert peek_rows(str(path), None, "train", 2) == [{"a": 1}, {"a": 2}]
    with pytest.raises(ConfigError, match=f"line {4 + 2 * (begin == chr(10) * 2)}, is not JSON"):
        peek_rows(str(path), None, "train", 3)
    path.write_text(begin + '[{"a": 1}, {"a": 2}, {"a": 3}]')
    assert peek_rows(str(path), None, "train", 2) == [{"a": 1}, {"a": 2}]


def many(name, folder, suffix):
    """A file with the rows of a fixture again and again."""
    rows = [json.loads(line) for line in Path(fixture(name)).read_text().splitlines()] * 6
    path = folder / f"{name}{suffix}"
    if suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name, suffix", [*((name, ".jsonl") for name in EXPECTED), ("verl", ".parquet"), ("trl_last_turn", ".parquet")])
def test_it_trains_two_steps_without_a_key(name, suffix, tmp_path, here):
    reward = EXPECTED[name][-1]
    if not can_run(reward):
        pytest.skip(f"the library of the reward {reward} is not installed")
    path = many(name, tmp_path, suffix)
    small = [*SHORT[1:], f"output_dir={tmp_path}", "name=form", "trainer.num_steps=2"]  # without evaluation.num_tasks
    done = here("train", "--config", "tiny", f"data.path={path}", *small)
    assert done.returncode == 0, done.stderr
    assert f"note: {path} has the form of {EXPECTED[name][0]}" in done.stdout
    rows = read(tmp_path / "form" / "metrics.jsonl")
    assert len(rows) == 2 and all(f"rewards/{reward}" in row for row in rows)
    first, last = read(tmp_path / "form" / "evaluation.jsonl")[0], read(tmp_path / "form" / "evaluation.jsonl")[-1]
    assert first["n"] == last["n"] == 1  # a tenth of the rows


def test_a_column_that_gets_our_name_keeps_its_own_which_functions_of_the_user_read(tmp_path):
    path = tmp_path / "trl.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} + 1 =", "solution": str(i + 1)}) + "\n" for i in range(12)))
    config = load_config(TINY, [f"data.path={path}", "evaluation.num_tasks=2"])
    tasks, _ = make_tasks(load_splits(config.data, 2)[0], config.data, load_tokenizer("builtin:tiny"))
    assert all(task.columns["solution"] == task.columns["answer"] for task in tasks) and len(tasks) == 10


# --- data.sources


def mix(*sources, words=(), supervised=False, config=TINY):
    """The configuration with several sources, and the lines about them."""
    notes = []
    word = f"data.sources={json.dumps([x if isinstance(x, dict) else {'path': x} for x in sources])}"
    return files.load(config, [word, *words], supervised=supervised, recognise=recognise, notify=notes.append), notes


def test_sources_that_name_nothing_but_path_name_and_weight_have_their_forms():
    plain = {"path": fixture("gsm8k"), "name": "own", "template": "Q: {question}"}
    config, notes = mix({"path": fixture("gsm8k"), "weight": 3}, fixture("trl_text_solution"), {"path": fixture("verl_countdown"), "name": "count"}, plain)
    first, second, third, fourth = config.data.sources
    size = notes.pop()
    assert (first.template, first.prompt, first.weight, first.eval_reward, first.rewards) == ("{question}", "chat", 3, "correct_answer", [RewardConfig("correct_answer")])
    assert (second.template, second.prompt, renamed(second.columns)) == ("{prompt}", "template", {"answer": "solution"})
    assert [x.name for x in third.rewards] == ["countdown"] and third.eval_reward == "countdown" and third.columns["nums"] == f"{TRUTH}.numbers"
    assert (fourth.template, fourth.prompt, fourth.rewards) == ("Q: {question}", None, [])
    assert [note.split(" has the form of ")[1].split(" (")[0] for note in notes] == ["GSM8K", "TRL", "Countdown in verl's form"]
    assert notes[0].startswith(f"data.sources[0] (gsm8k): {fixture('gsm8k')} has") and f"rewards [correct_answer] (not {OF_TINY})" in notes[0]
    assert config.data.max_prompt_tokens == 512 and "num_tasks" not in str(notes)
    assert size == "the source count is small, which sets evaluation.num_tasks 1 (not 500)" and config.evaluation.num_tasks == 1
    assert [config.of_source(name).data.prompt for name in config.source_names] == ["chat", "template", "chat", "template"]


def test_the_configuration_of_sources_that_is_written_repeats_the_run(tmp_path):
    config, _ = mix(fixture("gsm8k"), fixture("verl"))
    (tmp_path / "config.yaml").write_text(files.dump(config))
    notes = []
    assert files.load(tmp_path / "config.yaml", recognise=recognise, notify=notes.append) == config and notes == []


def test_other_words_win_over_the_forms_of_sources(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: tiny\ndata: {system: Be brief., prompt: chat, sources: [builtin:word_problems]}\n")
    config, _ = mix(fixture("gsm8k"), words=["rewards=think_format", "data.template={question}!", "data.sources[0].weight=2"], config=tmp_path / "mine.yaml")
    (source,) = config.data.sources
    assert (source.rewards, source.template, source.weight, source.system, source.eval_reward) == ([], None, 2, None, "correct_answer")
    config, _ = mix(fixture("gsm8k"), config=tmp_path / "mine.yaml")
    assert config.data.sources[0].system == "" and config.of_source("gsm8k").data.system == ""
    config = files.load(tmp_path / "mine.yaml", [], recognise=recognise)
    assert config.data.sources[0].template is None


def test_a_source_that_does_not_say_how_it_is_scored_is_named():
    with pytest.raises(ConfigError, match=r"^data.sources\[1\] \(trl_prompt\): data.path is .*; name the rewards, such as"):
        mix(fixture("gsm8k"), fixture("trl_prompt"))
    config, _ = mix(fixture("gsm8k"), fixture("trl_prompt"), words=["rewards=think_format", "evaluation.reward=think_format"])
    assert config.data.sources[1].template == "{prompt}" and config.evaluation.num_tasks == 1


def test_sft_has_one_target_for_all_sources():
    sft = ROOT / "configs" / "tiny_sft.yaml"
    config, _ = mix(fixture("gsm8k"), fixture("trl_text_solution"), supervised=True, config=sft)
    assert [target.template for target in config.sft.targets] == ["{answer}"] and config.data.sources[1].rewards == []
    with pytest.raises(ConfigError, match=r"data.sources have forms with several targets, {answer}, {solution}; sft trains"):
        mix(fixture("gsm8k"), fixture("open_r1"), supervised=True, words=["evaluation.reward=text_match"], config=sft)


def test_the_tasks_of_sources_in_forms_are_made_each_in_its_way():
    config, _ = mix(fixture("gsm8k"), fixture("trl_text_solution"), words=["evaluation.num_tasks=1"])
    tasks, _, _, _ = read_tasks(config, load_tokenizer("builtin:tiny"))
    first = {task.source: task for task in reversed(tasks)}
    assert [first[name].prompt.count("Question: ") for name in ("gsm8k", "trl_text_solution")] == [1, 1]  # the second has its own


USER, ASSISTANT = {"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "#### 5"}
GOOD = {  # a row of a form -> what may be wrong with another
    "conversations": ({"messages": [USER, ASSISTANT]}, [{"messages": []}, {"messages": None}, {"messages": "a"}, {"messages": [None, ASSISTANT]}, {"messages": [USER]}, {"other": 1}]),
    "verl": ({"data_source": "x", "prompt": [USER], "reward_model": {"ground_truth": "5"}}, [{"data_source": "x", "prompt": None, "reward_model": {"ground_truth": "5"}}, {"other": 1}]),
    "TRL": ({"prompt": [USER], "solution": "5"}, [{"prompt": None, "solution": "5"}, {}]),
    "GSM8K": ({"question": "2 + 3?", "answer": "#### 5"}, [{"question": None, "answer": "#### 5"}, {"question": "2 + 3?", "answer": None}]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_faulty_rows_do_not_hide_the_form_of_the_others(name, tmp_path):
    good, faults = GOOD[name]
    path = tmp_path / "rows.jsonl"
    for fault in faults:
        for rows in ([good, fault, good], [fault, good, good]):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            keys, sentence = recognise(files.load(TINY, [f"data.path={path}"]), {"data.path"})
            assert keys["rewards"] == ["correct_answer"] and f"has the form of {name} " in sentence
            assert sentence.endswith("; 1 of its first 3 rows does not have it"), (fault, sentence)
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, fault)))  # as many as the others
    assert "rewards" not in recognise(files.load(TINY, [f"data.path={path}"]), {"data.path"})[0]


def test_a_faulty_row_of_a_form_is_named_or_left_out(tmp_path):
    path, tokenizer = tmp_path / "rows.jsonl", load_tokenizer("builtin:tiny")
    for fault in GOOD["conversations"][1][:4]:
        rows = [GOOD["conversations"][0], fault, GOOD["conversations"][0]]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ConfigError, match=r"row 2 .*data.bad_rows: drop"):
            read_tasks(load_config(TINY, [f"data.path={path}", "evaluation.num_tasks=0"]), tokenizer)


def test_gold_answers_of_which_few_are_words_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [USER, ASSISTANT]}] * 3 + [{"messages": [USER, {"role": "assistant", "content": "none"}]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=r"; 1 of its first 4 gold answers is no number, such as 'none'; .* rewards=correct_answer evaluation.reward=correct_answer data.bad_rows=drop$"):
        recognise(files.load(TINY, [f"data.path={path}"]), {"data.path"})
