"""Presets, the rendered formula, remarks, and the commands that show and check functions."""

import inspect
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from forkserver import interpreter

from grpo_core.cli import main
from grpo_core.commands.check_advantage import run_check_advantage
from grpo_core.commands.check_loss import run_check_loss
from grpo_core.commands.list_entry import find_sources
from grpo_core.commands.losses import REGISTRIES, list_losses
from grpo_core.commands.presets import list_presets
from grpo_core.config.files import dump, load
from grpo_core.config.formula import get_formula, list_remarks, render
from grpo_core.config.presets import PRESETS, get_preset, merge
from grpo_core.config.words import parse_arguments
from grpo_core.objective.advantages import ADVANTAGES
from grpo_core.objective.losses import LOSSES
from grpo_core.objective.rewards import REWARDS

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny.yaml"

# what each preset is known for; the rest of the objective is plain grpo without a reference
KNOWN = {
    "grpo_paper": {"loss.kl_coef": 0.04},
    "dr_grpo": {"advantage.name": "dr_grpo", "loss.average": "constant"},
    "dapo": {"loss.args.clip_high": 0.28, "loss.average": "token", "truncation.name": "soft_penalty", "sampling.dynamic_attempts": 10},
    "gspo": {"loss.name": "gspo", "loss.args.clip_low": 3e-4, "loss.args.clip_high": 4e-4},
    "cispo": {"loss.name": "cispo", "loss.args.cap": 5.0, "loss.average": "token"},
    "rloo": {"advantage.name": "rloo", "loss.name": "reinforce", "loss.average": "row_sum", "loss.kl": "k1", "loss.kl_in": "reward", "loss.kl_coef": 0.05},
    "trl_1_16_default": {"loss.average": "token", "loss.kl": "k3_corrected"},
    "verl_default": {"loss.name": "dual_clip", "loss.args.c": 3.0, "loss.average": "token", "advantage.args.eps": 1e-6},
    "open_instruct_default": {"loss.args.clip_high": 0.272, "loss.average": "token", "loss.kl_coef": 0.05, "advantage.name": "dr_grpo",
                              "loss.rollout_correction.name": "token_truncate"},
    "dppo": {"loss.name": "dppo_tv", "loss.args.delta_low": 0.15, "loss.args.cap": 20.0, "loss.average": "token"},
    "m2po": {"loss.rejection.name": "m2po", "loss.rejection.args.threshold": 0.04, "loss.average": "token"},
    "nemo_seq_mask_tis": {"loss.rejection.name": "geometric", "loss.rejection.args.low": 0.999, "loss.rejection_in": "surrogate",
                          "loss.rollout_correction.name": "token_truncate", "loss.rollout_correction.args.clip_max": None,
                          "loss.average": "token", "advantage.args.eps": 1e-6},
    "prime_rl_default": {"loss.name": "prime_rl", "loss.args.kl_tau": 1e-3, "loss.average": "token", "advantage.name": "dr_grpo"},
    "verl_rollout_correction": {"loss.name": "dual_clip", "loss.args.c": 3.0, "loss.average": "token", "advantage.args.eps": 1e-6,
                                "loss.rollout_correction.name": "token_truncate", "loss.rejection.name": "geometric",
                                "loss.rejection_in": "loss"},
}  # fmt: skip
PLAIN = {"advantage.name": "grpo", "advantage.args.eps": 1e-4, "loss.name": "grpo", "loss.average": "sequence", "loss.kl": "k3",
         "loss.kl_coef": 0.0, "loss.kl_in": "loss", "loss.args.clip_low": 0.2, "loss.args.clip_high": 0.2, "truncation.name": "keep",
         "loss.rollout_correction.name": "none", "loss.rejection.name": "none", "loss.log_ratio_coef": 0.0, "sampling.dynamic_attempts": 0, "reference.every": 0, "loss.top_entropy": 1.0}  # fmt: skip


def at(tree, key):
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else getattr(tree, name, None)
    return tree


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_they_are_known_for(name):
    assert KNOWN.keys() == PRESETS.keys()
    config = load(TINY, [f"preset={name}"])
    for key, value in {**PLAIN, **KNOWN[name]}.items():
        if key.startswith(("loss.args.", "advantage.args.")) and key not in KNOWN[name] and at(config, key) is None:
            continue  # another function, without that argument
        assert at(config, key) == value, key
    assert config.preset == name and config.engine.learning_rate == 1.5e-3  # the run's own stay


