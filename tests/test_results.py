"""The rows of benchmarks/results that pages show, and the figures and tables that are made of nothing else."""

import json
import random
import re
import sys
import time
from dataclasses import replace

import pytest
import yaml
from conftest import ROOT
from doc_commands import blocks

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "configs" / "experiments"))
import experiments
import gsm8k_files
import peers
import results
from right_calculations import holds, right_calculations, value_of
from worked_steps import steps_in, worked_steps

from grpo_core.config.files import dump, load
from grpo_core.config.study import load_study

COT = "18 + 21 = 39. 39 - 20 = 19."


@pytest.mark.parametrize("text, points", [
    ("18 + 21 = 39. 39 - 20 = 19. #### 19", 1.0),
    ("21+18=39, then 39 - 20 = 19", 1.0),  # the operands of a sum may change places
    ("18 + 21 = 39. 20 - 39 = 19.", 0.5),  # those of a difference may not
    ("18 + 21 = 40. 39 - 20 = 19.", 0.75),  # half a step for the operation alone
    ("39 - 20 = 19. 18 + 21 = 39.", 0.5),  # in their order
    ("18 + 21 = 39. " * 4, 0.25),  # one of four
    ("#### 19", 0.0), ("", 0.0), ("18 + 21 = 3.9", 0.0), ("1.18 + 21 = 39", 0.0),
])  # fmt: skip
def test_worked_steps(text, points):
    assert worked_steps([text, COT], [COT, COT]) == [points, 1.0]


def test_steps_of_products_and_shares():
    assert steps_in("3 x 4 = 12; 12 ÷ 4 = 3") == [(("*", 3, 4), 12), (("/", 12, 4), 3)]


@pytest.mark.parametrize("text, points", [
    ("<<48/2=24>>24 and <<48+24=72>>72", 1.0), ("<<48/2=24>>24", 0.5), ("<<48/2=24>>24 and <<48+24=71>>71", 0.5),
    ("<<48/2=24>>" * 2, 0.5), ("<<48/2=24>>" * 4, 0.25),  # the same again is none
    ("<<1+1=2>><<2+2=4>><<3+3=6>>", 2 / 3),  # more than are needed
    ("", 0.0), ("48/2=24", 0.0), ("<<" + "(" * 300 + "1=1>>", 0.0), ("<<" + "-" * 5000 + "1=1>>", 0.0),
    ("<<" + "9" * 5000 + "=1>>", 0.0),
])  # fmt: skip
def test_right_calculations(text, points):
    worked = "<<48/2=24>>24 <<48+24=72>>72"
    assert right_calculations([text, worked], [worked, worked]) == [points, 1.0]


@pytest.mark.parametrize("text, answer", [
    ("He has <<3*4=", "12>>"), ("<<1/3=", "0.33>>"), ("<<5-7.25=", "-2.25>>"), ("<<(2+3)*1.1=", "5.5>>"), ("<<100000*100000=", "10000000000>>"),
    ("<<10/2=5>>5, and x =", ""), ("<<x+1=", ""), ("<<2*=", "?>>"), ("<<9**9**9=", "?>>"), ("<<1/0=", "?>>"),
])  # fmt: skip
def test_the_calculator_completes_what_is_marked(text, answer):
    from right_calculations import Calculator

    from grpo_core import Turn

    assert Calculator({}, 0).step(Turn(text, text, 0, "stop")) == answer
    assert Calculator({}, 0).step(Turn(text, text, 0, "eos")) is None



def test_rows_of_calculations_are_right_and_of_the_given_form():
    draw = random.Random(1)
    for formula in ["48/2", "1.5*20", "(100-40)/3", "7+80+900"] * 50:
        if made := gsm8k_files.replace_numbers(formula, draw):
            assert value_of(made[0]) == pytest.approx(float(made[1]), abs=1e-9)  # exactly, where a reward allows rounding
            assert re.sub(r"[\d.]+", "1", made[0]) == re.sub(r"[\d.]+", "1", formula)
    assert gsm8k_files.replace_numbers("3+", draw) is None


