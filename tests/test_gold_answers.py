"""Gold answers that a reward cannot judge are counted before training (FAULTS T7, N10, 17)."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from grpo_core.batch import Task
from grpo_core.commands import evaluate
from grpo_core.config.sections import DataConfig, EvaluationConfig, RewardConfig, RunConfig
from grpo_core.model.loading import load_tokenizer
from grpo_core.schema import ConfigError
from grpo_core.training.gold_answers import check_gold_answers, drop_unjudged


def tasks_of(answers):
    return [Task(i, "p", [1], {"answer": answer}) for i, answer in enumerate(answers)]


MOSTLY_NUMBERS = ["1"] * 96 + [r"2\sqrt{3}", "a dozen", "3, 4", "10:30"]


def test_t7_answers_that_cannot_be_judged_are_counted_and_three_are_shown():
    (sentence,) = check_gold_answers(RunConfig(), tasks_of(MOSTLY_NUMBERS), [])
    assert sentence == (
        "reward correct_answer cannot judge 4 of 100 values of the column 'answer' in the training data, builtin:word_problems (train): row 97 "
        r"'2\\sqrt{3}', row 98 'a dozen', row 99 '3, 4'; they are left out of this reward"
    )
    assert check_gold_answers(RunConfig(), tasks_of(["1", "#### 2"]), tasks_of(["3"])) == []


def test_t7_above_the_share_the_run_is_refused_unless_a_key_accepts_it():
    tasks = tasks_of(["1"] * 9 + ["a dozen"])
    with pytest.raises(ConfigError, match=r"cannot judge 1 of 10 .* row 10 'a dozen'; use a reward that can .*data.max_unjudged \(0.05\)"):
        check_gold_answers(RunConfig(), tasks, [])
    assert check_gold_answers(RunConfig(data=DataConfig(max_unjudged=0.1)), tasks, [])
    assert check_gold_answers(RunConfig(rewards=[RewardConfig("text_match")]), tasks, []) == []


def test_t7_a_reward_is_asked_with_its_arguments_and_a_users_reward_too(tmp_path):
    config = RunConfig(rewards=[RewardConfig("choice_match", args={"letters": "XY"})])
    assert check_gold_answers(config, tasks_of(["X", "Y"]), []) == []
    with pytest.raises(ConfigError, match="reward choice_match cannot judge 1 of 2"):
        check_gold_answers(config, tasks_of(["X", "A"]), [])
    (tmp_path / "mine.py").write_text(
        "def mine(completions, answer):\n    return [1.0] * len(completions)\n"
        "mine.gold = {'answer': lambda value: value if value.isupper() else None}\n"
    )
    config = RunConfig(rewards=[RewardConfig(f"{tmp_path}/mine.py:mine")])
    assert check_gold_answers(config, tasks_of(["A"]), []) == []
    with pytest.raises(ConfigError, match="mine cannot judge 1 of 1"):
        check_gold_answers(config, tasks_of(["a"]), [])


def test_n10_an_evaluation_that_cannot_judge_is_refused_before_training():
    config = RunConfig(rewards=[RewardConfig("think_format")])
    texts = tasks_of(["Paris", "Rome"])
    with pytest.raises(ConfigError, match="evaluation.reward correct_answer cannot judge 2 of 2 .*set evaluation.reward to one that can, such as think_format"):
        check_gold_answers(config, texts, texts)
    assert check_gold_answers(replace(config, evaluation=EvaluationConfig(reward="text_match")), texts, texts) == []
    assert check_gold_answers(config, texts, []) == []


@pytest.mark.parametrize("eval_path", [None, "eval.jsonl"])
def test_attack_9_the_sentence_names_the_file(tmp_path, eval_path):
    train = tmp_path / "train.jsonl"
    train.write_text("")
    other = eval_path and str(tmp_path / eval_path)
    if other:
        (tmp_path / eval_path).write_text("")
    texts = tasks_of(["Paris", "Rome"])
    config = RunConfig(data=DataConfig(path=str(train), eval_path=other))
    with pytest.raises(ConfigError, match=f"2 of 2 values of the column 'answer' in the training data, {train}: row 1 'Paris'"):
        check_gold_answers(config, texts, [])
    for judged in (0.05, 1.0):
        config = replace(config, data=replace(config.data, max_unjudged=judged))
        try:
            (sentence,) = check_gold_answers(config, [], texts)
        except ConfigError as error:
            sentence = str(error)
        assert f"of the column 'answer' in the evaluation data, {other or train}: row 1 'Paris'" in sentence


def test_attack_9_evaluate_names_the_data_that_it_was_given(tmp_path, monkeypatch):
    """The data of --data or --set, and not those of the run."""
    given = tmp_path / "given.jsonl"
    given.write_text('{"question": "Where?", "answer": "Paris"}\n' * 3)
    opened = SimpleNamespace(config=RunConfig(), tokenizer=load_tokenizer("builtin:tiny"), folder=None, steps=None)
    monkeypatch.setattr(evaluate, "open_source", lambda *arguments, **options: opened)
    with pytest.raises(ConfigError, match=f"cannot judge 3 of 3 values of the column 'answer' in the evaluation data, {given}: row 1"):
        evaluate.run_evaluate("builtin:tiny", data=str(given))
    given.write_text('{"question": "Where?", "town": "Paris"}\n' * 3)
    with pytest.raises(ConfigError, match=f"needs the column 'answer', but the data has only the columns question, town; the data is {given}"):
        evaluate.run_evaluate("builtin:tiny", data=str(given))


def test_bad_rows_drop_leaves_out_what_no_reward_can_judge_and_counts_it():
    """A row stays if one of the rewards with a gold answer can judge it; the evaluation has its own reward."""
    tasks, evaluated = tasks_of(["1", "a dozen", None, "2"]), tasks_of(["x", "3"])
    config = RunConfig(data=DataConfig(bad_rows="drop"), rewards=[RewardConfig("correct_answer"), RewardConfig("think_format")])
    train, held_out, sentences = drop_unjudged(config, tasks, evaluated)
    assert [task.index for task in train] == [0, 3] and [task.index for task in held_out] == [1]
    assert sentences == [
        "2 rows are left out of 4 rows of the training data, because data.bad_rows is drop and no reward can judge the gold answer: row 2, row 3",
        "1 row is left out of 2 rows of the evaluation data, because data.bad_rows is drop and no reward can judge the gold answer: row 1",
    ]
    assert check_gold_answers(config, train, held_out) == []
    both = replace(config, rewards=[RewardConfig("correct_answer"), RewardConfig("text_match")])
    assert [task.index for task in drop_unjudged(both, tasks, [])[0]] == [0, 1, 3]
    formats = replace(config, rewards=[RewardConfig("think_format")])
    assert drop_unjudged(formats, tasks, [])[0] == tasks


def test_without_bad_rows_drop_and_where_nothing_would_be_left_all_tasks_stay():
    tasks = tasks_of(["1", "a dozen"])
    assert drop_unjudged(RunConfig(), tasks, tasks) == (tasks, tasks, [])
    none = tasks_of(["a dozen", None])
    assert drop_unjudged(RunConfig(data=DataConfig(bad_rows="drop")), none, []) == (none, [], [])