def test_what_is_said_later_counts(tmp_path):
    """Default < preset in the file < file < preset on the command line < the rest of the command line."""
    file = tmp_path / "run.yaml"
    file.write_text("preset: dapo\nloss: {average: constant, kl_coef: 0.02}\nengine: {deepspeed: {}}\n")
    config = load(file)
    assert (config.loss.average, config.loss.kl_coef, config.loss.args["clip_high"]) == ("constant", 0.02, 0.28)
    config = load(file, ["loss.kl_coef=0.5", "preset=grpo_paper"])
    assert (config.loss.average, config.loss.kl_coef, config.truncation.name) == ("sequence", 0.5, "keep")
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(tmp_path / "again.yaml") == config
    with pytest.raises(ValueError, match="unknown preset 'dap'; known: .*did you mean dapo"):
        load(TINY, ["preset=dap"])


def test_another_functions_arguments_do_not_shine_through():
    assert load(TINY, ["preset=dapo", "loss.name=gspo"]).loss.args == {}
    assert load(TINY, ["loss.name=gspo", "preset=dapo", "loss.args={clip_high: 0.1}"]).loss.args == {"clip_high": 0.1}
    assert load(TINY, ["preset=dapo", "loss.name=grpo"]).loss.args["clip_high"] == 0.28
    assert load(TINY, ["preset=verl_default", "advantage.name=dr_grpo"]).advantage.args == {}
    assert load(TINY, ["preset=null"]).preset is None
    assert merge(get_preset("dapo"), {"loss": {"name": "sapo"}})["loss"].get("args") is None
    assert merge(get_preset("dapo"), {"loss": {"kl_coef": 1}})["loss"]["args"]["clip_high"] == 0.28
    before = get_preset("dapo")
    merge(before, {"loss": {"args": {"clip_high": 9}}})
    assert before == get_preset("dapo")


def test_the_formula_has_the_values_in_it():
    config = load(TINY, [
        "loss.args={clip_low: 0.1, clip_high: 0.37, delta: 4.5}", "loss.kl_coef=0.021", "loss.average=constant", "loss.entropy_coef=0.003",
        "loss.top_entropy=0.15", "loss.off_policy_mask=0.7", "loss.rollout_correction={name: token_truncate, args: {clip_max: 1.9}}",
        "advantage.args={eps: 0.005}", "advantage.min_group_std=0.06", "truncation.name=mask_loss", "sampling.dynamic_attempts=7",
        "reference.every=11", "reference.mixing=0.65", "loss.kl_target=0.08", "loss.log_ratio_coef=0.013", "loss.positive_nll_coef=0.017",
        "loss.positive_nll_above=0.45", "loss.echo_coef=0.019", "environment.reward_weight=0.3",
        "environment.name=calculator", "sampling.stop= =",
    ])  # fmt: skip
    text = render(config)
    for part in (
        "min(r, 4.5)", "1 - 0.1, 1 + 0.37", "0.021 KL", "a KL of 0.08, with a horizon of 10,000 completions", "correct_answer(strict=True)", "completions * 48", "0.003 H", "top 15%", "<= 0.7", "min(v, 1.9)",
        "std + 0.005", "std < 0.06", "mask_loss", "up to 7 times", "every 11 steps, 0.65 of the way", "1 correct_answer",
        "+ 0.013 (l - l_roll)**2", ", + 0.017 NLL", "a reward above 0.45", ", + 0.019 ECHO", "0.3 environment",
    ):  # fmt: skip
        assert part in text, (part, text)
    alone = render(load(TINY, ["loss.positive_nll_coef=0.017"]))
    assert "l_roll" not in alone and "NLL" not in render(load(TINY, ["loss.log_ratio_coef=0.013"]))
    written = dump(config)
    assert all(line.startswith("#") for line in written.splitlines()[:10]) and yaml.safe_load(written)["name"] == "tiny"
    for line in text.splitlines():
        assert f"#   {line}" in written


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_renders_without_a_left_over_name(name):
    text = render(load(TINY, [f"preset={name}"]))
    assert not re.search(r"\b(clip_low|clip_high|eps|cap|std_ddof|cache_share|max_new_tokens)\b", text), text
    assert list_remarks(load(TINY, [f"preset={name}"])) == []