def test_what_is_watched_is_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(gsm8k_files, "FOLDER", tmp_path)
    rows = [{"question": f"q{i} \u2028", "answer": f"<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"} for i in range(510)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), "utf-8")
    gsm8k_files.main()
    rest, held, warmup = (results.read(tmp_path / f"{name}.jsonl") for name in ("rest", "validation", "warmup"))
    assert rest == rows[:10] and held == rows[10:] and warmup[:10] == rest and len(warmup) == 10 + gsm8k_files.DRILLS
    written = [results.MARKED.findall(one["answer"]) for one in warmup[10:]]
    assert all(len(one) == gsm8k_files.CALCULATIONS and all(holds(*pair) for pair in one) for one in written)


def row(policy, task, sample, correct, text="mine"):
    return {
        "policy": policy,
        "task": task,
        "sample": sample,
        "correct": correct,
        "text": text,
        "prompt": f"Problem: What is {task}?\nSolution:",
    }


@pytest.mark.parametrize("text, slipped", [
    ("so <<3*4=12>>12 and <<(12 - 2)/4=2.5>>2.5", False),
    ("so <<3*4=13>>13 and <<13-2=11>>11", True),
    ("<<10/3=3.33>>3.33, <<-2+5=3>>3", False),  # as GSM8K rounds
    ("3 * 4 = 13", False),  # not marked
    ("<<3/0=3>>", True), ("<<3**4=81>>", True), ("<<3 4=7>>", True),
])  # fmt: skip
def test_calculations_that_are_wrong(text, slipped):
    assert results.has_slip(text) is slipped


def test_calculations_by_what_they_do():
    told = results.count_operations(["<<1+1=2>><<1+1=3>><<1+2+3=6>>", "<<6/3=2>><<2*3+1=8>>", "nothing"])
    assert told == {"2 numbers, +": [1, 2], "3 numbers, +": [0, 1], "2 numbers, /": [0, 1], "others": [1, 1]}


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "page")
    monkeypatch.setattr(results, "DATA", tmp_path / "page" / "data")
    return tmp_path / "page" / "data"


