"""Store the data of published runs, and draw the figures and tables of README, docs/performance.md and docs/results.

    python benchmarks/results.py keep runs/experiments/NAME...     store the data of these runs in benchmarks/results/runs
    python benchmarks/results.py draw                              draw figures and tables from benchmarks/results alone
    python benchmarks/results.py check                             exit code 1 if a table of the pages is not that of the data

`keep` stores config.yaml, evaluation.jsonl, the results of `evaluate`, some columns of metrics.jsonl in five digits and,
for built-in problems, 20 completions before and after training. Rows of other data sets are stored by number only.
"""

import argparse
import json
import statistics
import sys
from itertools import pairwise
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "configs" / "experiments")]
import peers
from experiments import CHAINS, GSM8K
from right_calculations import MARKED, holds

from grpo_core.report.seed_statistics import exchange_p
from grpo_core.training.eval_statistics import mcnemar, wilson_interval

RESULTS = ROOT / "docs" / "results"
DATA = ROOT / "benchmarks" / "results" / "runs"
SOAK = ROOT / "benchmarks" / "results" / "soak.json"
COLUMNS = (
    "step", "reward", "rewards/correct_answer", "first_draw/reward", "first_draw/tied_groups", "tied_groups", "resampled_groups",
    "length", "truncated", "tokens", "tokens_sampled", "micro_batches",
    "entropy", "kl", "kl_exact", "ratio", "clip_frac", "grad_norm", "logprob_gap", "tokens_updated", "seconds", "seconds/sample",
    "seconds/reward", "seconds/freeze", "seconds/update", "seconds/evaluate", "seconds/checkpoint", "peak_memory_gb",
)  # fmt: skip
NUM_PUBLISHED = 20  # completions before and after training
VARIANTS_STUDY = ROOT / "configs" / "experiments" / "variants.yaml"
VARIANTS = [*yaml.safe_load(VARIANTS_STUDY.read_text())["variants"]]  # one_step is the last
SEEDS = (1, 2, 3)
SEEDS_BESIDE_TRL = (0, 1, 2)
FIRST_PASS = "first_pass/"  # folder of the earlier runs of parts 3 to 5, with the code of that time
WITH_8192 = "with_8192/"  # folder of part 5 with half as many completions per step
GSM8K_EARLIER = [f"gsm8k_earlier_{run}" for run in ("2_1e-4", "2_2e-4", "4_2e-4", "6_3e-4", "6_7e-5")]
GSM8K_TRIED = ("gsm8k", "gsm8k_drills", "gsm8k_calculations")
TRIED = [name for name in CHAINS if name.startswith("tried_")]  # tried_TEMPERATURE_LEARNING-RATE
ON_A_CPU = ("reversed_words", "reversed_words_sft")  # the example of docs/data.md
COLOURS = ("#0072b2", "#d55e00", "#00805e", "#a8447f", "#8c6a00")


def read(path):
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]  # str.splitlines would also split at U+2028


def read_data(path):
    """Return the rows of a data set if it is a file of JSON lines in the repository, otherwise an empty list."""
    return read(ROOT / path) if path.endswith(".jsonl") and (ROOT / path).exists() else []


