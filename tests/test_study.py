"""A study: what its file may say, which runs it trains, and what it concludes from their files."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from grpo_core.cli import main
from grpo_core.commands import study as command
from grpo_core.commands.study import find_state, run_study, write_comparison
from grpo_core.config.files import dump
from grpo_core.config.study import load_study
from grpo_core.report.seed_statistics import count_needed_seeds, exchange_p, holm, smallest_p, t_interval, t_quantile
from grpo_core.report.study import compare_variants, make_band, measure, render_study
from grpo_core.schema import ConfigError

SMALL = {
    "name": "small", "config": "tiny", "seeds": [1, 2], "control": "grpo",
    "common": {
        "trainer.num_steps": 2, "trainer.completions_per_step": 16, "sampling.max_new_tokens": 12, "evaluation.num_tasks": 8,
        "data.limit": 200, "checkpoint.every": 1,
    },
    "variants": {"grpo": None, "cispo": {"loss.name": "cispo", "loss.average": "token"}},
}  # fmt: skip


def write_study(folder, **changes):
    """Write a study file in a folder, with `runs` in it for the output, and return its path."""
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"output_dir": str(folder / "runs")} | changes, sort_keys=False))
    return path


def write_run(folder, accuracies, *, seconds=1.0, n=500, config=None):
    """Write the files of a finished run: `accuracies` is steps -> accuracy."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").touch()
    rows = [{"step": step, "accuracy": accuracy, "n": n} for step, accuracy in accuracies.items()]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "seconds": seconds, "reward": 0.5}) + "\n")
    if config:
        (folder / "config.yaml").write_text(dump(config))
    return folder


def finals(tmp_path, values):
    """Write runs with these final accuracies, variant -> one per seed from 0 on; return variant -> seed -> folder."""
    return {
        name: {s: write_run(tmp_path / name / f"seed-{s}", {0: 0.1, 10: x}) for s, x in enumerate(accuracies)}
        for name, accuracies in values.items()
    }


# --- statistics ----------------------------------------------------------------------------------------------------


def test_the_exact_p_of_three_seeds_is_that_by_hand():
    """All 8 signs of (3, 1, 2) give the sums ±6, ±4, ±2, ±0; those as far from 0 as the observed one are counted."""
    zeros = [[0.0]] * 3
    assert exchange_p([[3.0], [1.0], [2.0]], zeros) == 2 / 8  # 6: only ±6
    assert exchange_p([[3.0], [-1.0], [2.0]], zeros) == 4 / 8  # 4: ±6, ±4
    assert exchange_p([[-3.0], [1.0], [2.0]], zeros) == 8 / 8  # 0: all


def test_the_exact_p_is_that_of_all_signs():
    draw = random.Random(3)
    for n in range(1, 8):
        a, b = ([draw.gauss(0, 1) for _ in range(n)] for _ in range(2))
        differences = [x - y for x, y in zip(a, b, strict=True)]
        sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in product((1, -1), repeat=n)]
        expected = sum(value >= abs(sum(differences)) - 1e-9 for value in sums) / 2**n
        assert exchange_p([[x] for x in a], [[x] for x in b]) == pytest.approx(expected)
        assert smallest_p(n) == pytest.approx(exchange_p([[float(2**i)] for i in range(n)], [[0.0]] * n))


def test_several_runs_of_a_seed_are_exchanged_within_it():
    """All C(6, 3) divisions of one seed's six values count once; values of two seeds are never exchanged."""
    assert exchange_p([[1, 2, 3]], [[4, 5, 6]]) == pytest.approx(2 / 20)  # this division and its mirror
    assert exchange_p([[1, 2, 4]], [[3, 5, 6]]) == pytest.approx(4 / 20)
    assert exchange_p([[1, 2], [11, 12]], [[3, 4], [13, 14]]) == pytest.approx(2 / 36)  # not 2 of 70
    assert exchange_p([[1, 2]], [[1, 2]]) == 1


def test_holm_multiplies_the_smallest_most_and_never_falls():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([0.2]) == [0.2] and holm([]) == []


def test_students_interval():
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 30: 2.042}
    assert {n: round(t_quantile(0.95, n), 3) for n in table} == table
    assert t_quantile(0.99, 4) == pytest.approx(4.604, abs=5e-4)
    low, high = t_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert t_interval([1.0]) is None


