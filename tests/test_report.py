"""The report: what is in it, what does not get into it."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from grpo_core.config.files import dump, load
from grpo_core.report import report
from grpo_core.report.completions import COLUMNS, sample_completions
from grpo_core.report.panels import PANELS, choose_panels, collect_curves
from grpo_core.report.report import write_report
from grpo_core.report.run_reader import find_batches, read_run, read_settings
from grpo_core.report.summary import compare_settings, find_accuracies, format_duration, summarize_run, title_means
from grpo_core.report.whole_files import write_whole
from grpo_core.schema import ConfigError

ROOT = Path(__file__).parents[1]
EVIL = "</script><img src=https://example.org/x onerror=alert(1)><!-- {{data}} \x1b[31m \u202e \ud800 \u2028 `|`"


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def made_run(folder, steps=6, group=4, text="#### {}", **overrides):
    """A run folder as the trainer writes it, small: two groups a step, a null now and then, one dumped batch."""
    folder.mkdir(parents=True)
    config = load(
        ROOT / "configs" / "tiny.yaml", [f"{k}={v}" for k, v in {"trainer.num_steps": steps, **overrides}.items()]
    )
    (folder / "config.yaml").write_text(dump(replace(config, name=folder.name)))
    metrics = [
        {
            "step": i, "reward": i / 10, "reward_std": 0.5, "rewards/correct_answer": i / 10, "rewards/correct_answer_std": 0.5,
            "kl": 0.001 * i, "ratio": None if i == 2 else 1.0, "clip_frac": 0.0, "entropy": 1.0, "length": 20.0, "length_max": 48.0,
            "truncated": 0.25, "tied_groups": 0.5, "loss": 0.0, "logprob_gap": 1e-6, "grad_norm": 0.1, "learning_rate": 1e-3,
            "adapter_norm": 1.0 + i, "skipped": 0, "tokens": 100.0, "seconds": 3.0, "seconds/sample": 1.0, "seconds/update": 1.5,
            "tokens_per_second": 33.0, "peak_memory_gb": 0.5, "mine": i * 1.5,
        }
        for i in range(steps)
    ]  # fmt: skip
    completions = [
        {
            "step": i, "task": 10 * i + k // group, "sample": k % group, "prompt": f"Question {10 * i + k // group}?\n",
            "text": text.format(k), "rewards": {"correct_answer": float(k == 1), "mine.py:f": None}, "reward": float(k == 1),
            "advantage": 1.5 if k == 1 else -0.5, "length": 3, "truncated": k == 2,
        }
        for i in range(steps)
        for k in range(2 * group)
    ]  # fmt: skip
    evaluations = [
        {"step": 0, "accuracy": 0.152, "correct": 76, "n": 500, "ci_low": 0.123, "ci_high": 0.186},
        {"step": steps, "accuracy": 0.758, "correct": 379, "n": 500, "ci_low": 0.719, "ci_high": 0.793},
    ]
    (folder / "metrics.jsonl").write_text(lines(metrics))
    (folder / "completions.jsonl").write_text(lines(completions))
    (folder / "evaluation.jsonl").write_text(lines(evaluations))
    tokens = {"tokens": ["####", " ", "1"], "logprobs": [-0.1, -0.2, -2.0], "ratio": [1.0, 0.9, 1.31234567]}
    dumped = [
        {"task": row["task"], "sample": row["sample"], "advantage": row["advantage"], **tokens}
        for row in completions
        if row["step"] == 2
    ]
    (folder / "batches").mkdir()
    for rank in (0, 1):
        part = {
            "step": 2,
            "rank": rank,
            "row": {"reward": None},
            "completions": dumped[rank * group : (rank + 1) * group],
        }
        (folder / "batches" / f"step-000002-rank-{rank}.json").write_text(json.dumps(part))
    return folder


class Page(HTMLParser):
    """The elements of a page, and the text of its scripts by id."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self._open = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open = dict(attributes).get("id", "program") if tag == "script" else None

    def handle_endtag(self, tag):
        self._open = None if tag == "script" else self._open

    def handle_data(self, data):
        if self._open:
            self.scripts[self._open] = self.scripts.get(self._open, "") + data

    def json(self, name):
        return json.loads(self.scripts[name])