def a_run(folder, path, test):
    """A run folder with one evaluation, called `test`."""
    (folder / test).mkdir(parents=True)
    (folder / "config.yaml").write_text(f"data: {{path: '{path}'}}\n")
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": 0, "reward": 1 / 3, "epoch": 0.1, "seconds": 9.0, "kl": None}) + "\n"
    )
    (folder / "evaluation.jsonl").write_text("")
    figures = {"greedy": {"value": 0.5, "n": 2}}
    told = {
        "policy": figures,
        "base": figures,
        "source": "/where/run",
        "weights": "the adapter in /where/run",
        "data": {"path": "/where/x.jsonl"},
    }
    (folder / test / "evaluate.json").write_text(json.dumps(told))
    rows = [
        row("base", 0, 0, False),
        row("base", 1, 0, True),
        row("policy", 0, 0, True, "mine, <<1+1=3>>"),
        row("policy", 1, 0, False, "mine, <<1+1=3>>"),
        row("policy", 1, 1, True),
    ]
    (folder / test / "completions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def test_what_is_kept_of_a_run(tmp_path, data):
    results.keep(a_run(tmp_path / "mine", "builtin:word_problems", "evaluate"))
    assert results.read(data / "mine" / "metrics.jsonl") == [{"step": 0, "reward": 0.33333, "seconds": 9.0}]
    told = json.loads((data / "mine" / "evaluate.json").read_text())
    assert told["solved"] == {"base": [1], "policy": [0]} and "/where" not in json.dumps(told)
    assert told["slips"] == {"base": 0, "policy": 1}  # of the wrong answers alone
    text = (data / "mine" / "completions.md").read_text()
    assert (
        "**1.** What is 0?\n\nbefore (wrong):\n\n```text\nmine\n```\n\nafter (right):\n\n```text\nmine, <<1+1=3>>"
        in text
    )


def test_of_a_run_the_held_out_answers_before_and_after_are_kept(tmp_path, data):
    rows = [
        {"step": step, "task": task, "prompt": f"Problem: What is {task}?", "text": f"{step}.", "correct": step == 9}
        for step in (0, 5, 9) for task in range(25)
    ]  # fmt: skip
    for name, path in (("mine", "builtin:word_problems"), ("theirs", "/where/train.jsonl")):
        run = a_run(tmp_path / name, path, "evaluate-test")
        (run / "evaluation_completions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        results.keep(run)
    text = (data / "mine" / "completions.md").read_text()
    assert "**1.** What is 0?\n\nbefore (wrong):\n\n```text\n0.\n```\n\nafter (right):\n\n```text\n9.\n```" in text
    assert "**20.**" in text and "**21.**" not in text and "\n5." not in text
    assert not (data / "theirs" / "completions.md").exists()


def test_rows_of_other_data_appear_by_their_number_alone(tmp_path, data):
    results.keep(a_run(tmp_path / "theirs", "/where/train.jsonl", "evaluate-test"))
    kept = "".join(path.read_text() for path in data.rglob("*.json*"))
    assert "What is" not in kept and "mine" not in kept and not [*data.rglob("*.md")]
    assert json.loads((data / "theirs" / "evaluate-test.json").read_text())["solved"]["policy"] == [0]


def test_what_is_kept_beside_a_test_sets_solutions(tmp_path, data):
    """Of the rows that were evaluated, in their order: how many calculations the solutions have, and what went wrong."""
    run = a_run(tmp_path / "theirs", "/where/train.jsonl", "evaluate-test")
    solutions = ["<<1+1=2>><<2+2=4>>", "<<1+1=2>>", "<<1+1=2>><<1+1=2>><<1+1=2>>"]
    source, told = tmp_path / "test.jsonl", run / "evaluate-test" / "evaluate.json"
    source.write_text("".join(json.dumps({"answer": text}) + "\n" for text in solutions))
    told.write_text(json.dumps(json.loads(told.read_text()) | {"data": {"path": str(source)}}))
    results.keep(run)
    kept = json.loads((data / "theirs" / "evaluate-test.json").read_text())
    assert kept["calculations"] == [2, 1] and kept["data"]["path"] == "test.jsonl"
    assert kept["operations"] == {"base": {}, "policy": {"2 numbers, +": [2, 2]}}


@pytest.mark.parametrize("name", ["tried_1.0_3e-4", "gsm8k_earlier_2_1e-4"])
def test_of_a_run_that_was_tried_the_evaluations_are_kept(tmp_path, data, name):
    results.keep(a_run(tmp_path / name, "/where/train.jsonl", "evaluate-test"))
    assert (data / name / "evaluation.jsonl").exists() and not (data / name / "metrics.jsonl").exists()


def test_an_untrained_models_folder_holds_evaluations_alone(tmp_path, data):
    run = a_run(tmp_path / "base", "/where/train.jsonl", "evaluate-test")
    for name in ("config.yaml", "metrics.jsonl", "evaluation.jsonl"):
        (run / name).unlink()
    results.keep(run)
    assert [path.name for path in (data / "base").iterdir()] == ["evaluate-test.json"]


def test_the_other_trainers_rows_are_kept_with_our_run(tmp_path, data):
    run = a_run(tmp_path / "mine", "builtin:word_problems", "evaluate")
    (run / "trl.jsonl").write_text('{"step": 0}\n')
    results.keep(run)
    assert results.read(data / "mine" / "trl.jsonl") == [{"step": 0}]


def test_seconds_of_training_leave_out_evaluations_and_what_came_before_the_first_step(data):
    (data / "mine").mkdir(parents=True)
    rows = [
        {"step": 0, "seconds": 20.0, "seconds/sample": 1.0, "seconds/update": 2.0, "seconds/evaluate": 9.0},
        {"step": 1, "seconds": 4.5, "seconds/sample": 1.0, "seconds/update": 2.0},
        {"step": 2, "seconds": 9.0, "seconds/sample": 1.0, "seconds/update": 2.0, "seconds/evaluate": 5.0, "seconds/checkpoint": 1.0},
    ]  # fmt: skip
    (data / "mine" / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert results.sum_trained_seconds("mine") == [0.0, 3.0, 7.5, 10.5]


def test_the_test_sets_table(data):
    """Two policies on 20 problems: 8 more are solved, 1 no longer."""
    figures = {"greedy": {"n": 20}, "cut off": {"value": 0.25}} | {
        f"{what}@8": {"value": 0.5, "ci_low": 0.4, "ci_high": 0.6} for what in ("mean", "pass", "maj")
    }
    for name, told in (
        ("gsm8k_base", {"policy": figures, "solved": {"policy": [0]}, "slips": {"policy": 1}}),
        ("gsm8k", {"base": figures, "policy": figures, "solved": {"base": [0, 1], "policy": [0, *range(2, 10)]}, "slips": {"base": 9, "policy": 0}, "calculations": [2, 7] * 10, "operations": {"base": {"others": [1, 4]}, "policy": {"others": [0, 3], "2 numbers, *": [1, 2]}}}),
    ):  # fmt: skip
        (data / name).mkdir(parents=True)
        (data / name / "evaluate-test.json").write_text(json.dumps(told))
    table = results.gsm8k_table()
    assert "| supervised warm-up | 10.0 % (2.8 to 30.1) | 50.0 % (40.0 to 60.0) |" in table and "| 25.0 % |\n" in table
    by_calculations = results.gsm8k_calculations_table().splitlines()[2:]
    assert results.gsm8k_operations_table().splitlines()[2:] == [
        "| 2 numbers, × | none | 50.0 % of 2 |",
        "| others | 25.0 % of 4 | 0.0 % of 3 |",
    ]
    assert by_calculations == ["| 2 | 10 | 10.0 % | 50.0 % |", "| 5 to 7 | 10 | 10.0 % | 40.0 % |"]
    assert "8 won, 1 lost, McNemar's p = 0.039." in table and "50.0 % of the warm-up's, 0.0 % of GRPO's." in table


def test_seconds_to_an_accuracy():
    rows = [(0, 0.1), (10, 0.3), (20, 0.2), (30, 0.5)]
    assert results.find_seconds_to(rows, 0.2) == pytest.approx(5) and results.find_seconds_to(rows, 0.4) == pytest.approx(
        26.667, abs=1e-3
    )
    assert results.find_seconds_to(rows, 0.1) == 0 and results.find_seconds_to(rows, 0.6) is None


def beside(folder, ours, theirs, a_step):
    """A run of 20 steps with accuracies after 0, 10 and 20, and TRL's at ten times the seconds."""
    folder.mkdir(parents=True)
    metrics = [{"step": step, "seconds": a_step, "seconds/sample": a_step} for step in range(20)]
    curve = [{"step": 10 * i, "accuracy": value} for i, value in enumerate(ours)]
    trl = [{"step": 10 * i, "seconds": 100 * a_step * i, "correct": int(100 * value), "n": 100} for i, value in enumerate(theirs)]
    for name, rows in (("metrics", metrics), ("evaluation", curve), ("trl", trl)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_table_beside_trl(data):
    """Medians of three seeds, one of which never gets there; a row that two do not reach is left out."""
    for seed, (ours, theirs) in enumerate((([0, 0.1, 0.2], [0, 0.05, 0.2]), ([0, 0.05, 0.05], [0, 0, 0.1]), ([0, 0.2, 0.3], [0, 0.2, 0.3]))):
        beside(data / f"against_trl_{seed}", ours, theirs, 1.0)
    beside(data / "first_pass" / "against_trl", [0, 0.1, 0.1], [0, 0.1, 0.1], 0.5)
    assert results.against_trl_table().splitlines()[2:] == [
        "| 5.0 % | 5 s (5, 10, 2) | 100 s (100, 150, 25) | 20.0 × | 5, 10 | 10.0 × |",
        "| 10.0 % | 10 s (10, never, 5) | 133 s (133, 200, 50) | 13.3 × | 10, 13 | 10.0 × |",
        "| 15.0 % | 15 s (15, never, 8) | 167 s (167, never, 75) | 11.1 × | 15, 17 |  |",
        "| 20.0 % | 20 s (20, never, 10) | 200 s (200, never, 100) | 10.0 × | 20, 20 |  |",
        "| a step, mean up to TRL's last evaluation | 1.00 s (1.00, 1.00, 1.00) | 10.00 s (10.00, 10.00, 10.00) | 10.0 × |  | 10.0 × |",
    ]


def test_the_objectives_of_both_passes_in_pairs(data):
    for folder, more in (("", 0.0), ("first_pass", 0.02)):
        for i, name in enumerate(results.VARIANTS[:-1]):
            for seed in results.SEEDS:
                (to := data / folder / f"variant_{name}_{seed}").mkdir(parents=True)
                rows = [{"step": 0, "accuracy": 0.9}, {"step": 60, "accuracy": 0.1 * i + 0.01 * seed + more * seed}]
                (to / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = results.variants_pairs_table().splitlines()
    assert table[2] == "| grpo | 4.0 % (1.0 to 9.0) |  |  |  |  |"
    assert table[4] == "| dapo | 24.0 % (21.0 to 29.0) | 0.0093 | 0.0093 |  |  |"
    assert table[-1] == "Two runs of one objective and one seed ended 4.0 points apart on average, 6.0 at the most."


def test_the_table_of_peers(tmp_path):
    """The newest row of a workload and card counts, and a row that misses its reach says so."""
    for ours, most in ((0.9, 1.0), (0.5, 1.0), (0.9, 0.5)):
        name = "decode" if most == 1 else "step"
        peers.record(tmp_path / "rows.json", peers.make_row(name, f"a {name}", ours, 1.25, "vLLM", most, "NVIDIA H200"))
    rows = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]
    assert [(row["reach"], row["met"]) for row in rows] == [("at most 1", True), ("at most 0.5", False)]
    assert peers.table(tmp_path / "rows.json").splitlines()[2:] == [
        "| a decode (NVIDIA H200) | 0.5 s | vLLM: 1.25 s | 0.40 |",
        "| a step (NVIDIA H200) | 0.9 s | vLLM: 1.25 s | 0.72 |",
    ]


def test_the_measured_peers():
    rows = results.read(peers.OUT)
    assert {row["bench"] for row in rows} == {"peers/decode", "peers/step"} and len(peers.table().splitlines()) == 2 + len(rows)
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ours"] / row["peer"], abs=0.006) and row["versions"]["vllm"] and row["card"]
        assert row["met"] == (row["ours"] <= float(row["reach"].removeprefix("at most ")) * row["peer"])


def test_a_side_that_fails_or_takes_too_long_ends_with_its_last_output(tmp_path, monkeypatch, capsys):
    script = tmp_path / "side.py"
    monkeypatch.setattr(peers, "__file__", str(script))
    begin = "import sys, time\nfor i in (1, 2): print('{\"seconds\": %d, \"card\": \"mine\"}' % i, flush=True)\n"
    script.write_text(begin)
    side = peers.run_side("decode_ours", {}, 20)
    assert side["seconds"] == [1, 2] and side["card"] == "mine" and len(capsys.readouterr().out.splitlines()) == 2
    for end, limit, message in (("sys.exit('no vLLM')", 20, r"exit code 1 .*no vLLM"), ("time.sleep(60)", 1, r"exit code -9 after 1 s")):
        script.write_text(begin + end)
        with pytest.raises(RuntimeError, match=message):
            peers.run_side("decode_ours", {}, limit)


PAGE = ROOT / "docs" / "results" / "README.md"


def test_the_published_tables_are_those_of_the_data():
    for page in results.PAGES:
        text = page.read_text(encoding="utf-8")
        assert "<!-- table:" in text and results.fill_in(text) == text, page


def test_every_command_on_the_page_is_one_of_the_experiments():
    ours = [command for chain in (experiments.CHAINS | experiments.TWO_GPU_CHAINS).values() for command in chain]
    shown = [line for language, text in blocks(PAGE.read_text()) if language == "bash" for line in text.splitlines()]
    assert shown and not set(shown) - set(ours)


def test_every_experiments_configuration_loads():
    for command in (command for chain in (experiments.CHAINS | experiments.TWO_GPU_CHAINS).values() for command in chain):
        if match := re.search(r"--config (\S+)((?: [a-z_.]+=\S+)*)", command):
            load(ROOT / match[1], match[2].split())


def flat(value, path=""):
    return {k: v for name in value for k, v in flat(value[name], f"{path}.{name}").items()} if isinstance(value, dict) else {path: value}


def options(config):
    """Those that the configuration has and those that its run was kept with."""
    return [flat(yaml.safe_load(text)) for text in (dump(config), (results.DATA / config.name / "config.yaml").read_text())]


def differing(config):
    now, kept = options(config)
    return {name for name, value in kept.items() if name in now and now[name] != value}


KEPT = re.compile(r"(train|sft) --config (\S+)((?: [a-z_.]+=\S+)*)")


@pytest.mark.parametrize("command", [c for chain in experiments.CHAINS.values() for c in chain if KEPT.search(c)])
def test_the_commands_are_those_of_the_kept_runs(command):
    """Every configuration that is kept is what its command says today, but for names of what came before them."""
    verb, path, words = KEPT.search(command).groups()
    config = load(ROOT / path, words.split())
    now, kept = options(config)
    other = differing(config)
    if verb == "sft":  # which has one objective, whatever stands there
        other = {name for name in other if not name.startswith((".loss", ".advantage"))}
    if config.name.startswith(("gsm8k_earlier_", "tried_")):  # their names were others, and they were ended
        assert now[".trainer.num_steps"] is None or now[".trainer.num_steps"] <= kept[".trainer.num_steps"]
        other -= {".name", ".model.path", ".trainer.num_steps", ".log.completions"}
    assert not other


@pytest.mark.parametrize("name", results.VARIANTS)
def test_the_objectives_are_those_of_the_kept_runs(name):
    study = load_study(results.VARIANTS_STUDY)
    configs = [replace(study.runs[name, seed], name=results.variant(name, seed), output_dir="runs/experiments") for seed in results.SEEDS]
    assert [differing(config) for config in configs] == [set()] * 3


def test_the_published_data_are_small():
    kept = [*PAGE.parent.rglob("*"), *results.DATA.rglob("*")]
    assert results.DATA.exists() and sum(path.stat().st_size for path in kept) <= 5e6


def test_experiments_go_on_where_they_were(tmp_path, monkeypatch):
    """What ended well is left out, what was begun goes on, and nothing follows a command that failed."""
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(experiments, "RESTART_WORDS", {"test -e": "-o 1"})
    chain = ["echo one >> told", "test -e later", "echo three >> told"]
    for seen in ("one\n", "one\nthree\n", "one\nthree\n"):
        experiments.run("mine", chain, "", time.time() + 60, tmp_path)
        assert (tmp_path / "told").read_text() == seen
    told = [path.name for path in sorted(tmp_path.glob("*.done"))]
    assert told == ["mine-0.done", "mine-1.done", "mine-2.done"]


def test_an_experiment_is_stopped_when_time_is_up(tmp_path, capsys):
    experiments.run("mine", ["exec sleep 60", "echo never"], "", time.time() + 5.5, tmp_path)
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["exit_code"] == -15 and row["seconds"] < 20 and not [*tmp_path.glob("*.done")]
