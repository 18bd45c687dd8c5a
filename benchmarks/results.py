"""docs/results from run folders: what is kept of a run, and every figure and table there.

    python benchmarks/results.py keep runs/experiments/NAME...     what a page needs of these runs, to benchmarks/results/runs
    python benchmarks/results.py draw                              the pictures and tables of PAGES, from benchmarks/results alone

Kept are config.yaml, evaluation.jsonl, what `evaluate` wrote beside its completions, some columns of metrics.jsonl in five
digits, and of built-in problems 20 completions before and after. Rows of other data appear by their number alone.
"""

import argparse
import json
import statistics
import sys
from itertools import combinations, pairwise, product
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "configs" / "experiments")]
import peers
from experiments import CHAINS, GSM8K
from right_calculations import MARKED, holds

from grpo_core.training.eval_statistics import mcnemar, wilson_interval

RESULTS = ROOT / "docs" / "results"
DATA = ROOT / "benchmarks" / "results" / "runs"
COLUMNS = (
    "step", "reward", "rewards/correct_answer", "first_draw/reward", "first_draw/tied_groups", "tied_groups", "resampled_groups",
    "length", "truncated", "tokens", "tokens_sampled", "micro_batches",
    "entropy", "kl", "kl_exact", "ratio", "clip_frac", "grad_norm", "logprob_gap", "tokens_updated", "seconds", "seconds/sample",
    "seconds/reward", "seconds/freeze", "seconds/update", "seconds/evaluate", "seconds/checkpoint", "peak_memory_gb",
)  # fmt: skip
SHOWN = 20  # completions before and after
VARIANTS = [name.removeprefix("variants_") for name in CHAINS if name.startswith("variants_")]  # the control is the last
SEEDS = (1, 2, 3)
SEEDS_BESIDE_TRL = (0, 1, 2)
FIRST_PASS = "first_pass/"  # parts 3 to 5 as they were run before, with the code of then
WITH_8192 = "with_8192/"  # part 5 with half as many completions a step
GSM8K_EARLIER = [f"gsm8k_earlier_{run}" for run in ("2_1e-4", "2_2e-4", "4_2e-4", "6_3e-4", "6_7e-5")]
GSM8K_TRIED = ("gsm8k", "gsm8k_drills", "gsm8k_calculations")
TRIED = [name for name in CHAINS if name.startswith("tried_")]  # tried_TEMPERATURE_LEARNING-RATE
COLOURS = ("#0072b2", "#d55e00", "#00805e", "#a8447f", "#8c6a00")


def read(path):
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]  # of text they end at U+2028 too


def of_file(path):
    """The rows of a data set that is a file of JSON lines here, none of another."""
    return read(ROOT / path) if path.endswith(".jsonl") and (ROOT / path).exists() else []


def short(value):
    return float(f"{value:.5g}") if isinstance(value, float) else value


def keep(run):
    """What a page needs of a run folder, under its name; of a folder of evaluations alone (an untrained model's), those."""
    to = DATA / run.name
    to.mkdir(parents=True, exist_ok=True)
    for name in ("evaluation.jsonl", "config.yaml", "trl.jsonl"):
        if (run / name).exists():
            (to / name).write_bytes((run / name).read_bytes())
    if (run / "metrics.jsonl").exists() and not run.name.startswith(("tried_", "gsm8k_earlier_")):
        rows = [{name: short(row[name]) for name in COLUMNS if row.get(name) is not None} for row in read(run / "metrics.jsonl")]
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
    """completions.md: task -> row of the same problems before and after."""
    lines = [f"# {to.name}: the first {SHOWN} held-out problems, answered greedily before and after\n"]
    for task in sorted(after)[:SHOWN]:
        question = after[task]["prompt"].split("Problem: ")[-1].split("\n")[0].split("<|im_end|>")[0]
        lines.append(f"**{task + 1}.** {question}\n")
        for rows, when in ((before, "before"), (after, "after")):
            if row := rows.get(task):
                lines.append(f"{when} ({'right' if row['correct'] else 'wrong'}):\n\n```text\n{row['text'].strip()}\n```\n")
    (to / "completions.md").write_text("\n".join(lines))