def page_of(*folders, output=None):
    return Page(write_report(list(folders), output)[0].read_text(encoding="utf-8"))


def records(found):
    return [dict(zip(COLUMNS, row, strict=True)) for row in found["rows"]]


# What is in it


def test_one_run(tmp_path):
    run = made_run(tmp_path / "a")
    written = write_report([run])
    assert written == [run / "report.html", run / "report.md"]
    page = Page(written[0].read_text(encoding="utf-8"))
    data, (found,) = page.json("report-data"), page.json("completion-data")
    (shown,) = data["runs"]
    assert shown["summary"]["Accuracy before"] == "15.2 % (12.3 to 18.6) after 0 steps; 76 of 500"
    assert shown["summary"]["Accuracy after"] == "75.8 % (71.9 to 79.3) after 6 steps; 379 of 500"
    assert shown["summary"]["Steps"] == "6 of 6"
    assert shown["summary"]["Completions"] == "48"
    assert shown["summary"]["Tokens"] == "600"
    assert shown["summary"]["Time"] == "18.0 s"
    assert shown["final"]["Reward"] == "0.25"  # (0 + ... + 0.5) / 6
    assert shown["objective"].startswith("loss       sum over tokens of (L + 0.01 KL) * weight")
    assert shown["config"] == (run / "config.yaml").read_text()
    assert shown["curves"]["reward"] == {"x": [0, 1, 2, 3, 4, 5], "y": [0, 0.1, 0.2, 0.3, 0.4, 0.5]}
    assert shown["curves"]["ratio"]["y"] == [1, 1, None, 1, 1, 1]
    assert shown["curves"]["seconds/other"]["y"] == [0.5] * 6
    panels = {panel["id"]: panel["metrics"] for panel in data["panels"]}
    assert panels["reward"] == ["reward"] and panels["rewards"] == ["rewards/correct_answer"]
    assert panels["time"] == ["seconds/sample", "seconds/update", "seconds/other"]
    assert panels["other-0"] == ["mine"]  # what no panel names is drawn too
    assert "skipped" not in panels and "mfu" not in panels  # nothing happened, nothing measured
    assert (found["total"], found["total_steps"], len(found["rows"])) == (48, 6, 48)
    assert found["correct_by"] == "correct_answer" and found["names"] == ["correct_answer", "mine.py:f"]
    second = records(found)[1]
    assert (second["step"], second["task"], second["sample"], second["text"]) == (0, 0, 1, "#### 1")
    assert (second["rewards"], second["reward"], second["advantage"]) == ([1, None], 1, 1.5)
    assert found["prompts"][records(found)[9]["prompt"]] == "Question 10?\n" and len(found["prompts"]) == 12


