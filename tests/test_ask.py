"""The `sample` command."""

import builtins

import pytest
from fakes import tiny_policy

from grpo_core.cli import main
from grpo_core.commands.sample import AnswerSettings, TokenPrinter, apply_command, format_columns
from grpo_core.model.loading import load_tokenizer
from grpo_core.sampling.live_rows import PaddedRows
from grpo_core.sampling.sampler import Sampler
from grpo_core.schema import ConfigError

QUESTION = "Ada has 12 pens. Ada buys 4 more and gives 5 away. How many pens are left?"
pytestmark = pytest.mark.slow


def test_one_answer_is_streamed_and_scored(tiny_run, capsys, monkeypatch):
    watched = []
    append = PaddedRows.append
    monkeypatch.setattr(
        PaddedRows, "append", lambda *given: (watched.append(capsys.readouterr().out), append(*given))[1]
    )
    assert main(["sample", str(tiny_run), QUESTION, "--answer", "11"]) == 0
    rest = capsys.readouterr().out
    text = "".join(watched) + rest
    assert "[" in rest and len([piece for piece in watched if piece]) > 3  # it came piece by piece
    answer, notes = text.rsplit("\n[", 1)
    assert "tokens; correct_answer " in notes and f"has_think_tags {int('</think>' in answer)}]" in notes


def test_what_is_streamed_is_what_is_sampled(tiny_run, capsys):
    from grpo_core.commands.open_policy import open_source

    opened = open_source(str(tiny_run))
    task = __import__("grpo_core.commands.sample", fromlist=["make_task"]).make_task(opened, QUESTION, AnswerSettings())
    plain = opened.sampler.generate([task], 1, greedy=True).completions[0]
    pieces = []
    watch = TokenPrinter(opened.tokenizer, opened.sampler.eos_ids, pieces.append)
    assert opened.sampler.generate([task], 1, greedy=True, watch=watch).completions[0] == plain
    assert "".join(pieces) + watch.rest() == plain and len(pieces) > 3
    count = len(pieces)
    opened.sampler.generate([task], 1, greedy=True)
    assert len(pieces) == count  # the next call is not watched


def test_several_side_by_side_and_without_the_adapter(tiny_run, capsys):
    assert main(["sample", str(tiny_run), QUESTION, "-n", "3", "--answer", "11"]) == 0
    out = capsys.readouterr().out
    assert all(f"({i})" in out for i in (1, 2, 3)) and out.count("correct_answer ") == 3
    assert main(["sample", str(tiny_run), QUESTION, "-n", "3", "--answer", "11"]) == 0
    assert capsys.readouterr().out == out  # a function of the seed
    assert main(["sample", str(tiny_run), QUESTION, "-n", "3", "--answer", "11", "--seed", "1"]) == 0
    assert capsys.readouterr().out != out
    assert main(["sample", str(tiny_run), QUESTION, "--base"]) == 0
    base = capsys.readouterr().out
    assert main(["sample", "builtin:tiny", QUESTION]) == 0
    assert base.split("\n[")[0] == capsys.readouterr().out.split("\n[")[0]
    assert "correct_answer not computed: it needs the column answer" in base
    assert main(["sample", "builtin:tiny", QUESTION, "--base"]) == 2
    assert "builtin:tiny has no adapter to switch off" in capsys.readouterr().err


def test_the_prompt_loop(tiny_run, capsys, monkeypatch):
    lines = iter(
        [
            "",
            QUESTION,
            "/adapter off",
            QUESTION,
            "/n 2",
            "/n 0",
            "/what",
            "/temperature 0.7",
            QUESTION,
            "/quit",
            "never",
        ]
    )
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    assert main(["sample", str(tiny_run)]) == 0
    out = capsys.readouterr().out
    assert "adapter off, n 1, greedy, answer not set" in out and "adapter off, n 2, temperature 0.7" in out
    assert (
        "/n is '0'; it must be a whole number from 1 up" in out
        and "unknown command /what; /help lists" in out
        and next(lines) == "never"
    )
    assert "(2)" in out