def shorten(value):
    """Round a float to five digits; return other values unchanged."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def keep(run):
    """Store the published data of a run folder under its name; an untrained model's folder has evaluations only.

    A run of the study of part 3 is stored as variant_NAME_SEED.
    """
    to = DATA / (variant(run.parent.name, run.name.removeprefix("seed-")) if run.name.startswith("seed-") else run.name)
    to.mkdir(parents=True, exist_ok=True)
    for name in ("evaluation.jsonl", "config.yaml", "trl.jsonl"):
        if (run / name).exists():
            (to / name).write_bytes((run / name).read_bytes())
    if (run / "metrics.jsonl").exists() and not run.name.startswith(("tried_", "gsm8k_earlier_")):
        rows = [{name: shorten(row[name]) for name in COLUMNS if row.get(name) is not None} for row in read(run / "metrics.jsonl")]
        (to / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = yaml.safe_load((to / "config.yaml").read_text()) if (to / "config.yaml").exists() else None
    builtin = config is not None and config["data"]["path"].startswith("builtin:")
    if builtin and (run / "evaluation_completions.jsonl").exists():
        rows = read(run / "evaluation_completions.jsonl")
        write_completions(to, *({row["task"]: row for row in rows if row["step"] == step} for step in (0, rows[-1]["step"])))
    for folder in sorted(run.glob("evaluate*")):
        if folder.is_dir():
            keep_evaluation(folder, to, with_text=builtin and folder.name == "evaluate")


def write_completions(to, before, after):
    """Write completions.md; `before` and `after` are task -> row of the same problems."""
    lines = [f"# {to.name}: the first {NUM_PUBLISHED} held-out problems, answered greedily before and after\n"]
    for task in sorted(after)[:NUM_PUBLISHED]:
        question = after[task]["prompt"].split("Problem: ")[-1].split("\n")[0].split("<|im_end|>")[0]
        lines.append(f"**{task + 1}.** {question}\n")
        for rows, when in ((before, "before"), (after, "after")):
            if row := rows.get(task):
                lines.append(f"{when} ({'right' if row['correct'] else 'wrong'}):\n\n```text\n{row['text'].strip()}\n```\n")
    (to / "completions.md").write_text("\n".join(lines))


def keep_evaluation(folder, to, *, with_text):
    """Store the figures, the problems that were solved greedily, and with `with_text` some answers."""
    result, rows = json.loads((folder / "evaluate.json").read_text()), read(folder / "completions.jsonl")
    if solutions := [row["answer"] for row in read_data(result["data"]["path"]) if "answer" in row]:
        result["calculations"] = [len(MARKED.findall(text)) for text in solutions[: result["policy"]["greedy"]["n"]]]
    result["source"] = Path(result["source"]).name
    result.pop("weights")
    result["data"]["path"] = Path(result["data"]["path"]).name
    greedy = {(row["policy"], row["task"]): row for row in rows if row["sample"] == 0}
    result["solved"] = {
        policy: sorted(task for (name, task), row in greedy.items() if name == policy and row["correct"])
        for policy in ("base", "policy") if policy in result
    }  # fmt: skip
    result["slips"] = {
        policy: sum(has_slip(row["text"]) for (name, _), row in greedy.items() if name == policy and not row["correct"])
        for policy in result["solved"]
    }
    if "calculations" in result:
        result["operations"] = {
            policy: count_operations(row["text"] for (name, _), row in greedy.items() if name == policy) for policy in result["solved"]
        }
    (to / f"{folder.name}.json").write_text(json.dumps(result) + "\n")
    if with_text:
        write_completions(to, *({task: row for (name, task), row in greedy.items() if name == policy} for policy in ("base", "policy")))


def has_slip(text):
    """Return True if one of the marked calculations in the text, <<3*4=12>>, is wrong."""
    return any(not holds(formula, result) for formula, result in MARKED.findall(text))


def count_operations(texts):
    """Count the marked calculations in the texts: kind of calculation -> [wrong, all]."""
    counts = {}
    for formula, result in (pair for text in texts for pair in MARKED.findall(text)):
        signs = [sign for sign in formula if sign in "+-*/"]
        kind = f"{len(signs) + 1} numbers, {signs[0]}" if len({*signs}) == 1 and len(signs) <= 2 else "others"
        count = counts.setdefault(kind, [0, 0])
        count[0] += not holds(formula, result)
        count[1] += 1
    return counts


def read_evaluations(name):
    """Return the rows of evaluation.jsonl of a run: step, accuracy and more."""
    return read(DATA / name / "evaluation.jsonl")


def sum_trained_seconds(name):
    """Return the seconds of training after 0, 1, 2, ... steps, without evaluations and checkpoints.

    The first step counts with its phases only: neither side's seconds include loading and probing.
    """
    total, totals = 0.0, [0.0]
    for i, row in enumerate(read(DATA / name / "metrics.jsonl")):
        phases = sum(row.get(f"seconds/{phase}", 0.0) for phase in ("sample", "reward", "freeze", "update"))
        rest = row["seconds"] - sum(row.get(f"seconds/{phase}", 0.0) for phase in ("evaluate", "checkpoint"))
        total += phases if i == 0 else rest
        totals.append(total)
    return totals


def format_percent(share, digits=1):
    return f"{100 * share:.{digits}f} %"


def format_interval(correct, n):
    """Return the share with its 95 % Wilson interval as text."""
    low, high = wilson_interval(correct, n)
    return f"{format_percent(correct / n)} ({100 * low:.1f} to {100 * high:.1f})"


def make_figure(width=6.4, height=3.2):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("held-out accuracy")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.grid(axis="y", alpha=0.25)
    return figure, axes


def draw_curve(axes, name, label, colour, x=None):
    """Draw the accuracy of a run with intervals over its steps, or over x[step]."""
    rows = read_evaluations(name)
    positions = [x[row["step"]] if x else row["step"] for row in rows]
    axes.plot(positions, [row["accuracy"] for row in rows], color=colour, marker="o", ms=3, label=label)
    axes.fill_between(positions, [row["ci_low"] for row in rows], [row["ci_high"] for row in rows], color=colour, alpha=0.15, lw=0)


def draw_word_problems():
    figure, axes = make_figure()
    draw_curve(axes, "word_problems", "greedy, 95 % interval", COLOURS[0])
    axes.set_xlabel("step")
    axes.set_title("SmolLM2-135M-Instruct on word problems, from the instruct weights", loc="left", fontsize=10)
    figure.savefig(RESULTS / "word_problems.png")


def draw_reversed_words():
    figure, axes = make_figure(height=2.8)
    draw_curve(axes, "reversed_words", "greedy, 95 % interval", COLOURS[0])
    axes.set_xlabel("step")
    axes.set_ylim(0, None)
    axes.set_title("A small model on a task of Reasoning Gym: spell a word backward", loc="left", fontsize=10)
    figure.savefig(RESULTS / "reversed_words.png")


def read_evaluate(name):
    """Return the stored result of `evaluate` on a run's held-out problems."""
    return json.loads((DATA / name / "evaluate.json").read_text())