def test_the_seeds_that_are_needed():
    assert [count_needed_seeds(m, 0.05) for m in (1, 2, 7)] == [6, 7, 9]
    assert 7 * smallest_p(9) <= 0.05 < 7 * smallest_p(8)


# --- the comparison ------------------------------------------------------------------------------------------------


def test_equal_runs_have_difference_0_and_p_1(tmp_path):
    data = compare_variants(finals(tmp_path, {"a": [0.3, 0.5, 0.4], "b": [0.3, 0.5, 0.4]}), "a", "final")
    (row,) = data["comparisons"]
    assert (row["mean"], row["p"], row["p_holm"], row["interval"]) == (0, 1, 1, (0, 0))
    assert data["variants"]["a"]["mean"] == pytest.approx(0.4)


def test_the_order_of_variants_and_seeds_has_no_effect(tmp_path):
    runs = finals(tmp_path, {"a": [0.3, 0.5, 0.4], "b": [0.5, 0.9, 0.7], "c": [0.1, 0.7, 0.2]})
    mixed = {name: dict(reversed(runs[name].items())) for name in ("c", "a", "b")}
    first, second = compare_variants(runs, "a", "final"), compare_variants(mixed, "a", "final")
    assert first["variants"] == second["variants"]
    assert sorted(map(json.dumps, first["comparisons"])) == sorted(map(json.dumps, second["comparisons"]))


def test_a_pair_has_the_same_seed(tmp_path):
    """Seed 1 of b is missing: its differences are those of seeds 0 and 2, whatever the means of all seeds are."""
    runs = finals(tmp_path, {"a": [0.1, 0.9, 0.2], "b": [0.2, 0.0, 0.4]})
    del runs["b"][1]
    (row,) = compare_variants(runs, "a", "final")["comparisons"]
    assert row["differences"] == {"0": pytest.approx(0.1), "2": pytest.approx(0.2)} and row["seeds"] == 2
    assert (row["p"], row["smallest_p"]) == (0.5, 0.5)


def test_conclusions(tmp_path):
    """Nine seeds and two comparisons: one shown, one not; with three seeds none can be."""
    draw = random.Random(0)
    noise = [draw.uniform(0, 0.1) for _ in range(9)]
    values = {"a": noise, "worse": [x - 0.05 for x in noise], "same": [x + 0.01 * (-1) ** i for i, x in enumerate(noise)]}
    rows = {row["variant"]: row for row in compare_variants(finals(tmp_path / "9", values), "a", "final")["comparisons"]}
    assert rows["worse"]["p"] == pytest.approx(2 / 2**9) and rows["worse"]["p_holm"] == pytest.approx(4 / 2**9)
    assert rows["worse"]["conclusion"].endswith("it is lower, at the level of 5 %.")
    assert "no difference is shown" in rows["same"]["conclusion"]
    few = {name: accuracies[:3] for name, accuracies in values.items()}
    data = compare_variants(finals(tmp_path / "3", few), "a", "final")
    assert data["comparisons"][0]["conclusion"] == (
        "worse differs from a by -5.0 points (95 % interval -5.0 to -5.0), p = 0.25, 0.5 after Holm: no difference could be "
        "shown, because p cannot be below 0.25 with 3 seeds; at least 7 are needed for 2 comparisons."
    )
    six = {name: accuracies[:6] for name, accuracies in values.items()}  # p is 0.03 at the least, 0.06 after Holm
    more = compare_variants(finals(tmp_path / "6", six), "a", "final")["comparisons"][0]
    assert more["p"] < 0.05 < more["p_holm"] and "with 6 seeds; at least 7 are needed" in more["conclusion"]
    text = render_study("mine", data, {"a": "", "worse": "loss.name=gspo", "same": ""}, "study.png")
    assert data["comparisons"][0]["conclusion"] in text and "](study.png)" in text and "`loss.name=gspo`" in text


def test_runs_on_other_numbers_of_problems_are_no_pairs(tmp_path):
    runs = finals(tmp_path, {"a": [0.1]}) | {"b": {0: write_run(tmp_path / "b", {0: 0.1, 10: 0.2}, n=400)}}
    with pytest.raises(ConfigError, match=r"a/seed-0 was evaluated on 500 held-out problems and .*b on 400;"):
        compare_variants(runs, "a", "final")