def test_ctrl_c_ends_an_answer_and_not_the_prompt(tiny_run, capsys, monkeypatch):
    def lines(prompt):
        line = given.pop(0)
        if line is not str:
            return line
        raise KeyboardInterrupt

    given = [str, QUESTION, "/n 2", "quit", "never"]
    asked = []

    def ask(*what):
        asked.append(what)
        raise KeyboardInterrupt

    monkeypatch.setattr(builtins, "input", lines)
    monkeypatch.setattr("grpo_core.commands.sample.answer_question", ask)
    assert main(["sample", str(tiny_run)]) == 0
    out = capsys.readouterr().out
    assert len(asked) == 1 and given == ["never"] and out.count("/quit or Ctrl-D leaves") == 2 and "n 2" in out


def test_a_question_of_nothing_is_refused(capsys):
    assert main(["sample", "builtin:tiny", " "]) == 2
    assert "the question is empty" in capsys.readouterr().err


def test_a_character_of_several_tokens_is_shown_whole():
    tokenizer, pieces = load_tokenizer("builtin:tiny"), []
    text = "a 日本 é"
    stream = TokenPrinter(tokenizer, [1], pieces.append)
    for token in tokenizer(text)["input_ids"]:
        stream([0], [token])
    assert "".join(pieces) + stream.rest() == text and "�" not in "".join(pieces)
    for token in tokenizer("\x1b[2J")["input_ids"]:  # what moves the cursor is shown as an escape
        stream([0], [token])
    assert "".join(pieces).endswith("\\x1b[2J")


def test_columns_fit_the_width():
    text = format_columns(["one two three four five six seven " * 4, "b\n\nc", "d"], [["x"], ["y"], ["z"]], 70)
    assert (
        max(map(len, text.splitlines())) <= 70 and text.splitlines()[0].split() == ["(1)", "|", "(2)"] and "(3)" in text
    )
    assert (
        " ".join(line.split("|")[0].strip() for line in text.split("-" * 70)[0].splitlines()[3:]).split()
        == ("one two three four five six seven " * 4).split()
    )


@pytest.mark.parametrize("line", ["/n x", "/n", "/temperature hot", "/temperature -1", "/adapter maybe"])
def test_commands_that_mean_nothing(line):
    with pytest.raises(ConfigError):
        apply_command(AnswerSettings(), line)


def test_watching_several_rows_tells_each_token_once():
    from fakes import Alphabet, FixedTasks

    policy, seen = tiny_policy(), {}
    sampler = Sampler(policy.causal_lm, Alphabet(), max_new_tokens=6)

    def watch(rows, tokens):
        for row, token in zip(rows, tokens, strict=True):
            seen.setdefault(row, []).append(token)

    rollouts = sampler.generate(FixedTasks().batch(0), 2, watch=watch)
    for row, (ids, mask) in enumerate(zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)):
        assert seen[row] == ids[mask].tolist()


def test_an_answer_to_the_template_of_the_first_source_has_the_rewards_of_that_source(capsys):
    first = '{path: builtin:word_problems, name: a, rewards: [{name: correct_answer, args: {strict: true}}]}'
    second = '{path: builtin:word_problems, name: b, split: test}'
    for sources, rewards in (([first, second], ["correct_answer"]), ([second, first], ["correct_answer", "has_think_tags"])):
        words = ["rewards=[correct_answer, has_think_tags]", f"data.sources=[{', '.join(sources)}]", "evaluation.num_tasks=0", "sampling.max_new_tokens=4"]
        assert main(["sample", "builtin:tiny", QUESTION, "--answer", "11", *words]) == 0
        notes = capsys.readouterr().out.rsplit("\n[", 1)[1].rstrip("]\n").split("; ")[1:]
        assert [note.split()[0] for note in notes] == rewards