def word_problems_table():
    """Return the table of part 1: greedy accuracy on the curve's problems and on the others, sampled accuracy on all."""
    result = read_evaluate("word_problems")
    n, num_watched = result["policy"]["greedy"]["n"], read_evaluations("word_problems")[0]["n"]
    rows = [("before", "base"), ("after", "policy")]
    lines = [f"| | the {num_watched} that the curve shows | {n - num_watched} others | mean@8 | pass@8 | tokens | cut off |", "|---|---|---|---|---|---|---|"]
    for label, policy in rows:
        solved, figures = result["solved"][policy], result[policy]
        first = sum(task < num_watched for task in solved)
        cells = [format_interval(first, num_watched), format_interval(len(solved) - first, n - num_watched)]
        cells += [format_percent(figures[k]["value"]) for k in ("mean@8", "pass@8")]
        cells += [f"{figures['length']['value']:.0f}", format_percent(figures["cut off"]["value"])]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tried_table():
    """Return the table of the runs by which the settings of part 1 were chosen."""
    lines = ["| temperature | learning rate | after 50 steps | 100 | 150 | 200 | 250 |", "|---|---|---|---|---|---|---|"]
    for run in TRIED:
        rows = {row["step"]: row["accuracy"] for row in read_evaluations(run)}
        _, temperature, rate = run.split("_")
        lines.append(f"| {temperature} | {rate} | {' | '.join(format_percent(rows[step]) for step in (50, 100, 150, 200, 250))} |")
    return "\n".join(lines)


