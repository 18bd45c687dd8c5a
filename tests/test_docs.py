"""README.md and docs: every command and block runs or loads, every key, link, metric and TRL option is real."""

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import fields, is_dataclass
from typing import get_type_hints

import pytest
from conftest import RANK
from doc_commands import FENCE, ROOT, SMALL_FORMS, TRL, Unknown, blocks, is_excerpt, job, jobs_of, simple_commands
from forkserver import interpreter
from peft import LoraConfig
from transformers.trainer_utils import SchedulerType

from grpo_core import cli, trl_names
from grpo_core.config.checks import prompts_per_rank
from grpo_core.config.files import load
from grpo_core.config.nearest import describe_unknown_key
from grpo_core.config.presets import PRESETS
from grpo_core.config.sections import RunConfig
from grpo_core.config.study import load_study
from grpo_core.model.families import FAMILIES
from grpo_core.objective.rewards import REWARDS

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
SECTIONS = {name: kind for name, kind in get_type_hints(RunConfig).items() if is_dataclass(kind)}
READERS_OWN = {  # files that a reader is said to have
    "my_rows.jsonl": {"question": "What is 1 + 1?", "answer": "#### 2"},
    "my_problems.jsonl": {"problem": "What is 1 + 1?", "solution": "#### 2"},
    "my_prompts.jsonl": {"prompt": "What is 1 + 1?"},
    "my_chats.jsonl": {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "#### 2"}]},
}


