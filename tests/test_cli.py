"""The command line: quick to start, helpful, and completed by a shell."""

import os
import re
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from conftest import ROOT
from forkserver import interpreter

from grpo_core.cli import commands, main

NAMES = sorted(commands.commands)


@pytest.mark.alone
def test_help_starts_in_less_than_half_a_second(environment):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "grpo_core", "--help"], env=environment, capture_output=True, text=True
        )
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0 and all(name in done.stdout for name in NAMES)
    assert min(seconds) < 0.5, seconds


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help_with_examples_and_defaults(name):
    shown = CliRunner().invoke(commands, [name, "--help"])
    assert shown.exit_code == 0 and "Examples:\n" in shown.output
    command = commands.commands[name]
    assert command.help and command.short_help in " ".join(command.help.split())
    for option in command.params:
        if option.param_type_name == "option" and option.name != "help":
            assert option.help, option.name


def test_nothing_heavy_is_loaded_for_help(environment):
    code = "import sys; from grpo_core.cli import main; main(['evaluate', '--help']); print([m for m in ('torch', 'numpy', 'yaml', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_shell_completes_commands_options_and_keys(environment):
    def completed(*words):
        given = {
            "_GRPO_CORE_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(["grpo_core", *words]),
            "COMP_CWORD": str(len(words)),
        }
        code = "from grpo_core.cli import commands; commands.main(prog_name='grpo_core', complete_var='_GRPO_CORE_COMPLETE')"
        done = subprocess.run(
            [sys.executable, "-c", code], env={**environment, **given}, capture_output=True, text=True
        )
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert completed("eva") == ["evaluate"] and "--max-new-tokens" in completed("evaluate", "--m")
    assert completed("train", "sampling.max") == ["sampling.max_new_tokens="]
    assert completed("train", "engine.schedule=") == [f"engine.schedule={x}" for x in ("cosine", "linear", "constant")]
    assert completed("train", "overwrite=t") == ["overwrite=true"] and "trainer.num_steps=" in completed(
        "train", "trainer."
    )


@pytest.mark.parametrize("arguments, sentence", [
    (["trian"], "No such command 'trian'. Did you mean 'train'"),
    (["train", "--confg", "x"], "No such option '--confg'"),
    (["launch", "--processes", "0"], "0 is not in the range x>=1"),
    (["evaluate"], "Missing argument 'RUN_OR_MODEL'"),
    (["check-loss", "grpo", "power"], "'power' is not an argument; write name=value"),
])  # fmt: skip
def test_a_wrong_command_line_is_one_sentence(arguments, sentence, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("grpo_core: ") and sentence in line


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert capsys.readouterr().out == f"grpo_core {version}\n"


def test_a_file_without_a_function_is_told_so(capsys):
    assert main(["check-loss", "mine.py"]) == 2
    assert "loss 'mine.py' is a file; name a function in it: mine.py:function" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["click", "torch"])
def test_a_python_without_what_is_needed_is_one_sentence(missing, tmp_path, environment):
    """As where the package is found, by PYTHONPATH for example, and its needs are not."""
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError('hidden', name='{missing}')\n")
    here = environment | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "grpo_core", "check-loss", "grpo"], env=here, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith(f"grpo_core: {missing} is not installed for {sys.executable}; install the dependencies")
    assert "`pip install -e .`" in sentence and "the file of the wheel" in sentence  # with a clone, and without


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.slow
def test_the_python_interface_trains_twice_in_a_process(tmp_path, environment):
    """As in a notebook: a reward of the session's own, a run, its policy, and another run."""
    code = f"""
from grpo_core import REWARDS, load_config, open_source, train

for _ in range(2):  # a cell that is run again
    @REWARDS.register("brief")
    def brief(completions, *, limit: int = 20):
        return [float(len(text) < limit) for text in completions]

for name in ("a", "b"):
    words = ["rewards=[{{name: brief, args: {{limit: 30}}}}]", "trainer.num_steps=2", "evaluation.num_tasks=4", "output_dir={tmp_path}", f"name={{name}}"]
    folder = train(load_config("configs/tiny.yaml", words))
opened = open_source(str(folder))
print(folder, opened.has_adapter)
"""
    done = subprocess.run(
        [interpreter(), "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{tmp_path / 'b'} True"
    assert (tmp_path / "a" / "metrics.jsonl").read_text().count("\n") == 2
    assert os.listdir(tmp_path / "a" / "adapter")


def test_two_different_functions_of_one_name_are_refused():
    from grpo_core.registry import Registry

    registry = Registry("thing")
    registry.register("x")(test_a_wrong_command_line_is_one_sentence)
    registry.register("x")(test_a_wrong_command_line_is_one_sentence)
    with pytest.raises(AssertionError, match="registered twice"):
        registry.register("x")(test_no_command_shows_the_help)