def keep_evaluation(folder, to, *, with_text):
    """The figures, which problems were solved greedily, and for built-in problems some answers."""
    result, rows = json.loads((folder / "evaluate.json").read_text()), read(folder / "completions.jsonl")
    if solutions := [row["answer"] for row in of_file(result["data"]["path"]) if "answer" in row]:
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
        policy: sum(slips(row["text"]) for (name, _), row in greedy.items() if name == policy and not row["correct"])
        for policy in result["solved"]
    }
    if "calculations" in result:
        result["operations"] = {
            policy: operations(row["text"] for (name, _), row in greedy.items() if name == policy) for policy in result["solved"]
        }
    (to / f"{folder.name}.json").write_text(json.dumps(result) + "\n")
    if with_text:
        write_completions(to, *({task: row for (name, task), row in greedy.items() if name == policy} for policy in ("base", "policy")))


def slips(text):
    """Whether one of its marked calculations, <<3*4=12>>, is wrong."""
    return any(not holds(formula, result) for formula, result in MARKED.findall(text))


def operations(texts):
    """Of marked calculations by what they do: how many are wrong, and how many there are."""
    found = {}
    for formula, result in (pair for text in texts for pair in MARKED.findall(text)):
        signs = [sign for sign in formula if sign in "+-*/"]
        kind = f"{len(signs) + 1} numbers, {signs[0]}" if len({*signs}) == 1 and len(signs) <= 2 else "others"
        told = found.setdefault(kind, [0, 0])
        told[0] += not holds(formula, result)
        told[1] += 1
    return found


def accuracy(name):
    """Steps and the evaluations' rows of a run."""
    return read(DATA / name / "evaluation.jsonl")


def trained_seconds(name):
    """Seconds of training after each number of steps, without evaluations and checkpoints; 0 after 0 steps.

    The first row's are those of its phases: what was loaded and tried before the first step is in neither side's clock.
    """
    total, found = 0.0, [0.0]
    for i, row in enumerate(read(DATA / name / "metrics.jsonl")):
        phases = sum(row.get(f"seconds/{phase}", 0.0) for phase in ("sample", "reward", "freeze", "update"))
        rest = row["seconds"] - sum(row.get(f"seconds/{phase}", 0.0) for phase in ("evaluate", "checkpoint"))
        total += phases if i == 0 else rest
        found.append(total)
    return found


def percent(share, digits=1):
    return f"{100 * share:.{digits}f} %"


def interval(correct, n):
    low, high = wilson_interval(correct, n)
    return f"{percent(correct / n)} ({100 * low:.1f} to {100 * high:.1f})"


def figure(width=6.4, height=3.2):
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = made.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("held-out accuracy")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.grid(axis="y", alpha=0.25)
    return made, axes


def curve(axes, name, label, colour, x=None):
    """A run's accuracy with its intervals, over steps or over what `x` makes of them."""
    rows = accuracy(name)
    places = [x[row["step"]] if x else row["step"] for row in rows]
    axes.plot(places, [row["accuracy"] for row in rows], color=colour, marker="o", ms=3, label=label)
    axes.fill_between(places, [row["ci_low"] for row in rows], [row["ci_high"] for row in rows], color=colour, alpha=0.15, lw=0)


def draw_word_problems():
    made, axes = figure()
    curve(axes, "word_problems", "greedy, 95 % interval", COLOURS[0])
    axes.set_xlabel("step")
    axes.set_title("SmolLM2-135M-Instruct on word problems, from the instruct weights", loc="left", fontsize=10)
    made.savefig(RESULTS / "word_problems.png")


def evaluation(name):
    return json.loads((DATA / name / "evaluate.json").read_text())