def reward_hacking_table():
    result = read_evaluate("reward_hacking")
    lines = ["| | held-out accuracy | the combined reward | tokens | cut off |", "|---|---|---|---|---|"]
    for label, policy in (("before", "base"), ("after", "policy")):
        figures, n = result[policy], result[policy]["greedy"]["n"]
        cells = [format_interval(len(result["solved"][policy]), n), f"{figures['reward combined']['value']:.1f}"]
        cells += [f"{figures['length']['value']:.0f}", format_percent(figures["cut off"]["value"])]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def runs_table():
    """Return the table of the tokens, seconds and memory of every run on a GPU except those of part 3."""
    lines = ["| run | steps | completions a step | tokens sampled | seconds of training | a step (median) | GPU memory |", "|---|---|---|---|---|---|---|"]
    for folder in sorted(DATA.iterdir()):
        if folder.name.startswith(("variant_", *ON_A_CPU)) or not (folder / "metrics.jsonl").exists():
            continue
        rows, clock = read(folder / "metrics.jsonl"), sum_trained_seconds(folder.name)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        step = statistics.median(b - a for a, b in pairwise(clock))
        tokens, memory = "none", ""  # a supervised run samples nothing
        if "reward" in rows[0]:
            tokens = f"{sum(row.get('tokens_sampled', row['tokens']) for row in rows) / 1e6:.1f} M"
            memory = f"{max(row['peak_memory_gb'] for row in rows):.0f} GB"
        lines.append(
            f"| {folder.name} | {len(rows)} | {config['trainer']['completions_per_step']:,} | {tokens} | {clock[-1]:.0f} | "
            f"{step:.2f} s | {memory} |"
        )
    return "\n".join(lines)


def read_trl_comparison(seed, first_pass=False):
    """Return for grpo_core and for TRL the (seconds, accuracy, step) of every evaluation, and the seconds per step."""
    name = f"{FIRST_PASS}against_trl" if first_pass else f"against_trl_{seed}"
    clock, trl_rows = sum_trained_seconds(name), read(DATA / name / "trl.jsonl")
    last = trl_rows[-1]["step"]
    ours = [(clock[row["step"]], row["accuracy"], row["step"]) for row in read_evaluations(name)]
    trl = [(row["seconds"], row["correct"] / row["n"], row["step"]) for row in trl_rows]
    return (ours, clock[last] / last), (trl, trl[-1][0] / last)


def draw_against_trl():
    figure, axes = make_figure()
    for side, label in enumerate(("grpo_core", "TRL 1.16")):
        for seed, style in zip(SEEDS_BESIDE_TRL, ("-", "--", ":"), strict=True):
            rows, _ = read_trl_comparison(seed)[side]
            seconds, values, _ = zip(*rows, strict=True)
            axes.plot(seconds, values, style, color=COLOURS[side], marker="o", ms=3, lw=1.2, label=f"{label}, seed {seed}, {rows[-1][2]} steps")
    axes.set_xscale("symlog", linthresh=10)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("seconds of training, evaluation excluded (up to 10 linear, then logarithmic)")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    axes.set_ylim(top=0.56)
    figure.savefig(RESULTS / "against_trl.png")


def find_seconds_to(rows, target):
    """Return the seconds until accuracy first reaches `target`, linearly interpolated; None if it never does."""
    for (x0, y0), (x1, y1) in pairwise(rows):
        if y1 >= target:
            return x0 + (x1 - x0) * (target - y0) / (y1 - y0) if y0 < target else x0
    return None


def against_trl_table():
    """Return the table of seconds and steps to the same accuracies: medians and single seeds of both sides, and ratios."""
    pairs, first_pass = [read_trl_comparison(seed) for seed in SEEDS_BESIDE_TRL], read_trl_comparison(0, first_pass=True)
    lines = ["| held-out accuracy | grpo_core: median (seeds) | TRL 1.16 | ratio | in steps: grpo_core, TRL | ratio in the first pass |", "|---|---|---|---|---|---|"]

    def median(values):
        return statistics.median(float("inf") if value is None else value for value in values)

    def make_row(label, sides, steps, first_pass_sides, digits):
        seed_texts = [", ".join("never" if value is None else f"{value:.{digits}f}" for value in side) for side in sides]
        cells = [f"{median(side):.{digits}f} s ({text})" for side, text in zip(sides, seed_texts, strict=True)]
        cells += [f"{median(sides[1]) / median(sides[0]):.1f} ×", ", ".join(f"{median(side):.0f}" for side in steps)]
        return f"| {label} | {' | '.join(cells)} | {f'{first_pass_sides[1] / first_pass_sides[0]:.1f} ×' if all(first_pass_sides) else ''} |"

    def find_all_to(target, column):
        """Return seconds (column 0) or steps (column 2) to the accuracy, [side][seed]."""
        return [[find_seconds_to([(row[column], row[1]) for row in pair[side][0]], target) for pair in pairs] for side in (0, 1)]

    for target in (0.05, 0.1, 0.15, 0.2, 0.3):
        seconds = find_all_to(target, 0)
        if all(sum(value is not None for value in side) > len(pairs) / 2 for side in seconds):
            first_pass_seconds = [find_seconds_to([row[:2] for row in rows], target) for rows, _ in first_pass]
            lines.append(make_row(format_percent(target), seconds, find_all_to(target, 2), first_pass_seconds, 0))
    steps = [[pair[side][1] for pair in pairs] for side in (0, 1)]
    lines.append(make_row("a step, mean up to TRL's last evaluation", steps, [], [seconds for _, seconds in first_pass], 2))
    return "\n".join(lines)


