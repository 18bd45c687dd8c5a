"""The report of a run whose completions have several turns."""

import json

import pytest
import test_report_browser as browser
from test_report import lines, made_run, page_of, records

from grpo_core.report.panels import PANELS
from grpo_core.report.turns import cut_turns, place_turns

PROMPT = "Which is larger, 3 * 4 or 10?"
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "\U0001f600 3 * 4"}}\n</tool_call>'
MARKERS = ["<|im_end|>\n<|im_start|>tool\n", "<|im_end|>\n<|im_start|>assistant\n"]


def turn(text, start, answer=None, reward=None, ended_by="eos", calls=0, errors=0):
    return {"text": text, "ended_by": ended_by, "answer": answer, "reward": reward, "start": start, "calls": calls, "errors": errors}  # fmt: skip


def chat_row(**changes):
    """Two calls of a tool, the second with an error, and a turn without one."""
    drawn, answers = [f"I look. {CALL}", CALL, "12 is larger."], ["12\nis 3 * 4", "error: no such thing"]
    text, turns = "", []
    for i, part in enumerate(drawn):
        is_last = i == 2
        turns.append(turn(part, len(text), None if is_last else answers[i], [0.5, None, -1.0][i], calls=int(not is_last), errors=i % 2))
        text += part + ("" if is_last else answers[i].join(MARKERS))
    return {"text": text, "turns": turns, "tool_calls": 2, "given_tokens": 30, "environment_failure": None, **changes}


def plain_row():
    turns = [turn("3*4 =", 0, " 12", ended_by="stop"), turn("\n#### 12", 8, ended_by="turn_limit")]
    return {"text": "3*4 = 12\n#### 12", "turns": turns, "tool_calls": 0, "given_tokens": 1, "environment_failure": "raised X"}


def made_run_with_turns(folder):
    run = made_run(folder)
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    rows = [row | (plain_row() if row["sample"] else chat_row()) | {"prompt": PROMPT} for row in rows]
    (run / "completions.jsonl").write_text(lines(rows))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = {"turns": 2.5, "given_tokens": 10.0, "tool_calls": 1.0, "tool_errors": 0.5, "cut_answers": 0.0, "answers_without_room": 0.0}
    (run / "metrics.jsonl").write_text(lines([row | numbers | {"environment_failures": row["step"] / 10} for row in metrics]))
    answers = [{"step": step, "task": 3, "prompt": PROMPT, "correct": bool(step), **chat_row()} for step in (0, 6)]
    (run / "evaluation_completions.jsonl").write_text(lines(answers))
    for file in (run / "batches").iterdir():
        dump = json.loads(file.read_text())
        for row in dump["completions"]:
            row |= {"tokens": ["3*4", " =", " 12", "\n"], "logprobs": [-0.1, -2.0, None, -0.3], "ratio": [1.1, 0.9, None, 1.0]}
            row |= {"turns": [0, 0, -1, 1], "advantages": [1.0, 1.0, 0.0, -1.0]}
        file.write_text(json.dumps(dump))
    return run


def parts(text, turns):
    """The drawn and the given stretches, cut as a browser cuts them."""
    units, start, out = text.encode("utf-16-le"), 0, []
    for drawn, given, *_ in turns:
        out += [units[2 * start : 2 * drawn].decode("utf-16-le"), units[2 * drawn : 2 * given].decode("utf-16-le")]
        start = given
    return out


def test_stretches_of_a_text_are_what_was_drawn_and_what_was_given():
    row = chat_row()
    text, turns = place_turns(row)
    assert text == row["text"] and parts(text, turns)[::2] == [turn["text"] for turn in row["turns"]]
    assert parts(text, turns)[1::2] == ["12\nis 3 * 4".join(MARKERS), "error: no such thing".join(MARKERS), ""]
    assert [rest for _, _, *rest in turns] == [[0.5, "eos", 1, 0, "12\nis 3 * 4"], [None, "eos", 1, 1, "error: no such thing"], [-1.0, "eos"]]


@pytest.mark.parametrize("change", [{"text": "other"}, {"text": None}, {"turns": [{**part, "start": None} for part in chat_row()["turns"]]}])
def test_turns_that_do_not_stand_in_the_text_replace_it(change):
    row = chat_row(**change)
    text, turns = place_turns(row)
    assert parts(text, turns)[::2] == [turn["text"] for turn in row["turns"]]
    assert parts(text, turns)[1::2] == ["12\nis 3 * 4", "error: no such thing", ""] and "".join(parts(text, turns)) == text


@pytest.mark.parametrize("turns", [None, [], "x", [1], [{"text": 3}]])
def test_without_turns_the_text_is_as_it_was(turns):
    assert place_turns({"text": "a", "turns": turns}) == ("a", None)


def test_turns_of_a_text_that_was_cut_end_with_it():
    text, turns = place_turns(plain_row())
    assert [place for part in cut_turns(turns, text[:3]) for place in part[:2]] == [3, 3]
    assert [place for part in cut_turns(turns, text[:12]) for place in part[:2]] == [5, 8, 12, 12]
    assert cut_turns(None, "a") is None