def word_problems_table():
    """Greedily on the problems that the curve watched and on those that it did not, sampled on all of them."""
    found = evaluation("word_problems")
    n, watched = found["policy"]["greedy"]["n"], accuracy("word_problems")[0]["n"]
    rows = [("before", "base"), ("after", "policy")]
    lines = [f"| | the {watched} that the curve shows | {n - watched} others | mean@8 | pass@8 | tokens | cut off |", "|---|---|---|---|---|---|---|"]
    for label, policy in rows:
        solved, figures = found["solved"][policy], found[policy]
        first = sum(task < watched for task in solved)
        cells = [interval(first, watched), interval(len(solved) - first, n - watched)]
        cells += [percent(figures[k]["value"]) for k in ("mean@8", "pass@8")]
        cells += [f"{figures['length']['value']:.0f}", percent(figures["cut off"]["value"])]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tried_table():
    """What the settings of run 1 were chosen from."""
    lines = ["| temperature | learning rate | after 50 steps | 100 | 150 | 200 | 250 |", "|---|---|---|---|---|---|---|"]
    for run in TRIED:
        rows = {row["step"]: row["accuracy"] for row in accuracy(run)}
        _, temperature, rate = run.split("_")
        lines.append(f"| {temperature} | {rate} | {' | '.join(percent(rows[step]) for step in (50, 100, 150, 200, 250))} |")
    return "\n".join(lines)


def reward_hacking_table():
    found = evaluation("reward_hacking")
    lines = ["| | held-out accuracy | the combined reward | tokens | cut off |", "|---|---|---|---|---|"]
    for label, policy in (("before", "base"), ("after", "policy")):
        figures, n = found[policy], found[policy]["greedy"]["n"]
        cells = [interval(len(found["solved"][policy]), n), f"{figures['reward combined']['value']:.1f}"]
        cells += [f"{figures['length']['value']:.0f}", percent(figures["cut off"]["value"])]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def runs_table():
    """What every run took, variants aside."""
    lines = ["| run | steps | completions a step | tokens sampled | seconds of training | a step (median) | GPU memory |", "|---|---|---|---|---|---|---|"]
    for folder in sorted(DATA.iterdir()):
        if folder.name.startswith("variant_") or not (folder / "metrics.jsonl").exists():
            continue
        rows, clock = read(folder / "metrics.jsonl"), trained_seconds(folder.name)
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


def beside_trl(seed, first_pass=False):
    """Of one seed (seconds, accuracy, step) of every evaluation and the seconds of a step, ours and TRL's."""
    name = f"{FIRST_PASS}against_trl" if first_pass else f"against_trl_{seed}"
    clock, theirs = trained_seconds(name), read(DATA / name / "trl.jsonl")
    last = theirs[-1]["step"]
    ours = [(clock[row["step"]], row["accuracy"], row["step"]) for row in accuracy(name)]
    theirs = [(row["seconds"], row["correct"] / row["n"], row["step"]) for row in theirs]
    return (ours, clock[last] / last), (theirs, theirs[-1][0] / last)


def draw_against_trl():
    made, axes = figure()
    for side, label in enumerate(("grpo_core", "TRL 1.16")):
        for seed, style in zip(SEEDS_BESIDE_TRL, ("-", "--", ":"), strict=True):
            rows, _ = beside_trl(seed)[side]
            seconds, values, _ = zip(*rows, strict=True)
            axes.plot(seconds, values, style, color=COLOURS[side], marker="o", ms=3, lw=1.2, label=f"{label}, seed {seed}, {rows[-1][2]} steps")
    axes.set_xscale("symlog", linthresh=10)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("seconds of training, evaluation excluded (up to 10 linear, then logarithmic)")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    axes.set_ylim(top=0.56)
    made.savefig(RESULTS / "against_trl.png")


def seconds_to(rows, target):
    """Seconds at which accuracy first reaches `target`, between the evaluations in a straight line; None: never."""
    for (x0, y0), (x1, y1) in pairwise(rows):
        if y1 >= target:
            return x0 + (x1 - x0) * (target - y0) / (y1 - y0) if y0 < target else x0
    return None