def inline(text):
    """What stands in backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def tables(text, heading):
    """Rows of the tables under a heading, as lists of cells without the header."""
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.S | re.M)[1]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]
    return [row for row in rows[2:] if set(row[0]) != {"-"}]


def resolves(key):
    """Whether a dotted key is one of the configuration; what stands below `args` is a function's."""
    kind = RunConfig
    for name in key.split("."):
        if kind is dict or name not in (get_type_hints(kind) if is_dataclass(kind) else ()):
            return False
        kind = dict if name == "args" else get_type_hints(kind)[name]
    return True


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """Every page's jobs, done in a folder of its own; (page, what, problem) of each, and the folder."""
    base, page_jobs = tmp_path_factory.mktemp("docs"), []
    for page in ("", *PAGES):
        folder = base / (page.replace("/", "-") or "first")
        folder.mkdir()
        for name in ("grpo_core", "configs"):
            (folder / name).symlink_to(ROOT / name)
        for name, row in READERS_OWN.items():
            (folder / name).write_text(f"{json.dumps(row)}\n" * 40)
        if not page:
            tiny = {"kind": "job", "config": "configs/tiny.yaml", "overrides": [], "processes": 1}
            page_jobs.append(("", "a run to start from", {"cwd": str(folder), **tiny}))
        else:  # each has the run of the first
            copy = {"kind": "shell", "command": f"cp -r {shlex.quote(str(base / 'first' / 'runs'))} ."}
            page_jobs.append((page, "copy", {"cwd": str(folder), **copy}))
            page_jobs += [(page, what, one) for what, one in jobs_of(PAGES[page], folder)]
    (base / "jobs.json").write_text(json.dumps([one for *_, one in page_jobs]))
    worker = ROOT / "tests" / "workers" / "commands.py"
    environment = {key: value for key, value in os.environ.items() if key not in RANK}
    environment |= {
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [interpreter(), worker, base / "jobs.json", base / "problems.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert (base / "problems.json").exists(), done.stderr[-2000:]
    problems = json.loads((base / "problems.json").read_text())
    yield base, [(page, what, problem) for (page, what, _), problem in zip(page_jobs, problems, strict=True)]
    shutil.rmtree(base)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_its_commands_and_blocks_do_what_they_can_here(sandbox, page):
    assert [(what, problem) for where, what, problem in sandbox[1] if where in ("", page) and problem] == []


def test_a_command_that_no_rule_knows_fails(tmp_path):
    for text in (
        "    make all\n",
        "    bash launch.sh 2 --fast\n",
        "```fish\nls\n```\n",
        "    ls && python -m grpo_core losses\n",
    ):
        with pytest.raises(Unknown):
            jobs_of(text, tmp_path)


def test_what_is_found_in_a_page(tmp_path):
    text = "a\n\n    head x; NNODES=2 NODE_RANK=1 bash launch.sh 4 'a=b; c'\n\n```python\n# my.py\nx = 1\n```\n"
    found = jobs_of(text, tmp_path)
    assert [one["kind"] for _, one in found] == ["shell", "job", "python", "python"]
    assert found[1][1]["processes"] == 8 and found[1][1]["overrides"] == ["a=b; c"]


def test_fault_28_every_command_of_the_published_results_loads():
    """FAULTS #28: their models and data are not here, so configurations load and options are read."""
    text, number = (ROOT / "docs" / "results" / "README.md").read_text(), 0
    for line in [line for language, content in blocks(text) if language == "bash" for line in content.splitlines()]:
        for environment, words in simple_commands(line):
            number += 1
            match words:
                case ["python3", script, *_] if script.startswith("configs/experiments/"):
                    compile((ROOT / script).read_text(), script, "exec")
                case ["python3", "-m", "grpo_core", "evaluate" | "export" as name, *rest]:
                    cli.commands.commands[name].make_context(name, rest)
                case ["python3", "-m", "grpo_core", "study", path, *_]:
                    load_study(ROOT / path)
                case _:
                    for one in job(environment, words):
                        load(ROOT / one["config"], one["overrides"], supervised="sft" in one.get("command", ()))
    assert number >= 20


def test_fault_28_every_benchmark_is_started_by_a_test():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert set(re.findall(r"python benchmarks/(\w+)\.py", page)) <= names
    assert names - {"compare_times"} == set(SMALL_FORMS), "compare_times starts the tests of two clones"


# --- words in backticks --------------------------------------------------------------------------------------------


def placeholder(text):
    """What a reader fills in."""
    return "..." in text or "…" in text or ".py:" in text or re.search(r"\b(?!CUDA)[A-Z_]{1,}\b", text) is not None


@pytest.mark.parametrize("page", PAGES)
def test_every_key_and_override_in_backticks_is_one(page):
    wrong = []
    for code in inline(PAGES[page]):
        for section, name in re.findall(rf"(?<![\w./:])({'|'.join(SECTIONS)})\.([a-z_]\w*)", code):
            if name not in ("py", "jsonl", "yaml", "json") and not resolves(f"{section}.{name}"):
                wrong.append(f"{section}.{name}")
        key, equals, _ = code.partition("=")
        if equals and re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", key):
            if not resolves(key):
                wrong.append(code)
            elif not placeholder(code):
                try:
                    load(ROOT / "configs" / "tiny.yaml", shlex.split(code) if "'" in code else [code])
                except ValueError as error:
                    if "which is not installed: pip install" not in str(error):  # an extra
                        wrong.append(f"{code}: {error}")
    # what was once a key, and is quoted in a message about it
    assert [one for one in wrong if one != "trainer.micro_batch_size"] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_backticks_is_one(page):
    for code in inline(PAGES[page]):
        if not re.match(
            r"[A-Z_]*=?\S* ?(bash launch.sh|python -m|torchrun|deepspeed -|python benchmarks|uv |pip )", code
        ) or placeholder(code):
            continue
        for simple in simple_commands(code):
            for one in job(*simple):
                if one["kind"] in ("job", "load"):
                    config = load(ROOT / one["config"], one["overrides"])
                    prompts_per_rank(config, one["processes"])


# --- links ---------------------------------------------------------------------------------------------------------


def anchors(text):
    """GitHub's: lower case, punctuation away, spaces to hyphens."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "docs/results/README.md"])
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", (ROOT / page).read_text()))
    for link in links:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_the_types_of_the_fused_decoder_are_on_the_page_of_models():
    table = (ROOT / "docs" / "models.md").read_text().partition("differs from Llama by |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.M) == [name for name, family in FAMILIES.items() if family.has_fused_decoder]


def test_every_page_is_reached_from_the_readme():
    assert all(f"({page})" in PAGES["README.md"] for page in PAGES if page != "README.md")


def test_the_readme_is_short_and_begins_with_the_two_commands():
    text = PAGES["README.md"]
    assert len(text.splitlines()) <= 160
    assert [line for language, line in blocks(text) if language == "bash"][:2] == [
        "bash launch.sh 2",
        "bash tests/run.sh",
    ]


def test_the_readme_says_how_shipped_configurations_and_an_installed_wheel_are_used():
    codes = inline(PAGES["README.md"])
    names = {name for code in codes for name in re.findall(r"--config (\w+)$", code)}
    assert names >= {"tiny", "dapo"} and all(load(name) for name in names)
    (installed,) = [code for code in codes if code.startswith("grpo_core launch")]
    _, name, *words = installed.split()
    assert cli.commands.commands[name].make_context(name, words).params["processes"] == 2
    assert "pip wheel --no-deps ." in codes and "pip install FILE.whl" in codes


def test_the_time_of_the_first_command_is_the_same_everywhere():
    for name in ("README.md", "configs/tiny.yaml", "docs/loss.md"):
        text = " ".join((ROOT / name).read_text().replace("\n# ", " ").split())
        assert re.findall(r"[^.,;]*minutes?\b[^.,;]*on 2 cores|a few minutes", text) == re.findall(
            r"[^.,;]*about a minute and a half on 2 cores", text
        )
        assert text.count("about a minute and a half on 2 cores") == 1, name


def test_the_readme_shows_twelve_lines_of_the_loop():
    (excerpt,) = [code for language, code in blocks(PAGES["README.md"]) if language == "python" and is_excerpt(code)]
    assert len(excerpt.splitlines()) == 12
    assert not is_excerpt(excerpt.replace("freeze(policy", "freeze(the_policy"))


def is_module(name):
    """Whether a file of the repository, or one of the package by the end of its path, has this name."""
    return (ROOT / name).exists() or any(path.match(name) for path in (ROOT / "grpo_core").rglob("*.py"))


def test_the_files_it_names_are_there():
    readers = ("mine.py", "file.py")
    for page, text in PAGES.items():
        for code in inline(text):
            for name in re.findall(r"(?<![\w/.])((?:\w+/)*\w+\.py)\b(?!:)", code):
                assert is_module(name) or name.startswith("my_") or name in readers, (page, name)


def test_the_picture_shows_functions_that_are_there():
    picture = (ROOT / "docs" / "loop.svg").read_text()
    source = "".join(path.read_text() for path in (ROOT / "grpo_core").rglob("*.py"))
    names = re.findall(r"(\w+)\([^()]*\)</text>", picture)
    assert len(names) >= 10 and all(f"def {name}(" in source for name in names), names
    for name in re.findall(r"((?:\w+/)*\w+\.py)", picture):
        assert is_module(name), name


# --- from TRL ------------------------------------------------------------------------------------------------------


NAMES = {heading: TRL[heading] for heading in ("GRPOConfig", "TrainingArguments", "GRPOTrainer")}  # with defaults
NAMES["LoraConfig"] = {field.name: field.default for field in fields(LoraConfig)}
NAMES["Schedules"] = dict.fromkeys(schedule.value for schedule in SchedulerType)
OLDER = "Names of older versions"
NAMES[OLDER] = dict.fromkeys(("max_prompt_length", "warmup_ratio"))
COMPLETE = {"GRPOConfig", "GRPOTrainer", "Schedules", OLDER}


@pytest.mark.parametrize("heading", NAMES)
def test_the_table_of_trls_options(heading):
    rows, seen = tables(PAGES["docs/from_trl.md"], heading), []
    for row in rows:
        options, here, difference = re.findall(r"`(\w+)`", row[0]), re.findall(r"`([\w.]+)`", row[1]), row[2]
        assert options and all(option in NAMES[heading] for option in options), row[0]
        seen += options
        keys = [key for key in here if resolves(key)]
        assert keys or "not here, because" in row[1] or options == ["args"], row
        default = re.search(r"default ([\w.-]+)(?: in both|, (?:TRL|PEFT)'s ([\w.-]+))", difference)
        if default and not keys[0].endswith("args"):
            ours = RunConfig()
            for name in keys[0].split("."):
                ours = getattr(ours, name)
            theirs = NAMES[heading][options[0]]
            for said, value in ((default[1], ours), (default[2] or default[1], theirs)):
                assert said.rstrip(".") == str(value) or float(said.rstrip(".")) == float(value), (row, value)
    assert len(seen) == len(set(seen))
    if heading in COMPLETE:
        assert set(seen) == set(NAMES[heading]), set(NAMES[heading]) - set(seen)


def test_an_older_name_is_no_longer_trls():
    assert not any(name in TRL[heading] for name in NAMES[OLDER] for heading in ("GRPOConfig", "TrainingArguments"))


def test_the_table_of_what_trl_logs():
    ours = names_in("metrics.jsonl, always") | names_in("With a switch on")
    seen = []
    for theirs, here in tables(PAGES["docs/from_trl.md"], "What is logged under which name"):
        names, named = re.findall(r"`([^`]+)`", theirs), re.findall(r"`([^`]+)`", here)
        seen += names
        assert named or "not here" in here or here == "the same names", theirs
        unknown = set(named if here != "the same names" else names) - ours
        assert all(resolves(name) for name in unknown), unknown
    assert sorted(seen) == TRL["logged"]


@pytest.mark.parametrize("heading", [heading for heading in NAMES if heading != "Schedules"])
def test_every_option_of_the_tables_is_refused_with_its_counterpart_or_why_there_is_none(heading):
    top = [field.name for field in fields(RunConfig)]
    for row in tables(PAGES["docs/from_trl.md"], heading):
        for name in {*re.findall(r"`(\w+)`", row[0])} - {*top, "args"}:
            message = describe_unknown_key("", name, top, None)
            keys = message.rpartition("did you mean ")[2].rstrip("?)").split(" or ")
            is_key = all(key.rpartition(".")[2] == name for key in keys)
            assert f"TRL's {name}" in message or (is_key and set(keys) & set(re.findall(r"`([\w.]+)`", row[1]))), message


def test_what_the_refusal_of_a_name_of_trls_says_is_what_the_tables_say():
    text = PAGES["docs/from_trl.md"]
    rows = [row for heading in NAMES for row in tables(text, heading)]
    said = {name: row for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    hints = trl_names.OPTION_HINTS | trl_names.NO_COUNTERPART
    spoken = {"tokenizer", "ddp_find_unused_parameters"}  # of older scripts, in no table
    assert set(hints) - spoken <= set(said)
    hints = {name: hint for name, hint in hints.items() if name not in spoken}
    for name, sentence in hints.items():
        keys = set(re.findall(r"[a-z]+(?:\.[a-z0-9_]+)+", sentence))
        assert all(resolves(key) for key in keys), (name, keys)
        if keys:
            shown = set(re.findall(r"`([\w.]+)`", said[name][1]))
            assert keys & shown or "not here" in said[name][1] or shown & {"rewards", "resume", "name"}, name
    for name, (loss, average) in trl_names.LOSS_TYPES.items():
        assert re.search(rf"(?:^|; ){name}: {loss}, {average}[;.]", said["loss_type"][2]), name
    for name, advantage in trl_names.SCALES.items():
        assert f"{name}: {advantage}" in said["scale_rewards"][2]
    assert set(trl_names.SCHEDULES) < set(NAMES["Schedules"])
    assert {name.partition(",")[0] for name in trl_names.REWARDS.values()} <= set(REWARDS.functions)
    with pytest.raises(ValueError, match="unknown reward 'accuracy_reward'; instead of TRL's accuracy_reward use math_equal$"):
        load("tiny", ["rewards=accuracy_reward"])
    assert set(trl_names.PRESET_NAMES) == set(PRESETS)


# --- metrics -------------------------------------------------------------------------------------------------------

ON_A_GPU = {"memory_gb/PHASE", "reserved_memory_gb", "update_mfu"}
# test_switches.py has a step without any reward, test_routing.py a model with routers, test_turns_training.py given tokens
NOT_HERE = {"no_reward", "routing_mismatch", "router_aux_loss", "echo"}


def names_in(heading):
    return {name for row in tables(PAGES["docs/metrics.md"], heading) for name in re.findall(r"`([^`]+)`", row[0])}


def fits(name, documented):
    return any(re.fullmatch(re.sub("NAME|PHASE", ".+", one), name) for one in documented)


@pytest.mark.slow
def test_every_name_that_a_run_writes_is_explained_and_every_name_explained_is_written(sandbox):
    base, _ = sandbox
    always, switched = names_in("metrics.jsonl, always"), names_in("With a switch on")
    documented = {
        "metrics": always | switched,
        "evaluation": names_in("evaluation.jsonl"),
        "completions": names_in("completions.jsonl"),
        "evaluation_completions": names_in("evaluation_completions.jsonl"),
    }
    written = {kind: set() for kind in documented}
    for kind in documented:
        for path in base.glob(f"*/runs/*/{kind}.jsonl"):
            written[kind] |= {name for line in path.read_text().splitlines() for name in json.loads(line)}
        assert [name for name in sorted(written[kind]) if not fits(name, documented[kind])] == []
    (plain,) = [json.loads(line) for line in (base / "first/runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [name for name in sorted(always) if not any(fits(one, {name}) for one in plain)] == []
    missing = [name for name in switched if not any(fits(one, {name}) for one in written["metrics"])]
    assert set(missing) == ON_A_GPU | NOT_HERE
    assert not {"step", "accuracy", "top_p"} - written["evaluation"]