def variant(name, seed):
    return f"variant_{name}_{seed}"


def draw_variants():
    """Draw a panel per objective: mean and range of the seeds, first-pass runs dotted, means of other objectives in grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True).flat
    runs = {name: [read_evaluations(variant(name, seed)) for seed in SEEDS] for name in VARIANTS}
    steps = [row["step"] for row in runs["grpo"][0]]
    values = {name: [[row["accuracy"] for row in rows] for rows in zip(*seeds, strict=True)] for name, seeds in runs.items()}
    for axes, name, colour in zip(panels, VARIANTS, (*COLOURS, "#374151"), strict=True):
        for other in VARIANTS:
            axes.plot(steps, [statistics.mean(accuracies) for accuracies in values[other]], color="#c9ced6", lw=1)
        for run in read_pass(FIRST_PASS, name):
            axes.plot(steps, [row["accuracy"] for row in run], ":", color=colour, lw=1)
        axes.fill_between(steps, [min(accuracies) for accuracies in values[name]], [max(accuracies) for accuracies in values[name]], color=colour, alpha=0.2, lw=0)
        axes.plot(steps, [statistics.mean(accuracies) for accuracies in values[name]], color=colour, lw=2)
        axes.set_title(name, fontsize=10, color=colour)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("held-out accuracy", fontsize=10)
    figure.savefig(RESULTS / "variants.png")


def read_pass(folder, name):
    """Return the evaluations of an objective's runs in one pass, one list per seed; runs that do not exist are left out."""
    paths = [folder + variant(name, seed) for seed in SEEDS]
    return [read_evaluations(path) for path in paths if (DATA / path).exists()]