def against_trl_table():
    """Seconds to the same accuracies, medians of the seeds, and the ratio; each seed's in parentheses; then in steps."""
    pairs, before = [beside_trl(seed) for seed in SEEDS_BESIDE_TRL], beside_trl(0, first_pass=True)
    lines = ["| held-out accuracy | grpo_core: median (seeds) | TRL 1.16 | ratio | in steps: grpo_core, TRL | ratio in the first pass |", "|---|---|---|---|---|---|"]

    def middle(values):
        return statistics.median(float("inf") if value is None else value for value in values)

    def row(label, sides, steps, once, digits):
        each = [", ".join("never" if value is None else f"{value:.{digits}f}" for value in side) for side in sides]
        cells = [f"{middle(side):.{digits}f} s ({told})" for side, told in zip(sides, each, strict=True)]
        cells += [f"{middle(sides[1]) / middle(sides[0]):.1f} ×", ", ".join(f"{middle(side):.0f}" for side in steps)]
        return f"| {label} | {' | '.join(cells)} | {f'{once[1] / once[0]:.1f} ×' if all(once) else ''} |"

    def to(target, place):
        """Both sides' seconds (place 0) or steps (2) to an accuracy, of every seed."""
        return [[seconds_to([(at[place], at[1]) for at in pair[side][0]], target) for pair in pairs] for side in (0, 1)]

    for target in (0.05, 0.1, 0.15, 0.2, 0.3):
        seconds = to(target, 0)
        if all(sum(value is not None for value in side) > len(pairs) / 2 for side in seconds):
            once = [seconds_to([at[:2] for at in rows], target) for rows, _ in before]
            lines.append(row(percent(target), seconds, to(target, 2), once, 0))
    steps = [[pair[side][1] for pair in pairs] for side in (0, 1)]
    lines.append(row("a step, mean up to TRL's last evaluation", steps, [], [seconds for _, seconds in before], 2))
    return "\n".join(lines)


def variant(name, seed):
    return f"variant_{name}_{seed}"


def draw_variants():
    """A panel each: mean and range of three seeds, the first pass's runs dotted, the other objectives' means in grey."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    panels = made.subplots(2, 3, sharex=True, sharey=True).flat
    found = {name: [accuracy(variant(name, seed)) for seed in SEEDS] for name in VARIANTS}
    steps = [row["step"] for row in found["grpo"][0]]
    values = {name: [[row["accuracy"] for row in at] for at in zip(*runs, strict=True)] for name, runs in found.items()}
    for axes, name, colour in zip(panels, VARIANTS, (*COLOURS, "#374151"), strict=True):
        for other in VARIANTS:
            axes.plot(steps, [statistics.mean(at) for at in values[other]], color="#c9ced6", lw=1)
        for run in in_pass(FIRST_PASS, name):
            axes.plot(steps, [row["accuracy"] for row in run], ":", color=colour, lw=1)
        axes.fill_between(steps, [min(at) for at in values[name]], [max(at) for at in values[name]], color=colour, alpha=0.2, lw=0)
        axes.plot(steps, [statistics.mean(at) for at in values[name]], color=colour, lw=2)
        axes.set_title(name, fontsize=10, color=colour)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    made.supxlabel("step", fontsize=10)
    made.supylabel("held-out accuracy", fontsize=10)
    made.savefig(RESULTS / "variants.png")


def in_pass(folder, name):
    """The evaluations of an objective's runs in one pass, by seed; none where there was no such run."""
    places = [folder + variant(name, seed) for seed in SEEDS]
    return [accuracy(place) for place in places if (DATA / place).exists()]