def test_tokens_of_all_ranks_belong_to_their_completions(tmp_path):
    found = sample_completions(read_run(made_run(tmp_path / "a")), 10**6)
    dumped = [row for row in records(found) if row["tokens"] is not None]
    assert [(row["step"], row["task"], row["sample"]) for row in dumped] == [(2, 20 + k // 4, k % 4) for k in range(8)]
    assert len({row["tokens"] for row in dumped}) == len(found["tokens"]) == 8
    assert found["tokens"][0] == {
        "tokens": ["####", " ", "1"],
        "logprobs": [-0.1, -0.2, -2.0],
        "ratio": [1.0, 0.9, 1.3123],
    }


def test_dumped_batches_alone_have_their_text_from_the_tokens(tmp_path):
    run = made_run(tmp_path / "a")
    (run / "completions.jsonl").unlink()
    found = sample_completions(read_run(run), 10**6)
    assert [row["text"] for row in records(found)] == ["#### 1"] * 8 and found["total"] == 8
    assert [row["advantage"] for row in records(found)][:2] == [-0.5, 1.5]


def test_torn_and_odd_dumps_are_left_out(tmp_path):
    run = made_run(tmp_path / "a")
    odd = [
        {},
        {"task": [1], "sample": 0, "tokens": ["a"]},
        {"task": 40, "sample": 0, "tokens": []},
        "x",
        {"task": 40, "sample": 1, "tokens": ["a", 7], "ratio": "b"},
    ]
    (run / "batches" / "step-000004-rank-0.json").write_text(json.dumps({"completions": odd}))
    (run / "batches" / "step-000005-rank-0.json").write_text('{"step": 5, "completions": [{"task": 50, "sam')
    (run / "batches" / "step-000003-rank-0.json").write_text("[]")
    found = sample_completions(read_run(run), 10**6)
    assert {
        (row["step"], row["task"], row["sample"])
        for row in records(found)
        if row["tokens"] is not None and row["step"] > 2
    } == {(4, 40, 1)}
    assert {"tokens": ["a", "\ufffd"], "logprobs": [], "ratio": []} in found["tokens"] and len(found["tokens"]) == 9


def test_several_runs(tmp_path, monkeypatch):
    first, second = (
        made_run(tmp_path / "a"),
        made_run(tmp_path / "b", **{"loss.name": "gspo", "engine.learning_rate": "5.0e-4"}),
    )
    monkeypatch.chdir(tmp_path)
    written = write_report([first, second])
    assert [path.resolve() for path in written] == [tmp_path / "report.html", tmp_path / "report.md"]
    data = Page(written[0].read_text(encoding="utf-8")).json("report-data")
    assert [run["name"] for run in data["runs"]] == ["a", "b"]
    assert data["difference"] == [
        ["name", ["a", "b"]],
        ["loss.name", ["grpo", "gspo"]],
        ["engine.learning_rate", ["0.0015", "0.0005"]],
    ]
    text = written[1].read_text()
    assert "| `loss.name` | `grpo` | `gspo` |" in text
    assert text.count("sum over tokens of (L + 0.01 KL) * weight") == 2


def test_runs_of_one_name_are_told_apart(tmp_path):
    first, second = made_run(tmp_path / "x" / "a"), made_run(tmp_path / "y" / "a")
    data = page_of(first, second, output=tmp_path / "r.html").json("report-data")
    assert [run["name"] for run in data["runs"]] == ["x/a", "y/a"]
    with pytest.raises(ConfigError, match="given twice"):
        write_report([first, first])


def test_markdown(tmp_path):
    text = write_report([made_run(tmp_path / "a")])[1].read_text()
    assert "| Accuracy after | 75.8 % (71.9 to 79.3) after 6 steps; 379 of 500 |" in text
    assert "```\nloss       sum over tokens" in text
    assert "| Sampler to trainer, nats | 1e-06 |" in text
    assert "Configurations" not in text
    first, second = made_run(tmp_path / "x"), made_run(tmp_path / "y|z")
    assert "| `name` | `x` | `y\\|z` |" in write_report([first, second], tmp_path / "r.html")[1].read_text()


@pytest.mark.parametrize("steps, title", [
    ((6,), "Mean of all 6 steps"),
    ((1,), "The only step"),
    ((10,), "Mean of the last 10 steps"),
    ((12, 30), "Mean of the last 10 steps"),
    ((3, 3), "Mean of all 3 steps"),
    ((12, 3, 0, 1), "Mean of the last 10 steps, or of all where there are fewer: r1 has 3, r3 has 1"),
])  # fmt: skip
def test_means_say_of_how_many_steps_they_are(tmp_path, steps, title):
    runs = [made_run(tmp_path / f"r{i}", steps=max(1, count)) for i, count in enumerate(steps)]
    read = [replace(run, metrics=run.metrics[:count]) for run, count in zip(map(read_run, runs), steps, strict=True)]
    assert title_means(read) == title
    if 0 not in steps:
        page, text = (path.read_text() for path in write_report(runs, tmp_path / "r.html"))
        assert Page(page).json("report-data")["final"] == title and f"\n## {title}\n" in text


@pytest.mark.parametrize("output, page", [("r.html", "r.html"), ("sub", "sub/report.html"), (".", "report.html")])
def test_where_it_is_written(tmp_path, output, page):
    run = made_run(tmp_path / "a")
    assert write_report([run], tmp_path / output)[0] == tmp_path / page
    assert (tmp_path / page).with_suffix(".md").exists()


# Configurations as text


def test_flat_keys_are_those_of_the_configuration():
    overrides = [
        "data.template='Q: {question}\n\nkey: it''s \"so\"\n'", "data.columns={question: 'a: b', '12': c}",
        "rewards=[correct_answer, {name: short, weight: 0.5, args: {}}, think_format]", "lora.target_modules=[q_proj, v_proj]",
        "data.system='" + "word " * 60 + "'",
    ]  # fmt: skip
    found = read_settings(dump(load(ROOT / "configs" / "tiny.yaml")))
    assert len(found) > 90 and found["loss.rollout_correction.name"] == "none" and found["rewards[1].weight"] == "0.0"
    nested = {"name": "x", "loss": {"name": "grpo", "args": {}}}
    for override in overrides:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        value = yaml.safe_load(value)
        nested.setdefault(section, {})
        nested[section] = {**nested[section], name: value} if name else value
    found = read_settings("# loss: not a key\n\n" + yaml.dump(nested, sort_keys=False, allow_unicode=True, width=120))

    def leaves(value, key=""):
        if isinstance(value, dict) and value:
            return [leaf for k, v in value.items() for leaf in leaves(v, f"{key}.{k}" if key else k)]
        if isinstance(value, list) and value:
            return [leaf for i, v in enumerate(value) for leaf in leaves(v, f"{key}[{i}]")]
        return [key]

    assert [key.replace("'", "") for key in found] == leaves(nested)
    assert found["rewards[1].weight"] == "0.5" and found["lora.target_modules[1]"] == "v_proj"
    assert found["loss.args"] == "{}" and found["data.columns.question"] == "'a: b'"
    assert found["data.system"] == "'" + "word " * 60 + "'"


def test_difference_names_missing_keys(tmp_path):
    first, second = read_run(made_run(tmp_path / "a")), read_run(made_run(tmp_path / "b"))
    second.settings.pop("alerts")
    assert compare_settings([first, second]) == [("name", ["a", "b"]), ("alerts", ["warn", None])]


# Runs that are not whole


def test_a_torn_last_line_and_rows_that_came_twice(tmp_path):
    run = made_run(tmp_path / "a")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "reward": 0.9}\n{"step": 6, "rew')
    with open(run / "completions.jsonl", "a") as file:
        file.write('{"step": 6, "task": 3, "te')
    read = read_run(run)
    assert len(read.metrics) == 6 and read.metrics[5]["reward"] == 0.9
    assert read.notes == ("1 unreadable line of metrics.jsonl left out",)
    (found,) = page_of(run).json("completion-data")
    assert found["total"] == 48


def test_values_that_are_no_numbers_are_gaps(tmp_path):
    run = made_run(tmp_path / "a")
    (run / "metrics.jsonl").write_text(
        '{"step": 0, "kl": NaN, "reward": Infinity, "loss": "x"}\n{"step": 1, "kl": 2, "reward": true}\n{"step": null}\n[]\n'
    )
    read = read_run(run)
    assert [row["kl"] for row in read.metrics] == [None, 2] and "reward" not in collect_curves(read)
    assert read.notes == ("2 unreadable lines of metrics.jsonl left out",)
    page_of(run)


@pytest.mark.parametrize("kept", [["config.yaml"], ["metrics.jsonl"], ["completions.jsonl"], ["evaluation.jsonl"]])
def test_a_folder_with_one_file(tmp_path, kept):
    run = made_run(tmp_path / "a")
    shutil.rmtree(run / "batches")
    for file in run.iterdir():
        if file.name not in kept:
            file.unlink()
    data = page_of(run).json("report-data")
    assert "no metrics.jsonl" in data["runs"][0]["summary"]["Notes"] or kept == ["metrics.jsonl"]
    assert bool(data["panels"]) == (kept in (["metrics.jsonl"], ["evaluation.jsonl"]))


def test_a_supervised_run(tmp_path):
    run = made_run(tmp_path / "a")
    (run / "completions.jsonl").unlink()
    shutil.rmtree(run / "batches")
    rows = [
        {
            "step": i,
            "loss": 6 / (i + 1),
            "logprob_gap": 6.0,
            "ratio": 1.0,
            "grad_norm": 1.0,
            "tokens": 5.0,
            "seconds": 1.0,
        }
        for i in range(4)
    ]
    (run / "metrics.jsonl").write_text(lines(rows))
    data = page_of(run).json("report-data")
    assert {"loss", "grad_norm"} <= {panel["id"] for panel in data["panels"]}
    assert not {"reward", "gap", "ratio"} & {panel["id"] for panel in data["panels"]}
    assert data["runs"][0]["summary"]["Loss, advantage"] == "supervised"


def test_the_accuracy_before_is_that_of_step_0(tmp_path):
    run = read_run(made_run(tmp_path / "a"))
    assert [row["step"] for row in find_accuracies(run)] == [0, 6]
    assert find_accuracies(replace(run, evaluation=run.evaluation[:1])) == (run.evaluation[0], None)
    assert find_accuracies(replace(run, evaluation=run.evaluation[1:])) == (None, run.evaluation[1])
    assert find_accuracies(replace(run, evaluation=[])) == (None, None)
    assert summarize_run(replace(run, metrics=[]), 0)["Time"] == ""


def test_what_a_user_does_wrong_is_one_sentence(tmp_path, monkeypatch):
    run = made_run(tmp_path / "a")
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="is not a folder"):
        write_report([tmp_path / "nothing"])
    with pytest.raises(ConfigError, match="is not a run folder; it holds none of metrics.jsonl"):
        write_report([tmp_path / "none"])
    with pytest.raises(ConfigError, match="at least one run"):
        write_report([])
    with pytest.raises(ConfigError, match=r"must end in \.html"):
        write_report([run], tmp_path / "report.pdf")
    with pytest.raises(ConfigError, match="cannot write"):
        write_report([run], run / "config.yaml" / "report.html")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=re.escape("pip install -e '.[report]'")):
        write_report([run], png=True)
    assert not (run / "report.html").exists()


