"""What a page of the documents holds, and what is to be done about its commands and blocks."""

import ast
import json
import re
import shlex
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[1]
TRL = json.loads((ROOT / "tests" / "fixtures" / "trl_1_16_options.json").read_text())
DEFAULT = "configs/tiny.yaml"  # as on a machine without a GPU, which the sandbox is made to be
SMALL_FORMS = {  # benchmark -> the words that start it in a small form, in which it records nothing: test_benchmarks.py does
    "decode_parts": ["--check"], "losses": ["--check"], "smollm2": ["--check"], "trl_parity": ["--check"],
    "sampling": ["--check"], "layouts": ["--check"], "precision": ["--check"], "embedded": ["--check"],
    "results": ["check"], "experiments": ["--list"], "soak": ["--check"], "families": ["--check"],
    "learning": ["--check"], "update": ["--check"], "update_parts": ["--check"], "peers": ["--check"], "models": ["--check"],
    "curriculum": ["--check"], "environments": ["--check"], "turns": ["--check"], "experts": ["--check"], "state_kernels": ["--check"],
    "four_bits": ["--check"],
}  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)


def blocks(text):
    """(language, content) in order; an indented line is a command."""
    found = [(m.start(), m[1], m[2]) for m in FENCE.finditer(text)]
    bare = FENCE.sub(lambda m: "\n" * m[0].count("\n"), text)  # as many lines as before
    at, starts = 0, {}
    for number, line in enumerate(text.splitlines(keepends=True)):
        starts[number], at = at, at + len(line)
    found += [
        (starts[i], "bash", line.strip())
        for i, line in enumerate(bare.splitlines())
        if line.startswith("    ") and line.strip()
    ]
    return [(language, content) for _, language, content in sorted(found)]


class Unknown(Exception):
    """A command that no rule knows."""


def simple_commands(line):
    """The commands of a line as lists of words, with their environment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&")
    lexer.whitespace_split, lexer.commenters = True, "#"
    command = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";&"):
            given = 0
            while given < len(command) and re.match(r"[A-Z][A-Z0-9_]*=", command[given]):
                given += 1
            yield dict(one.split("=", 1) for one in command[:given]), command[given:]
            command = []
        else:
            command.append(word)


def training(words, processes, environment=(), config=DEFAULT):
    """The job of a command's last words: [--config FILE] [key=value ...]."""
    words = list(words)
    if "--config" in words:
        at = words.index("--config")
        config = words[at + 1]
        del words[at : at + 2]
    if bad := [word for word in words if "=" not in word or word.startswith("-")]:
        raise Unknown(f"{bad[0]!r} is no override")
    nodes = int(dict(environment).get("NNODES", 1))
    return {"kind": "job", "config": config, "overrides": words, "processes": processes * nodes}