def variants_table():
    at = (20, 40, 50, 60)
    head = " | ".join([f"after {step} steps" for step in at[:-1]] + [f"{at[-1]}: mean (seeds)", f"{at[-1]} in the first pass"])
    lines = [f"| | {head} | length | KL | clipped | tokens sampled | seconds |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for name in VARIANTS:
        found, before = ([{row["step"]: row["accuracy"] for row in run} for run in in_pass(folder, name)] for folder in ("", FIRST_PASS))
        means = [percent(statistics.mean(one[step] for one in found)) for step in at]
        rows = [read(DATA / variant(name, seed) / "metrics.jsonl") for seed in SEEDS]
        length = statistics.mean(statistics.mean(row["length"] for row in run[-10:]) for run in rows)
        kl = statistics.mean([row["kl_exact"] for row in run if "kl_exact" in row][-1] for run in rows)
        tokens = statistics.mean(sum(row.get("tokens_sampled", row["tokens"]) for row in run) for run in rows)
        seconds = statistics.mean(trained_seconds(variant(name, seed))[-1] for seed in SEEDS)
        clipped = statistics.mean(row["clip_frac"] for run in rows for row in run if "clip_frac" in row)
        ends = [[one[at[-1]] for one in runs] for runs in (found, before)]
        means[-1:] = [f"{percent(statistics.mean(run))} ({', '.join(f'{100 * one:.1f}' for one in run)})" if run else "" for run in ends]
        cells = [*means, f"{length:.0f}", f"{kl:.1f}", percent(clipped, 2), f"{tokens / 1e6:.1f} M", f"{seconds:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def permutation_p(a, b):
    """Two-sided p of the difference of two sums, over all ways to exchange values of the same seed; [seed][run] both."""
    whole, observed = sum(map(sum, (*a, *b))), abs(sum(map(sum, a)) - sum(map(sum, b)))
    ways = [[sum(chosen) for chosen in combinations([*one, *other], len(one))] for one, other in zip(a, b, strict=True)]
    return statistics.mean(abs(2 * sum(sums) - whole) >= observed - 1e-12 for sums in product(*ways))


def variants_pairs_table():
    """The objectives after the last step in both passes, and a permutation test of every pair."""
    names = VARIANTS[:-1]
    passes = {name: [[run[-1]["accuracy"] for run in in_pass(folder, name)] for folder in ("", FIRST_PASS)] for name in names}
    runs = {name: [*zip(*both, strict=True)] for name, both in passes.items()}  # [seed][pass]
    lines = [f"| | six runs: mean (range) | {' | '.join(f'p against {name}' for name in names[:-1])} |", "|---" * (len(names) + 1) + "|"]
    for place, name in enumerate(names):
        six = [value for seed in runs[name] for value in seed]
        cells = [f"{percent(statistics.mean(six))} ({100 * min(six):.1f} to {100 * max(six):.1f})"]
        cells += [f"{permutation_p(runs[name], runs[other]):.2g}" if i < place else "" for i, other in enumerate(names[:-1])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    apart = [abs(again - before) for seeds in runs.values() for again, before in seeds]
    said = f"Two runs of one objective and one seed ended {100 * statistics.mean(apart):.1f} points apart on average, {100 * max(apart):.1f} at the most."
    return "\n".join([*lines, "", said])


def draw_two_gpus():
    made, axes = figure()
    curve(axes, "one_gpu", "one GPU", COLOURS[0], trained_seconds("one_gpu"))
    curve(axes, "two_gpus", "two GPUs", COLOURS[1], trained_seconds("two_gpus"))
    axes.set_xlabel("seconds of training, evaluation excluded")
    axes.legend(frameon=False)
    made.savefig(RESULTS / "two_gpus.png")


def two_gpus_table():
    lines = [
        "| | before | after | tokens sampled | computed in updates | seconds of training | sampling | rewards | updates | the rest |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for folder, told in (("", "second pass"), (FIRST_PASS, "first pass"), (WITH_8192, "8,192 completions")):
        found = []
        for name, label in (("one_gpu", "one GPU"), ("two_gpus", "two GPUs")):
            rows, metrics = accuracy(folder + name), read(DATA / folder / name / "metrics.jsonl")
            phases = [sum(row[f"seconds/{phase}"] for row in metrics) for phase in ("sample", "reward", "update")]
            total = trained_seconds(folder + name)[-1]
            seconds = [total, *phases, total - sum(phases)]
            cells = [interval(rows[i]["correct"], rows[i]["n"]) for i in (0, -1)]
            cells += [f"{sum(row[kind] for row in metrics) / 1e6:.2f} M" for kind in ("tokens", "tokens_updated")]
            lines.append(f"| {told}: {label} | {' | '.join(cells)} | {' | '.join(f'{value:.1f}' for value in seconds)} |")
            found.append(seconds)
        ratios = [f"{one / two:.2f} ×" for one, two in zip(*found, strict=True)]
        lines.append(f"| {told}: ratio | | | | | {' | '.join(ratios[:-1])} | |")
    return "\n".join(lines)


def draw_reward_hacking():
    from matplotlib.figure import Figure

    made = Figure(figsize=(6.4, 3.2), dpi=150, layout="constrained")
    left, right = made.subplots(1, 2)
    rows = read(DATA / "reward_hacking" / "metrics.jsonl")
    left.plot([row["step"] for row in rows], [row["reward"] for row in rows], color=COLOURS[1])
    left.set(xlabel="step", title="the published combined reward")
    right.set(xlabel="step", title="held-out accuracy", ylim=(0, 1))
    right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    curve(right, "reward_hacking", None, COLOURS[0])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    made.savefig(RESULTS / "reward_hacking.png")


def on_test(name):
    return json.loads((DATA / name / "evaluate-test.json").read_text())


def gsm8k():
    """(label, figures, solved, slips) of the test set's rows: base, warm-up, GRPO."""
    base, trained = on_test("gsm8k_base"), on_test(GSM8K)
    told = (("base", base, "policy"), ("supervised warm-up", trained, "base"), ("GRPO", trained, "policy"))
    return [(label, found[policy], found["solved"][policy], found["slips"][policy]) for label, found, policy in told]


def gsm8k_tried_table():
    """The runs of which one was chosen, by the held-out training questions."""
    steps = range(0, 201, 20)
    lines = [f"| held-out training questions after | {' | '.join(map(str, steps))} |", "|---" * (len(steps) + 1) + "|"]
    for name in GSM8K_TRIED:
        rows = {row["step"]: row["accuracy"] for row in accuracy(name)}
        lines.append(f"| {name} | {' | '.join(percent(rows[step]) if step in rows else '' for step in steps)} |")
    return "\n".join(lines)


def gsm8k_earlier_table():
    """What the settings were chosen from before: GRPO from supervised starts of so many epochs."""
    lines = ["| supervised epochs | learning rate | steps | 0 | 20 | 40 | 60 | 80 | 100 |", "|---|---|---|---|---|---|---|---|---|"]
    for name in GSM8K_EARLIER:
        rows, config = accuracy(name), yaml.safe_load((DATA / name / "config.yaml").read_text())
        rate, at = config["engine"], {row["step"]: percent(row["accuracy"]) for row in rows}
        start = name.split("_")[2] + ("" if config["data"]["eval_path"] else " *")
        cells = [start, f"{float(rate['learning_rate']):.0e}, {rate['schedule']}", f"{rows[-1]['step']}", *(at.get(step, "") for step in range(0, 101, 20))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gsm8k_operations_table():
    """Wrong results among the calculations that the test set's greedy answers mark."""
    told = on_test(GSM8K)["operations"]
    lines = ["| a calculation of | supervised warm-up: wrong | GRPO: wrong |", "|---|---|---|"]
    for kind in sorted(told["policy"], key=lambda kind: (kind == "others", kind)):
        found = [told[name].get(kind) for name in ("base", "policy")]
        cells = [f"{percent(counts[0] / counts[1])} of {counts[1]}" if counts else "none" for counts in found]
        lines.append(f"| {kind.replace('*', '×')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gsm8k_calculations_table():
    """Test questions by how many marked calculations their solution has."""
    told, rows = on_test(GSM8K)["calculations"], gsm8k()[1:]
    lines = ["| calculations in the given solution | questions | supervised warm-up | GRPO |", "|---|---|---|---|"]
    for low, high in ((0, 1), (2, 2), (3, 3), (4, 4), (5, max(told))):
        if among := {task for task, count in enumerate(told) if low <= count <= high}:
            shares = [percent(len(among & {*solved}) / len(among)) for _, _, solved, _ in rows]
            lines.append(f"| {low if low == high else f'{low} to {high}'} | {len(among)} | {' | '.join(shares)} |")
    return "\n".join(lines)


def gsm8k_table():
    rows, lines = gsm8k(), ["| | greedy | mean@8 | pass@8 | maj@8 | cut off |", "|---|---|---|---|---|---|"]
    for label, figures, solved, _ in rows:
        cells = [interval(len(solved), figures["greedy"]["n"])]
        cells += [f"{percent(figures[k]['value'])} ({100 * figures[k]['ci_low']:.1f} to {100 * figures[k]['ci_high']:.1f})" for k in ("mean@8", "pass@8", "maj@8")]
        cells.append(percent(figures["cut off"]["value"]))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    n, before, after = rows[1][1]["greedy"]["n"], set(rows[1][2]), set(rows[2][2])
    lost, won, p = mcnemar([i in before for i in range(n)], [i in after for i in range(n)])
    slipped = [percent(slips / (n - len(solved))) for _, _, solved, slips in rows[1:]]
    limits = f"Wrong answers in which a marked calculation has a wrong result: {slipped[0]} of the warm-up's, {slipped[1]} of GRPO's."
    return "\n".join([*lines, "", f"GRPO against the warm-up, greedily and problem by problem: {won} won, {lost} lost, McNemar's p = {p:.2g}.", "", limits])


def draw_gsm8k():
    from matplotlib.figure import Figure

    made = Figure(figsize=(6.4, 3.2), dpi=150, layout="constrained")
    left, right = made.subplots(1, 2, sharey=True)
    for name, label, colour in zip(GSM8K_TRIED, ("gsm8k", "drills", "calculations"), COLOURS[:3], strict=True):
        rows = accuracy(name)
        left.plot([row["step"] for row in rows], [row["accuracy"] for row in rows], color=colour, marker="o", ms=2, lw=1, label=label)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    left.set(xlabel="step", title="500 held-out training questions")
    left.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    for place, (_, figures, solved, _) in enumerate(gsm8k()):
        n = figures["greedy"]["n"]
        low, high = wilson_interval(len(solved), n)
        share = len(solved) / n
        right.bar(place, share, color="#8a94a0", width=0.6, yerr=[[share - low], [high - share]], capsize=3)
    right.set_xticks(range(3), ["base", "warm-up", "GRPO"])
    right.set_title("1,319 test questions, greedy")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    made.savefig(RESULTS / "gsm8k.png")


PAGE = {  # a table's mark in a page -> the function that renders it
    "word_problems": word_problems_table, "tried": tried_table, "reward_hacking": reward_hacking_table, "runs": runs_table,
    "gsm8k": gsm8k_table, "gsm8k_tried": gsm8k_tried_table, "gsm8k_calculations": gsm8k_calculations_table,
    "gsm8k_earlier": gsm8k_earlier_table, "gsm8k_operations": gsm8k_operations_table, "against_trl": against_trl_table, "variants": variants_table,
    "variants_pairs": variants_pairs_table, "two_gpus": two_gpus_table, "peers": peers.table,
}  # fmt: skip
PICTURES = {  # with the runs that they show
    draw_word_problems: ["word_problems"], draw_gsm8k: [*GSM8K_TRIED, "gsm8k_base"], draw_against_trl: [f"against_trl_{seed}" for seed in SEEDS_BESIDE_TRL],
    draw_variants: [variant(name, seed) for name in VARIANTS for seed in SEEDS], draw_two_gpus: ["one_gpu", "two_gpus"],
    draw_reward_hacking: ["reward_hacking"],
}  # fmt: skip


PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md", RESULTS / "README.md")  # with tables between marks


def filled_in(text):
    """The page with every table between its marks made anew."""
    for name, table in PAGE.items():
        begin, end = f"<!-- table: {name} -->\n", f"<!-- end: {name} -->"
        if begin in text:
            head, _, rest = text.partition(begin)
            text = f"{head}{begin}{table()}\n{end}{rest.partition(end)[2]}"
    return text


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["keep", "draw"])
    parser.add_argument("runs", nargs="*", type=Path)
    given = parser.parse_args()
    if given.what == "keep":
        for run in given.runs:
            keep(run)
        return
    for picture, runs in PICTURES.items():
        if missing := [run for run in runs if not (DATA / run).exists()]:
            print(f"{picture.__name__}: without {', '.join(missing)}")
        else:
            picture()
    for page in PAGES:
        page.write_text(filled_in(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