# Untrusted text


def test_nothing_of_a_completion_is_markup(tmp_path):
    run = made_run(tmp_path / "a", text=EVIL.replace("{", "{{").replace("}", "}}"))
    rows = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    for row in rows:
        row["prompt"], row["rewards"] = EVIL, {EVIL: 1.0}
    (run / "completions.jsonl").write_text(lines(rows))
    metrics = [json.loads(line) | {f"rewards/{EVIL}": 1.0} for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text(lines(metrics))
    (run / "config.yaml").write_text("# " + EVIL[:40] + "\nname: " + EVIL[:40] + "\n")
    page_text, text = (path.read_text(encoding="utf-8") for path in write_report([run]))
    page = Page(page_text)
    assert page_text.count("</script>") == page_text.count("<script") == 3
    assert not [tag for tag, _ in page.tags if tag == "img"]
    (found,) = page.json("completion-data")
    assert records(found)[0]["text"] == EVIL.replace("\ud800", "?") == found["prompts"][0]
    assert f"rewards/{EVIL}".replace("\ud800", "?") in page.json("report-data")["runs"][0]["curves"]
    assert "<img" in text and "<img" not in re.sub(r"```.*?```", "", text, flags=re.S)  # the objective, as code


def test_the_page_asks_for_nothing(tmp_path):
    text = write_report([made_run(tmp_path / "a")])[0].read_text(encoding="utf-8")
    page = Page(text)
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    assert not [a for _, a in page.tags if {"src", "data", "action", "poster", "srcset"} & a.keys()]
    assert all(a["href"].startswith("#") for _, a in page.tags if "href" in a)
    assert not [a for _, a in page.tags if any(name.startswith("on") or name == "style" for name in a)]
    program = page.scripts["program"] + text[text.index("<style>") : text.index("</style>")]
    assert not re.search(
        r"\b(fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|import)\s*\(|@import|url\(", program
    )
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", program)
    assert set(re.findall(r"https?://[^\"'` ]+", program)) == {"http://www.w3.org/2000/svg"}  # a name, not a place


def test_scripts_are_rooms_too():
    parts = sorted(path.stem for path in report.PAGE.glob("*.js"))
    assert parts == sorted(report.SCRIPTS)
    for path in report.PAGE.iterdir():
        assert len(path.read_text().splitlines()) <= 350, path.name


def test_it_loads_no_heavy_library():
    code = "import sys, grpo_core.report.report; print([m for m in ('torch', 'transformers', 'yaml', 'numpy', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_small_pieces(tmp_path):
    assert [format_duration(s) for s in (59.94, 60, 3599.7, 86_400)] == ["59.9 s", "1 min 0 s", "1 h 0 min", "24 h 0 min"]
    assert len({panel.id for panel in PANELS}) == len(PANELS) and all(p.what and p.healthy for p in PANELS)
    run = read_run(made_run(tmp_path / "a"))
    assert not [panel for panel, _ in choose_panels([replace(run, metrics=[], evaluation=[])])]
    assert find_batches(tmp_path) == {} and list(find_batches(tmp_path / "a")) == [2]


def test_n20_held_out_answers_before_and_after_and_pass_at_k_are_in_the_report(tmp_path):
    """FAULTS N20: the run folder has both, and the report had neither."""
    run = made_run(tmp_path / "run")
    rows = [
        {"step": step, "task": task, "prompt": f"Question {task}?", "text": f"says {step}-{task}", "correct": step == 6 and task == 0}
        for step in (0, 3, 6)
        for task in (0, 4)
    ]
    (run / "evaluation_completions.jsonl").write_text(lines(rows) + '{"step": 6, "ta')
    (run / "evaluate").mkdir()
    figure = {"value": 0.4, "ci_low": 0.25, "ci_high": 0.5, "n": 40}
    result = {"base": {"pass@4": {**figure, "value": 0.1}}, "policy": {"pass@4": figure, "length": {**figure, "value": 30.0}}}
    (run / "evaluate" / "evaluate.json").write_text(json.dumps(result))
    page, markdown = write_report([run])
    text = markdown.read_text()
    assert "| pass@4 (evaluate) | base 10.0 % (25.0 to 50.0), policy 40.0 % (25.0 to 50.0) |" in text
    assert "After 0 steps, wrong:\n\n```\nsays 0-0\n```\n\nAfter 6 steps, correct:\n\n```\nsays 6-0\n```" in text
    assert "says 3-0" not in text and "length (evaluate)" not in text
    data = json.loads(re.search(r'id="report-data"[^>]*>(.*?)</script>', page.read_text(), re.S)[1])
    assert [answer["texts"] for answer in data["runs"][0]["answers"]] == [["says 0-0", "says 6-0"], ["says 0-4", "says 6-4"]]
    assert data["runs"][0]["answers"][0]["correct"] == [False, True]


def test_n20_a_run_without_held_out_answers_has_no_such_section(tmp_path):
    """FAULTS N20: only if the files have them."""
    _, markdown = write_report([made_run(tmp_path / "run")])
    assert "Held-out answers" not in markdown.read_text() and "pass@" not in markdown.read_text()


def test_attack_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_whole(path, b"first")

    def fail(self, content):
        with open(self, "wb") as file:
            file.write(content[:1])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(type(path), "write_bytes", fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"second")
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["report.html"]