@pytest.mark.parametrize("overrides, remark", [
    (["loss.average=row_sum"], "row_sum sums the token ratios of grpo"),
    (["loss.name=luspo"], "loss luspo is defined with loss.average row_sum, not sequence"),
    (["loss.average=micro_token"], "depend on trainer.tokens_per_micro_batch"),
    (["loss.name=gpg"], "only one of them"),
    (["advantage.name=gpg"], "only one of them"),
    (["loss.kl=k1"], "expected gradient is 0"),
    (["loss.name=gspo", "loss.average=token"], "loss gspo is defined with loss.average sequence, not token"),
    (["advantage.name=opo"], "advantage opo weights rewards by length"),
    (["reference.every=1"], "sets the reference to the policy at every step"),
    (["reference.every=1", "trainer.num_passes=2"], None),
    (["loss.name=cispo", "loss.args={cap: 0.2}"], "below 1 it scales down every gradient"),
    ([], None),
    (["loss.average=row_sum", "loss.name=reinforce"], None),
    (["loss.average=row_sum", "loss.name=luspo"], None),
    (["loss.kl=k1", "loss.kl_in=reward"], None),
])  # fmt: skip
def test_what_an_author_may_not_have_meant_is_remarked(overrides, remark):
    found = list_remarks(load(TINY, overrides))
    assert (found == []) if remark is None else (len(found) == 1 and remark in found[0])