def test_the_area_is_that_of_the_trapezia():
    curve = {0: 0.0, 10: 0.4, 40: 0.6}
    assert measure(curve, "area") == pytest.approx((10 * 0.2 + 30 * 0.5) / 40) and measure(curve, "final") == 0.6
    assert measure({0: 0.0, 20: 0.5}, "area") == measure({0: 0.25}, "area") == 0.25


def test_a_band_has_the_steps_that_all_seeds_have():
    band = make_band([{0: 0.1, 10: 0.5, 20: 0.7}, {0: 0.3, 10: 0.1}])
    assert band == [
        {"step": 0, "mean": pytest.approx(0.2), "low": 0.1, "high": 0.3},
        {"step": 10, "mean": pytest.approx(0.3), "low": 0.1, "high": 0.5},
    ]


# --- the file ------------------------------------------------------------------------------------------------------


STUDIES = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "\nvariants:" in path.read_text()]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_shipped_study_loads(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study(path)
    assert study.keys.name == path.stem and len(study.runs) == len(study.keys.variants) * len(study.keys.seeds)


def test_a_shipped_study_has_a_name():
    assert load_study(Path("objectives")).keys.name == "objectives"


def test_a_run_is_that_of_the_command_line(tmp_path):
    """The variant's keys override the common ones, and these a preset; the paths are beside the study file."""
    (tmp_path / "mine.py").write_text("def short(completions, **columns):\n    return [1.0 for _ in completions]\n")
    variants = {
        "grpo": {},
        "dapo": {"preset": "dapo", "sampling.dynamic_attempts": 2, "trainer.num_steps": 3},
        "short": {"rewards": [{"name": "mine.py:short", "weight": 0.5}]},
        "half": {"rewards[0].weight": 0.5},
    }
    study = load_study(write_study(tmp_path, variants=variants, common=SMALL["common"] | {"truncation.name": "keep"}))
    dapo = study.runs["dapo", 2]
    assert (dapo.name, dapo.output_dir, dapo.seed) == ("seed-2", str(tmp_path / "runs" / "small" / "dapo"), 2)
    assert (dapo.loss.args["clip_high"], dapo.sampling.dynamic_attempts) == (0.28, 2)
    assert (dapo.truncation.name, dapo.trainer.num_steps) == ("keep", 3)
    assert study.runs["short", 1].rewards[0].name == f"{tmp_path / 'mine.py'}:short"
    assert [reward.name for reward in study.runs["half", 1].rewards] == ["correct_answer", "has_think_tags"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"seedz": [1]}, r"unknown key seedz; known: .*did you mean seeds"),
    ({"variants": {"grpo": {}, "b": {"loss.nam": "gspo"}}}, r"variant b: unknown key loss\.nam; .*did you mean name"),
    ({"common": {"trainer.num_step": 2}}, r"unknown key trainer\.num_step"),
    ({"variants": {"grpo": {}, "b": {"loss.name": "gsbo"}}}, r"variant b: .*gsbo.*did you mean gspo"),
    ({"variants": {"grpo": {}, "b": {"loss.args": {"clip": 1}}}}, r"variant b: unknown key loss\.args\.clip"),
    ({"variants": {"grpo": {}, "b": {"seed": 3}}}, r"variants\.b sets seed; it may set every key but name"),
    ({"variants": {"grpo": {}, "b": 3}}, r"variants\.b is 3; it must be a mapping"),
    ({"variants": {"grpo": {}, "b/c": {"loss.name": "gspo"}}}, r"the name of a variant is 'b/c'"),
    ({"variants": {"grpo": {}}}, r"variants has 1; a study needs the control and at least one other"),
    ({"variants": {"grpo": {}, "b": {}}}, r"the variants grpo and b are the same configuration"),
    ({"variants": {"grpo": {}, "b": {"loss.args": {"clip_low": 0.2}}}}, r"grpo and b are the same"),
    ({"variants": {"grpo": {"advantage.name": "dr_grpo"}, "b": {"advantage.name": "centered"}}}, r"grpo and b are the same"),
    ({"variants": {"grpo": {}, "b": {"evaluation.num_tasks": 9}}}, r"evaluation\.num_tasks is 9 in b and 8 in grpo"),
    ({"variants": {"grpo": {}, "b": {"data.limit": 100}}}, r"data\.limit is 100 in b and 200 in grpo"),
    ({"control": "grop"}, r"control is 'grop', which is no variant; .*did you mean grpo"),
    ({"seeds": [1]}, r"seeds is \[1\]; it must have from 2 to 16 different integers"),
    ({"seeds": [1, 1]}, r"seeds is \[1, 1\]"),
    ({"seeds": [1, "2"]}, r"seeds\[1\] is '2'; it must be an integer"),
    ({"metric": "best"}, r"metric is 'best'; it must be one of final, area"),
    ({"metric": "area"}, r"evaluation\.every is 0; the metric area needs"),
    ({"common": {"evaluation.num_tasks": 0}}, r"evaluation\.num_tasks is 0"),
    ({"processes": 3}, r"3"),
    ({"config": "tyni"}, r"tyni"),
])  # fmt: skip
def test_a_mistake_is_one_sentence_before_anything_runs(tmp_path, changes, message, capsys):
    assert main(["study", str(write_study(tmp_path, **changes))]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error
    assert not (tmp_path / "runs").exists()


# --- which runs are trained ----------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A study whose runs are written by a script instead of trained; the list of the runs that were started.

    The script fails for a run folder that has a file named fail.
    """
    path, started = write_study(tmp_path), []
    script = tmp_path / "fake.py"
    script.write_text(
        "import json, sys\nfrom pathlib import Path\n"
        "folder = Path(sys.argv[sys.argv.index('--config') + 1]).parent\n"
        "if (folder.parent / 'fail').exists():\n    sys.exit('some text\\ngrpo_core: no memory is left')\n"
        "(folder / 'adapter').mkdir(exist_ok=True)\n(folder / 'adapter' / 'a.safetensors').touch()\n"
        "(folder / 'metrics.jsonl').write_text('{\"step\": 0, \"seconds\": 2.0}\\n')\n"
        "rows = [{'step': s, 'accuracy': 0.1 * s, 'n': 8} for s in (0, 2)]\n"
        "(folder / 'evaluation.jsonl').write_text(''.join(json.dumps(row) + '\\n' for row in rows))\n"
    )
    monkeypatch.setattr(command, "PROGRAM", ("-S", str(script)))
    monkeypatch.setattr(command, "POLL_SECONDS", 0.01)
    start = command._Training._start
    monkeypatch.setattr(command._Training, "_start", lambda self, key: (started.append(key), start(self, key)))
    return path, started, tmp_path / "runs" / "small"


ALL = [("grpo", 1), ("grpo", 2), ("cispo", 1), ("cispo", 2)]


def test_every_run_is_trained_once(trained, capsys):
    path, started, folder = trained
    assert run_study(path) == 0 and started == ALL
    shown = capsys.readouterr().out
    assert "| grpo " in shown and (folder / "study.md").read_text() in shown
    data = json.loads((folder / "study.json").read_text())
    assert data["comparisons"][0]["p"] == 1.0 and data["variants"]["grpo"]["seconds"] == 2.0
    before = (folder / "study.json").read_bytes()
    assert run_study(path, jobs=2) == 0 and started == ALL
    assert (folder / "study.json").read_bytes() == before


def test_only_the_rest_is_trained(trained):
    path, started, _ = trained
    study = load_study(path)
    for key in ALL[:2]:
        write_run(study.run_folder(*key), {0: 0.0, 2: 0.5}, n=8, config=study.runs[key])
    half = write_run(study.run_folder(*ALL[2]), {0: 0.0}, n=8, config=study.runs[ALL[2]])  # stopped before its evaluation
    assert find_state(study, ALL[2]) == "stopped after 1 step"
    assert run_study(path) == 0 and started == ALL[2:]
    assert len((half / "evaluation.jsonl").read_text().splitlines()) == 2


def test_a_dry_run_lists_and_writes_nothing(trained, capsys):
    path, started, folder = trained
    assert run_study(path, dry_run=True) == 0 and not started and not folder.exists()
    assert capsys.readouterr().out.count(": new\n") == 4


def test_a_failed_run_is_named_and_the_others_go_on(trained, capsys):
    path, started, folder = trained
    (folder / "grpo").mkdir(parents=True)
    (folder / "grpo" / "fail").touch()
    assert run_study(path) == 3 and started == ALL
    shown = capsys.readouterr()
    assert "grpo with seed 2 failed: no memory is left; see" in shown.err and "cispo with" not in shown.err
    assert "cispo and grpo share no seed that has finished" in shown.out
    (folder / "grpo" / "fail").unlink()
    del started[:]
    assert run_study(path) == 0 and started == ALL[:2]


def test_a_study_that_has_changed_is_refused(trained, tmp_path):
    path, started, _ = trained
    assert run_study(path) == 0
    del started[:]
    write_study(tmp_path, common=SMALL["common"] | {"trainer.num_steps": 3})
    with pytest.raises(ConfigError, match=r"trainer\.num_steps is 3 in the study, and 2 in the run .*seed-1; remove .*name"):
        run_study(path)
    assert not started
    write_study(tmp_path, common=SMALL["common"] | {"log.every": 7}, seeds=[1, 2, 3])  # no other numbers, and one seed more
    assert run_study(path) == 0 and started == [("grpo", 3), ("cispo", 3)]


def test_a_users_file_that_has_changed_is_refused(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def always(completions, **columns):\n    return [1.0 for _ in completions]\n")
    study = load_study(write_study(tmp_path, variants={"grpo": {}, "always": {"rewards": ["mine.py:always"]}}))
    key = ("always", 1)
    run = write_run(study.run_folder(*key), {0: 0.0, 2: 0.5}, config=study.runs[key])
    (run / "code").mkdir()
    (run / "code" / "mine.py").write_text(mine.read_text())  # as a run does
    assert find_state(study, key) == "finished"
    mine.write_text(mine.read_text() + "# another\n")
    with pytest.raises(ConfigError, match=r"mine\.py has changed since the run .*seed-1 began; remove"):
        find_state(study, key)


def test_the_picture(trained, monkeypatch):
    pytest.importorskip("matplotlib")
    path, _, folder = trained
    assert run_study(path) == 0
    assert (folder / "study.png").stat().st_size > 10_000
    (folder / "study.png").unlink()
    monkeypatch.setattr(command, "has_matplotlib", lambda: False)
    assert "study.png" not in write_comparison(load_study(path)) and not (folder / "study.png").exists()


@pytest.mark.soak
def test_the_last_run_of_a_study_is_trained(tmp_path, environment, monkeypatch):
    path = write_study(tmp_path)
    study = load_study(path)
    for key in ALL[:3]:
        write_run(study.run_folder(*key), {0: 0.0, 2: 0.5}, n=8, config=study.runs[key])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_study(path) == 0 and find_state(study, ALL[3]) == "finished"
    data = json.loads((study.folder / "study.json").read_text())
    assert [figures["seeds"] for figures in data["variants"].values()] == [2, 2]
    assert [row["step"] for row in data["variants"]["cispo"]["curve"]] == [0, 2]


@pytest.mark.soak
def test_a_study_is_stopped_resumed_and_compared(tmp_path, environment):
    """Two objectives, two seeds, two steps, in real runs; Ctrl-C ends the study during its second run."""
    path = write_study(tmp_path)
    folder = tmp_path / "runs" / "small"
    arguments = [sys.executable, "-m", "grpo_core", "study", str(path), "--jobs", "1"]
    process = subprocess.Popen(arguments, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (folder / "grpo" / "seed-2" / "metrics.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "SIGINT received; it is passed on to 1 run" in errors, errors
    assert not (folder / "cispo").exists()
    first = (folder / "grpo" / "seed-1" / "metrics.jsonl").read_bytes()
    done = subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (folder / "grpo" / "seed-1" / "metrics.jsonl").read_bytes() == first
    data = json.loads((folder / "study.json").read_text())
    assert [figures["seeds"] for figures in data["variants"].values()] == [2, 2]
    assert [row["step"] for row in data["variants"]["cispo"]["curve"]] == [0, 2]
    (row,) = data["comparisons"]
    assert row["conclusion"] in done.stdout and row["smallest_p"] == 0.5