def variants_table():
    steps = (20, 40, 50, 60)
    head = " | ".join([f"after {step} steps" for step in steps[:-1]] + [f"{steps[-1]}: mean (seeds)", f"{steps[-1]} in the first pass"])
    lines = [f"| | {head} | length | KL | clipped | tokens sampled | seconds |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for name in VARIANTS:
        second_pass, first_pass = ([{row["step"]: row["accuracy"] for row in run} for run in read_pass(folder, name)] for folder in ("", FIRST_PASS))
        means = [format_percent(statistics.mean(run[step] for run in second_pass)) for step in steps]
        rows = [read(DATA / variant(name, seed) / "metrics.jsonl") for seed in SEEDS]
        length = statistics.mean(statistics.mean(row["length"] for row in run[-10:]) for run in rows)
        kl = statistics.mean([row["kl_exact"] for row in run if "kl_exact" in row][-1] for run in rows)
        tokens = statistics.mean(sum(row.get("tokens_sampled", row["tokens"]) for row in run) for run in rows)
        seconds = statistics.mean(sum_trained_seconds(variant(name, seed))[-1] for seed in SEEDS)
        clipped = statistics.mean(row["clip_frac"] for run in rows for row in run if "clip_frac" in row)
        finals = [[run[steps[-1]] for run in runs] for runs in (second_pass, first_pass)]
        means[-1:] = [f"{format_percent(statistics.mean(values))} ({', '.join(f'{100 * value:.1f}' for value in values)})" if values else "" for values in finals]
        cells = [*means, f"{length:.0f}", f"{kl:.1f}", format_percent(clipped, 2), f"{tokens / 1e6:.1f} M", f"{seconds:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def variants_pairs_table():
    """Return the table of the objectives after the last step of both passes, with a permutation test of every pair."""
    names = VARIANTS[:-1]
    passes = {name: [[run[-1]["accuracy"] for run in read_pass(folder, name)] for folder in ("", FIRST_PASS)] for name in names}
    runs = {name: [*zip(*both, strict=True)] for name, both in passes.items()}  # [seed][pass]
    lines = [f"| | six runs: mean (range) | {' | '.join(f'p against {name}' for name in names[:-1])} |", "|---" * (len(names) + 1) + "|"]
    for position, name in enumerate(names):
        six = [value for seed in runs[name] for value in seed]
        cells = [f"{format_percent(statistics.mean(six))} ({100 * min(six):.1f} to {100 * max(six):.1f})"]
        cells += [f"{exchange_p(runs[name], runs[other]):.2g}" if i < position else "" for i, other in enumerate(names[:-1])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    gaps = [abs(second - first) for seeds in runs.values() for second, first in seeds]
    sentence = f"Two runs of one objective and one seed ended {100 * statistics.mean(gaps):.1f} points apart on average, {100 * max(gaps):.1f} at the most."
    return "\n".join([*lines, "", sentence])


def draw_two_gpus():
    figure, axes = make_figure()
    draw_curve(axes, "one_gpu", "one GPU", COLOURS[0], sum_trained_seconds("one_gpu"))
    draw_curve(axes, "two_gpus", "two GPUs", COLOURS[1], sum_trained_seconds("two_gpus"))
    axes.set_xlabel("seconds of training, evaluation excluded")
    axes.legend(frameon=False)
    figure.savefig(RESULTS / "two_gpus.png")


def two_gpus_table():
    lines = [
        "| | before | after | tokens sampled | computed in updates | seconds of training | sampling | rewards | updates | the rest |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for folder, pass_name in (("", "second pass"), (FIRST_PASS, "first pass"), (WITH_8192, "8,192 completions")):
        seconds_of_runs = []
        for name, label in (("one_gpu", "one GPU"), ("two_gpus", "two GPUs")):
            rows, metrics = read_evaluations(folder + name), read(DATA / folder / name / "metrics.jsonl")
            phases = [sum(row[f"seconds/{phase}"] for row in metrics) for phase in ("sample", "reward", "update")]
            total = sum_trained_seconds(folder + name)[-1]
            seconds = [total, *phases, total - sum(phases)]
            cells = [format_interval(rows[i]["correct"], rows[i]["n"]) for i in (0, -1)]
            cells += [f"{sum(row[kind] for row in metrics) / 1e6:.2f} M" for kind in ("tokens", "tokens_updated")]
            lines.append(f"| {pass_name}: {label} | {' | '.join(cells)} | {' | '.join(f'{value:.1f}' for value in seconds)} |")
            seconds_of_runs.append(seconds)
        ratios = [f"{one_gpu / two_gpus:.2f} ×" for one_gpu, two_gpus in zip(*seconds_of_runs, strict=True)]
        lines.append(f"| {pass_name}: ratio | | | | | {' | '.join(ratios[:-1])} | |")
    return "\n".join(lines)


def draw_reward_hacking():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = read(DATA / "reward_hacking" / "metrics.jsonl")
    left.plot([row["step"] for row in rows], [row["reward"] for row in rows], color=COLOURS[1])
    left.set(xlabel="step", title="the published combined reward")
    right.set(xlabel="step", title="held-out accuracy", ylim=(0, 1))
    right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    draw_curve(right, "reward_hacking", None, COLOURS[0])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "reward_hacking.png")


def read_test(name):
    """Return the stored result of `evaluate` on GSM8K's test set."""
    return json.loads((DATA / name / "evaluate-test.json").read_text())


def read_gsm8k():
    """Return (label, figures, solved, slips) on the test set for the base model, the warm-up and GRPO."""
    base, trained = read_test("gsm8k_base"), read_test(GSM8K)
    policies = (("base", base, "policy"), ("supervised warm-up", trained, "base"), ("GRPO", trained, "policy"))
    return [(label, result[policy], result["solved"][policy], result["slips"][policy]) for label, result, policy in policies]


def gsm8k_tried_table():
    """Return the table of the three GSM8K runs; the published run was chosen by these held-out training questions."""
    steps = range(0, 201, 20)
    lines = [f"| held-out training questions after | {' | '.join(map(str, steps))} |", "|---" * (len(steps) + 1) + "|"]
    for name in GSM8K_TRIED:
        rows = {row["step"]: row["accuracy"] for row in read_evaluations(name)}
        lines.append(f"| {name} | {' | '.join(format_percent(rows[step]) if step in rows else '' for step in steps)} |")
    return "\n".join(lines)


def gsm8k_earlier_table():
    """Return the table of the runs by which the settings were chosen: GRPO after supervised starts of several lengths."""
    lines = ["| supervised epochs | learning rate | steps | 0 | 20 | 40 | 60 | 80 | 100 |", "|---|---|---|---|---|---|---|---|---|"]
    for name in GSM8K_EARLIER:
        rows, config = read_evaluations(name), yaml.safe_load((DATA / name / "config.yaml").read_text())
        engine, accuracies = config["engine"], {row["step"]: format_percent(row["accuracy"]) for row in rows}
        start = name.split("_")[2] + ("" if config["data"]["eval_path"] else " *")
        cells = [start, f"{float(engine['learning_rate']):.0e}, {engine['schedule']}", f"{rows[-1]['step']}", *(accuracies.get(step, "") for step in range(0, 101, 20))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gsm8k_operations_table():
    """Return the table of wrong results among the marked calculations of the greedy test answers."""
    operations = read_test(GSM8K)["operations"]
    lines = ["| a calculation of | supervised warm-up: wrong | GRPO: wrong |", "|---|---|---|"]
    for kind in sorted(operations["policy"], key=lambda kind: (kind == "others", kind)):
        counts = [operations[name].get(kind) for name in ("base", "policy")]
        cells = [f"{format_percent(count[0] / count[1])} of {count[1]}" if count else "none" for count in counts]
        lines.append(f"| {kind.replace('*', '×')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gsm8k_calculations_table():
    """Return the table of solved test questions by the number of marked calculations in their solution."""
    num_calculations, rows = read_test(GSM8K)["calculations"], read_gsm8k()[1:]
    lines = ["| calculations in the given solution | questions | supervised warm-up | GRPO |", "|---|---|---|---|"]
    for low, high in ((0, 1), (2, 2), (3, 3), (4, 4), (5, max(num_calculations))):
        if tasks := {task for task, count in enumerate(num_calculations) if low <= count <= high}:
            shares = [format_percent(len(tasks & {*solved}) / len(tasks)) for _, _, solved, _ in rows]
            lines.append(f"| {low if low == high else f'{low} to {high}'} | {len(tasks)} | {' | '.join(shares)} |")
    return "\n".join(lines)


def gsm8k_table():
    rows, lines = read_gsm8k(), ["| | greedy | mean@8 | pass@8 | maj@8 | cut off |", "|---|---|---|---|---|---|"]
    for label, figures, solved, _ in rows:
        cells = [format_interval(len(solved), figures["greedy"]["n"])]
        cells += [f"{format_percent(figures[k]['value'])} ({100 * figures[k]['ci_low']:.1f} to {100 * figures[k]['ci_high']:.1f})" for k in ("mean@8", "pass@8", "maj@8")]
        cells.append(format_percent(figures["cut off"]["value"]))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    n, before, after = rows[1][1]["greedy"]["n"], set(rows[1][2]), set(rows[2][2])
    lost, won, p = mcnemar([i in before for i in range(n)], [i in after for i in range(n)])
    slip_shares = [format_percent(slips / (n - len(solved))) for _, _, solved, slips in rows[1:]]
    sentence = f"Wrong answers in which a marked calculation has a wrong result: {slip_shares[0]} of the warm-up's, {slip_shares[1]} of GRPO's."
    return "\n".join([*lines, "", f"GRPO against the warm-up, greedily and problem by problem: {won} won, {lost} lost, McNemar's p = {p:.2g}.", "", sentence])


def draw_gsm8k():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, label, colour in zip(GSM8K_TRIED, ("gsm8k", "drills", "calculations"), COLOURS[:3], strict=True):
        rows = read_evaluations(name)
        left.plot([row["step"] for row in rows], [row["accuracy"] for row in rows], color=colour, marker="o", ms=2, lw=1, label=label)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    left.set(xlabel="step", title="500 held-out training questions")
    left.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    for position, (_, figures, solved, _) in enumerate(read_gsm8k()):
        n = figures["greedy"]["n"]
        low, high = wilson_interval(len(solved), n)
        share = len(solved) / n
        right.bar(position, share, color="#8a94a0", width=0.6, yerr=[[share - low], [high - share]], capsize=3)
    right.set_xticks(range(3), ["base", "warm-up", "GRPO"])
    right.set_title("1,319 test questions, greedy")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.savefig(RESULTS / "gsm8k.png")


TABLES = {  # a table's mark in a page -> the function that renders it
    "word_problems": word_problems_table, "tried": tried_table, "reward_hacking": reward_hacking_table, "runs": runs_table,
    "gsm8k": gsm8k_table, "gsm8k_tried": gsm8k_tried_table, "gsm8k_calculations": gsm8k_calculations_table,
    "gsm8k_earlier": gsm8k_earlier_table, "gsm8k_operations": gsm8k_operations_table, "against_trl": against_trl_table, "variants": variants_table,
    "variants_pairs": variants_pairs_table, "two_gpus": two_gpus_table, "peers": peers.table,
}  # fmt: skip
def draw_soak():
    """Draw resident memory over the steps of the last long trace of the embedded job."""
    rows = {row["workload"].partition(", MiB")[0].partition(": ")[2]: row for row in read(SOAK) if row["workload"].startswith("the embedded job")}
    figure, axes = make_figure()
    for colour, (name, label) in zip(COLOURS, (("resident memory", "training process"), ("resident memory of the children", "process of the reward")), strict=False):
        steps, values = zip(*rows[name]["trace"], strict=True)
        axes.plot(steps, values, color=colour, label=f"{label}: {rows[name]['ours']:+.2f} MiB per 1,000 steps after step 200")
    axes.set(xlabel="step", ylabel="resident memory, MiB", ylim=(0, None))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title("The embedded job over 5,000 steps", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="center left")
    figure.savefig(RESULTS / "soak.png")


PICTURES = {  # function that draws a picture -> the runs in it
    draw_word_problems: ["word_problems"], draw_gsm8k: [*GSM8K_TRIED, "gsm8k_base"], draw_against_trl: [f"against_trl_{seed}" for seed in SEEDS_BESIDE_TRL],
    draw_variants: [variant(name, seed) for name in VARIANTS for seed in SEEDS], draw_two_gpus: ["one_gpu", "two_gpus"],
    draw_reward_hacking: ["reward_hacking"], draw_soak: [], draw_reversed_words: ["reversed_words"],
}  # fmt: skip


PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md", RESULTS / "README.md")  # these have tables between marks


def fill_in(text):
    """Return the page with every table between marks made again."""
    for name, table in TABLES.items():
        begin, end = f"<!-- table: {name} -->\n", f"<!-- end: {name} -->"
        if begin in text:
            head, _, rest = text.partition(begin)
            text = f"{head}{begin}{table()}\n{end}{rest.partition(end)[2]}"
    return text


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["keep", "draw", "check"])
    parser.add_argument("runs", nargs="*", type=Path)
    options = parser.parse_args()
    if options.what == "keep":
        for run in options.runs:
            keep(run)
        return
    if options.what == "check":
        stale = [page.name for page in PAGES if fill_in(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
        sys.exit(f"the tables of {', '.join(stale)} are not those of benchmarks/results/runs" if stale else 0)
    for picture, runs in PICTURES.items():
        if missing := [run for run in runs if not (DATA / run).exists()]:
            print(f"{picture.__name__}: not drawn, there is no data of {', '.join(missing)}")
        else:
            picture()
    for page in PAGES:
        page.write_text(fill_in(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