def launcher(words):
    """torchrun's or deepspeed's own options, as their parsers read them, and the job."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        read = get_args_parser().parse_args(words[1:])
        assert read.module and read.training_script == "grpo_core"
        processes, rest = int(read.nproc_per_node) * int(read.nnodes.split(":")[-1]), read.training_script_args
    else:
        from deepspeed.launcher.runner import parse_args

        read = parse_args(words[1:])
        assert read.module and read.user_script == "grpo_core"
        processes, rest = max(1, read.num_gpus), read.user_args
    assert rest[0] == "train"
    return {**training(rest[1:], processes), "kind": "load"}


def job(environment, words):
    """What is to be done about a command: jobs for the worker. Raises Unknown where no rule fits."""
    words = ["python", *words[1:]] if words[0] == "python3" else words
    match words:
        case ["bash", "launch.sh", processes, "--dry-run", *rest]:
            return [
                {
                    "kind": "main",
                    "arguments": ["launch", "--processes", processes, "--config", DEFAULT, "--dry-run", *rest],
                }
            ]
        case ["bash", "launch.sh", *rest]:
            processes = int(rest.pop(0)) if rest and rest[0].isdigit() else 1
            return [training(rest, processes, environment.items())]
        case ["python", "-m", "grpo_core", "train", *rest] if "--dry-run" in rest:  # its model may be a hub's
            return [training([word for word in rest if word != "--dry-run"], 1) | {"command": ["train", "--dry-run"]}]
        case ["python", "-m", "grpo_core", "train", *rest]:
            return [training(rest, 1)]
        case ["python", "-m", "grpo_core", "sft", *rest]:
            return [training(rest, 1, config="configs/tiny_sft.yaml") | {"command": ["sft"]}]
        case ["python", "-m", "grpo_core", "study", *rest]:  # test_study.py trains one
            return [{"kind": "main", "arguments": ["study", *rest, *([] if "--dry-run" in rest else ["--dry-run"])]}]
        case ["python", "-m", "grpo_core", "losses" | "rewards" | "presets"]:
            return [{"kind": "main", "arguments": words[3:]}]
        case ["python", "-m", "grpo_core", "check-loss" | "check-advantage", *_]:  # 1: it found something
            return [{"kind": "main", "arguments": words[3:], "codes": [0, 1]}]
        case [
            "python",
            "-m",
            "grpo_core",
            "evaluate" | "sample" | "report" | "replay" | "export",
            *rest,
        ]:  # of the first run
            if rest[1:] == [] and words[3] == "sample":
                raise Unknown("a prompt waits for somebody")
            return [{"kind": "main", "arguments": words[3:]}]
        case ["torchrun", "--nproc_per_node", _, "-m", "grpo_core", "evaluate", *rest]:
            return [{"kind": "main", "arguments": ["evaluate", *rest, "--limit", "2", "--samples", "1"]}]
        case ["torchrun" | "deepspeed", *_]:
            return [launcher(words)]
        case ["bash", "tests/run.sh"]:
            return [{"kind": "shell", "command": f"bash -n {ROOT / 'tests' / 'run.sh'}"}]
        case ["python", script, *_] if script.startswith("benchmarks/"):
            assert (ROOT / script).is_file() and Path(script).stem in SMALL_FORMS, f"no test starts {script}"
            return []
        case ["python", script] if script.startswith("examples/"):  # test_examples.py starts them
            assert (ROOT / script).is_file(), script
            return []
        case ["pip", "install", *rest] | ["uv", "pip", "install", *rest]:
            extras = [word for word in rest if not (ROOT / word).exists() and word not in ("-c", "-e")]
            wanted = {name for word in extras for name in re.fullmatch(r"\.\[([\w,]+)\]", word)[1].split(",")}
            assert wanted <= set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)), rest
            return []
        case ["pip", "wheel", "--no-deps", "."]:  # test_wheel.py builds, installs and uses it
            return []
        case ["uv", "venv", ".venv"] | ["source", ".venv/bin/activate"]:
            assert "$root/.venv/bin/python" in (ROOT / "environment.sh").read_text()
            return []
        case ["sed" | "head" | "tail", *_]:
            return [{"kind": "shell", "command": shlex.join(words)}]
    raise Unknown(" ".join(words))


def is_excerpt(code):
    """Whether a block's lines stand one after another in the loop's file, at whatever indentation."""
    lines, loop = code.splitlines(), (ROOT / "grpo_core" / "training" / "trainer.py").read_text().splitlines()
    starts = range(len(loop) - len(lines) + 1)
    return any(dedent("\n".join(loop[start : start + len(lines)])) == "\n".join(lines) for start in starts)


def python_job(code):
    """A block runs, but for an excerpt of the loop; one for TRL, which is not here, is read: its names are TRL's."""
    if is_excerpt(code):
        return []
    tree = ast.parse(code)
    if not any(isinstance(node, ast.ImportFrom) and node.module == "trl" for node in ast.walk(tree)):
        return [{"kind": "python", "code": code}]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        for keyword in call.keywords if call.func.id in ("GRPOConfig", "GRPOTrainer") else ():
            known = (
                TRL["GRPOTrainer"] if call.func.id == "GRPOTrainer" else TRL["GRPOConfig"] | TRL["TrainingArguments"]
            )
            assert keyword.arg in known, keyword.arg
    return []


def jobs_of(text, folder):
    """(what stands in the page, job) in order."""
    found = []
    for language, content in blocks(text):
        named = re.match(r"# (\w+\.(?:py|yaml))\n", content)
        if named:
            put = f"Path({named[1]!r}).write_text({content!r})"
            found.append((named[0], {"kind": "python", "code": f"from pathlib import Path\n{put}"}))
        if language == "python":
            found += [(content, one) for one in python_job(content)]
        elif language == "json":
            [json.loads(line) for line in content.splitlines()]
        elif language == "bash":
            found += [
                (line, one) for line in content.splitlines() for simple in simple_commands(line) for one in job(*simple)
            ]
        elif not (language == "text" or (language == "yaml" and named)):
            raise Unknown(f"a block of {language!r}")
    return [(what, {"cwd": str(folder), **one}) for what, one in found]
