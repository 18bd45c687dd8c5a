"""The command line: quick to start, helpful, and completed by a shell."""

import os
import re
import shlex
import shutil
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


@pytest.fixture
def bash(environment, tmp_path):
    """The completions that bash offers for a line, with docs/commands.md's line in its ~/.bashrc."""
    folder = tmp_path
    (folder / "grpo_core").write_text(f"#!{sys.executable}\nfrom grpo_core.__main__ import run\nrun()\n")
    (folder / "grpo_core").chmod(0o755)
    path = {**environment, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    (setup,) = re.findall(r'eval "\$\(_GRPO_CORE_COMPLETE=.*?\)"', (ROOT / "docs" / "commands.md").read_text())
    source = subprocess.run(
        ["bash", "-c", setup[len('eval "$(') : -2]], env=path, capture_output=True, text=True, check=True
    )
    (folder / "completion.sh").write_text(source.stdout)

    def complete(line):
        """What a shell does at Tab: it cuts the line at spaces, = and :, and calls the function of the command."""
        words = [word for word in re.split(r"\s+|([=:])", line) if word] + ([""] if line.endswith(" ") else [])
        code = f"source {folder}/completion.sh\nf=$(complete -p grpo_core | sed 's/.*-F \\([^ ]*\\) .*/\\1/')\n"
        code += f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}\n"
        code += "$f grpo_core; printf '%s\\n' \"${COMPREPLY[@]}\""
        done = subprocess.run(["bash", "-c", code], env=path, capture_output=True, text=True)
        return done.stdout.split()

    return complete


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("line, words", [
    ("grpo_core eva", ["evaluate"]),
    ("grpo_core evaluate --max-n", ["--max-new-tokens"]),
    ("grpo_core train sampling.max", ["sampling.max_new_tokens="]),
    ("grpo_core train engine.schedule=", ["cosine", "linear", "constant"]),  # bash replaces what is after the =
    ("grpo_core train engine.schedule=co", ["cosine", "constant"]),
    ("grpo_core train name=a overwrite=t", ["true"]),
    ("grpo_core train --config=x.yaml alerts=", ["warn", "stop"]),
])  # fmt: skip
def test_n5_bash_completes_as_the_docs_write_it(bash, line, words):
    assert bash(line) == words


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_n5_the_completion_of_every_shell_is_for_the_command_grpo_core(name, monkeypatch, capsys):
    monkeypatch.setenv("_GRPO_CORE_COMPLETE", f"{name}_source")
    monkeypatch.setattr("shutil.which", lambda *args: None)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/grpo_core"])
    with pytest.raises(SystemExit):
        main([])
    out = capsys.readouterr().out
    assert f"_GRPO_CORE_COMPLETE={name}_complete" in out and "Usage" not in out and "python -m" not in out


def test_n5_help_names_the_command_as_it_was_called(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/grpo_core"])
    assert main(["evaluate"]) == 2
    assert "see grpo_core evaluate --help" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["/some/grpo_core/__main__.py"])
    assert main(["evaluate"]) == 2
    assert "see python -m grpo_core evaluate --help" in capsys.readouterr().err


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
    words = [
        "rewards=[{{name: brief, args: {{limit: 30}}}}]", "trainer.num_steps=2", "trainer.completions_per_step=16",
        "evaluation.num_tasks=4", "output_dir={tmp_path}", f"name={{name}}",
    ]
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
    from grpo_core.schema import ConfigError

    registry = Registry("thing")
    registry.register("x")(test_a_wrong_command_line_is_one_sentence)
    registry.register("x")(test_a_wrong_command_line_is_one_sentence)
    with pytest.raises(ConfigError, match="registered twice"):
        registry.register("x")(test_no_command_shows_the_help)