@pytest.mark.parametrize("overrides, message", [
    (["loss.top_entropy=0"], "loss.top_entropy is 0.0; it must be above 0 and at most 1"),
    (["reference.mixing=1.5"], "reference.mixing is 1.5"),
    (["loss.kl_target=0.1", "loss.kl_coef=0"], "loss.kl_target adapts loss.kl_coef, which is 0"),
    (["loss.kl_target=-1"], "loss.kl_target is -1.0; it must be above 0"),
    (["loss.entropy_coef=2", "loss.entropy_target=1"], "loss.entropy_coef is 2.0; with loss.entropy_target it must be from loss.entropy_min"),
    (["reference.every=2", "loss.kl_coef=0"], "reference.every is 2, but loss.kl_coef 0 uses no reference"),
    (["loss.log_ratio_coef=-0.1"], "loss.log_ratio_coef is -0.1; it must be at least 0"),
    (["loss.positive_nll_coef=-0.1"], "loss.positive_nll_coef is -0.1; it must be at least 0"),
    (["loss.echo_coef=-0.1"], "loss.echo_coef is -0.1; it must be at least 0"),
    (["loss.kl_in=both"], "loss.kl_in is 'both'; it must be one of loss, reward"),
    (["loss.args={clip_low: -0.2}"], "loss grpo: clip_low is -0.2"),
    (["loss.args={delta: 1.0}"], "loss grpo: delta is 1.0"),
    (["loss.rollout_correction={name: token_mask, args: {clip_min: 3.0}}"], "loss.rollout_correction token_mask: clip_min is 3.0"),
    (["loss.rollout_correction.name=tokens"], "unknown rollout correction 'tokens'; known: geometric_mask, geometric_truncate, none"),
    (["loss.kl=k4"], "unknown kl 'k4'"),
    (["truncation.name=cut"], "unknown truncation 'cut'"),
    (["truncation={name: soft_penalty, args: {cache_share: 2.0}}"], "truncation soft_penalty: cache_share is 2.0"),
    (["advantage.name=gdpo", "truncation.name=zero_reward"], "advantage gdpo reads each reward, but truncation zero_reward changes"),
    (["advantage.name=gdpo", "loss.kl_in=reward"], "advantage gdpo reads each reward, but loss.kl_in reward"),
    (["sampling.dynamic_attempts=-1"], "sampling.dynamic_attempts is -1"),
    (["lora.r=0", "loss.kl_coef=0", "log.exact_kl_every=5"], "log.exact_kl_every is 5, but lora.r is 0"),
])  # fmt: skip
def test_an_objective_that_cannot_be_is_one_sentence(overrides, message):
    with pytest.raises(ValueError) as error:
        load(TINY, overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


OWN = '''
import torch
from grpo_core import PolicyLoss, token_ratio


def soft(logprobs, old_logprobs, advantages, completion_mask, *, power: float = 0.5):
    """-(r ** power) A / power"""
    ratio = token_ratio(logprobs, old_logprobs)
    return PolicyLoss(-advantages * ratio**power / power, {"ratio": ratio.detach(), "clip_frac": 0 * ratio.detach()})


def crooked(logprobs, old_logprobs, advantages, completion_mask):
    ratio = token_ratio(logprobs, old_logprobs)
    return PolicyLoss(advantages * ratio, {"ratio": ratio.detach(), "clip_frac": 0 * ratio.detach()})


def reduced(logprobs, old_logprobs, advantages, completion_mask):
    return PolicyLoss((logprobs * advantages).mean())


def raises(logprobs, old_logprobs, advantages, completion_mask):
    return torch.functional.broadcast_tensors(logprobs, old_logprobs[:, :2])[0]  # raises within torch


def bare(logprobs, old_logprobs, advantages, completion_mask):
    return -logprobs * advantages


def loose(logprobs, old_logprobs, advantages, completion_mask, power=0.5):
    return PolicyLoss(-logprobs * advantages)


def ranks(rewards, *, scale: float = 1.0):
    """scale (rank - mean rank)"""
    order = rewards.argsort(dim=1).argsort(dim=1).to(rewards.dtype)
    tied = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return torch.where(tied, 0.0, scale * (order - order.mean(dim=1, keepdim=True)))


def flat(rewards):
    return rewards.flatten()
'''


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "my_losses.py"
    file.write_text(OWN)
    return str(file)


def test_an_own_functions_arguments_are_yaml_keys_and_it_is_tried_before_the_model_loads(own):
    config = load(TINY, [f"loss.name={own}:soft", "loss.args={power: 0.25}", f"advantage.name={own}:ranks"])
    assert "-(r ** 0.25) A / 0.25" in render(config) and "1 (rank - mean rank)" in render(config)
    for overrides, message in (
        (["loss.args={powr: 1}"], "unknown key loss.args.powr; known: power (did you mean power?)"),
        ([f"loss.name={own}:sof"], "has no function sof"),
        ([f"loss.name={own}:reduced"], "returned per_token_loss []; it must be [B, C] = [2, 3], unreduced"),
        ([f"loss.name={own}:raises"], "fails on a batch of two: RuntimeError"),
        ([f"loss.name={own}:raises"], "(my_losses.py, line 22)"),
        ([f"loss.name={own}:bare"], "returned Tensor; it must return a PolicyLoss"),
        (
            [f"loss.name={own}:loose", "loss.args={power: 1.0}"],
            "a configuration can set power only if it stands after a * and has a default",
        ),
        ([f"loss.name={own}:soft", f"advantage.name={own}:flat"], "advantage flat returned shape (4,)"),
    ):
        with pytest.raises(ValueError) as error:
            load(TINY, [f"loss.name={own}:soft", *overrides])
        assert message in str(error.value) and "\n" not in str(error.value)


def test_rewards_and_presets_are_listed_with_what_they_take(capsys):
    assert main(["rewards"]) == main(["presets"]) == 0
    text = capsys.readouterr().out
    for name, function in REWARDS.functions.items():
        assert f"  {name} " in text and inspect.getdoc(function).splitlines()[0] in text
    assert "args: strict = false" in text and "reads: answer\n" in text and "think_weight = 0.7" in text
    assert all(f"  {name} " in text for name in PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_printed_of_a_preset_can_be_pasted_behind_a_command(name):
    (line,) = re.findall(rf"^  {name} .*\n(.*)$", list_presets(), re.M)
    words = shlex.split(line)
    plain = ["preset=trl_1_16_default", "loss.average=sequence", "loss.kl=k3"]  # on policy, without a reference
    assert render(load(TINY, [*plain, *words])) == render(load(TINY, [f"preset={name}"]))


def test_a_second_name_is_said_to_be_one():
    assert re.search(r"^  centered .*\n(?: {25}.*\n)* {25}the same as dr_grpo$", list_losses(), re.M)
    assert list_losses().count("the same as ") == 1


def test_the_catalogue_names_everything_with_arguments_and_sources(capsys):
    assert main(["losses"]) == 0
    text = capsys.readouterr().out
    assert text.strip() == list_losses().strip()
    for key, registry in REGISTRIES.items():
        assert key in text
        for name, function in registry.functions.items():
            assert re.search(rf"^  {re.escape(name)}  *{re.escape(get_formula(function))}$", text, re.M), name
    for name in PRESETS:
        assert f"  {name} " in text
    for registry in (LOSSES, ADVANTAGES):
        for name, function in registry.functions.items():
            assert find_sources(function) or name in ("reinforce", "maxrl"), f"{name} has no source"
    assert "args: clip_low = 0.2, clip_high = 0.2, delta = null" in text


@pytest.mark.slow
def test_check_loss_tells_sound_from_unsound_within_15_seconds(own, capsys):
    start = time.perf_counter()
    assert run_check_loss(f"{own}:soft", {"power": 0.25}) == 0
    assert time.perf_counter() - start < 15
    text = capsys.readouterr().out
    assert "13 laws, all passed" in text and "FAILS" not in text and "power = 0.25" in text
    assert "A > 0" in text and "A < 0" in text and "nonzero everywhere" in text
    assert run_check_loss(f"{own}:crooked", {}) == 1
    text = capsys.readouterr().out
    assert "3 failed: on_policy, clip, learns" in text
    for law in ("on_policy", "clip", "learns"):
        assert re.search(rf"^FAILS +{law} ", text, re.M)


def test_check_advantage(own, capsys):
    assert run_check_advantage("opo", {}) == 0
    assert "breaks  zero_mean" in capsys.readouterr().out
    assert main(["check-advantage", f"{own}:flat"]) == 2
    assert "advantage flat returned shape (4,); it must return [N, G] = (2, 2)" in capsys.readouterr().err
    assert main(["check-advantage", f"{own}:ranks", "scale=2.0"]) == 1  # a reward of None has a rank there
    assert re.search(r"^FAILS +unscored ", capsys.readouterr().out, re.M)


def test_arguments_that_no_configuration_can_set_are_noted(own, capsys):
    run_check_advantage(f"{own}:ranks", {})
    assert "note:" not in capsys.readouterr().out
    Path(own).write_text(OWN.replace("def ranks(rewards, *, scale", "def ranks(rewards, scale"))
    run_check_advantage(f"{own}:ranks", {})
    assert "note: the configuration cannot set scale; make it keyword-only (put it after a *)" in capsys.readouterr().out


def test_a_law_that_is_not_there_cannot_be_declared(own, tmp_path, capsys):
    Path(own).write_text(OWN + '\nranks.breaks = {"zero_men": "a slip"}\n')
    assert main(["check-advantage", f"{own}:ranks"]) == 2
    assert "did you mean zero_mean?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("words, code", [
    (["check-loss", "grpo", "clip_high=0.3"], 0),
    (["check-loss", "grpoo"], 2),
    (["check-loss", "grpo", "clip_hihg=0.3"], 2),
    (["check-loss", "grpo", "0.3"], 2),
    (["check-loss", "grpo", "clip_low=-1"], 2),
    (["losses"], 0),
    (["rewards"], 0),
    (["presets"], 0),
])  # fmt: skip
def test_the_commands_exit_codes(words, code, environment):
    done = subprocess.run(
        [interpreter(), "-m", "grpo_core", *words], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stderr
    assert (code == 2) == (len(done.stderr.splitlines()) == 1)


def test_words_that_mean_nothing_are_refused(capsys):
    assert main(["losses", "grpo"]) == 2
    assert (
        "Got unexpected extra argument (grpo); see python -m grpo_core losses --help" in capsys.readouterr().err
    )


def test_words_are_arguments():
    assert parse_arguments(["a=1", "b=x", "c=null", "d=1.0e-4"]) == {"a": 1, "b": "x", "c": None, "d": 1e-4}
    assert parse_arguments([]) == {} and parse_arguments(["a={"]) == {"a": "{"}  # no YAML: text


def test_a_file_without_keys_and_a_preset_that_is_no_name_are_one_sentence(tmp_path):
    (tmp_path / "list.yaml").write_text("- loss\n")
    for overrides in ([], ["preset=dapo"], ["seed=1"]):
        with pytest.raises(ValueError, match="list.yaml is not a mapping of sections and keys"):
            load(tmp_path / "list.yaml", overrides)
    (tmp_path / "odd.yaml").write_text("preset: [dapo]\n")
    for path, overrides in ((tmp_path / "odd.yaml", []), (TINY, ["preset={"]), (TINY, ["preset=[dapo]"])):
        with pytest.raises(ValueError, match="unknown preset"):
            load(path, overrides)