def test_rows_panels_tokens_and_answers_have_turns(tmp_path):
    page = page_of(made_run_with_turns(tmp_path / "a"))
    data, (completions,) = page.json("report-data"), page.json("completion-data")
    first, second = records(completions)[:2]
    assert first["text"] == chat_row()["text"] and first["turns"] == place_turns(chat_row())[1]
    assert (second["given_tokens"], second["failure"], first["failure"]) == (1, "raised X", None)
    panels = {panel["id"]: panel["metrics"] for panel in data["panels"]}
    assert panels["turns"] == ["turns"] and panels["given"] == ["given_tokens"] and panels["tools"] == ["tool_calls", "tool_errors"]
    assert panels["environment"] == ["environment_failures", "cut_answers", "answers_without_room"]
    assert {"turns", "given", "tools", "environment", "echo"} <= {panel.id for panel in PANELS}
    assert not [panel for panel in panels.values() if panel == ["mine"]] or "other-0" in panels
    assert completions["tokens"][0] == {
        "tokens": ["3*4", " =", " 12", "\n"], "logprobs": [-0.1, -2, None, -0.3], "ratio": [1.1, 0.9, None, 1],
        "turns": [0, 0, -1, 1], "advantages": [1, 1, 0, -1],
    }  # fmt: skip
    (answer,) = data["runs"][0]["answers"]
    assert answer["turns"] == [first["turns"]] * 2


def test_a_run_of_one_turn_has_none_of_it(tmp_path):
    page = page_of(made_run(tmp_path / "a"))
    data, (completions,) = page.json("report-data"), page.json("completion-data")
    assert {(row["turns"], row["failure"]) for row in records(completions)} == {(None, None)}
    assert not {"turns", "given", "tools", "environment", "echo"} & {panel["id"] for panel in data["panels"]}
    assert completions["tokens"][0].keys() == {"tokens", "logprobs", "ratio"}


DRIVER = r"""
addEventListener("load", () => setTimeout(async () => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const pause = () => new Promise((go) => setTimeout(go, 300));
  const seen = {};
  all(".list .completion").slice(0, 2).forEach((row) => { row.open = true; });
  await pause();
  const [chat, plain] = all(".list .turns");
  seen.drawn = [...chat.children].map((part) => part.className);
  seen.folded = [...chat.querySelectorAll("details")].map((part) => [part.open, part.querySelector("summary").textContent, part.querySelector(".given").className]);
  seen.notes = [...chat.querySelectorAll(".turn"), ...plain.querySelectorAll(".turn")].map((part) => part.textContent);
  seen.plain = [...plain.children].map((part) => [part.className, part.textContent]).slice(1, 4);
  seen.facts = plain.closest(".full").querySelector(".facts").textContent;
  const form = document.querySelector(".filters");
  form.elements.failed.value = "true";
  form.dispatchEvent(new Event("input"));
  await pause();
  seen.failed = document.querySelector(".found").textContent;
  form.reset();
  form.elements.tokens.value = "true";
  form.elements.query.value = "no such THING";
  form.dispatchEvent(new Event("input"));
  await pause();
  document.querySelector(".list .completion").open = true;
  await pause();
  seen.opened = all(".list .turns details").map((part) => part.open);
  const tokens = all(".tokens span");
  seen.tokens = tokens.map((part) => part.className);
  tokens[2].click();
  seen.said = document.querySelector(".token-said").textContent;
  seen.legend = document.querySelector(".token-legend").textContent;
  seen.answers = all("#answers .turns").length;
  document.documentElement.dataset.seen = JSON.stringify(seen);
}, 300));
"""


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_turns_and_folds_calls(tmp_path, monkeypatch):
    seen = browser.TestBrowser().driven(tmp_path, monkeypatch, DRIVER, made_run_with_turns(tmp_path / "a"))
    assert seen["drawn"] == ["turn c0", "drawn c0", "call", "turn c1", "drawn c1", "call", "turn c2", "drawn c2"]
    (open_1, said_1, given_1), (open_2, said_2, _) = seen["folded"]
    assert not open_1 and not open_2 and given_1 == "given block" and said_2.startswith("1 tool call, 1 error: ")
    assert said_1.startswith('1 tool call: {"name": "search"') and said_1.endswith("\u2192 12 is 3 * 4")
    assert seen["notes"] == ["turn 1, reward +0.5", "turn 2", "turn 3, reward \u22121", "turn 1", "turn 2, cut at the turn's limit"]
    assert seen["plain"] == [["drawn c0", "3*4 ="], ["given", " 12"], ["turn c1", "turn 2, cut at the turn's limit"]]
    assert "given tokens1" in seen["facts"] and "the environmentraised X" in seen["facts"]
    assert seen["failed"] == "36 of 48 completions match"
    assert seen["opened"] == [False, True] and seen["tokens"] == ["up2", "up2 against", "given", "down2"]
    assert seen["said"] == 'Token 3 of 4 " 12": given by the environment, not trained' and "given by the environment" in seen["legend"]
    assert seen["answers"] == 2
