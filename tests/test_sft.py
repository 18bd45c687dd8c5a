import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import child_environment, start_two_ranks, wait_for
from peft import PeftModel
from safetensors.torch import load_file
from test_run import overrides, read, without_times
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_core.batch import Task, TrainBatch
from grpo_core.cli import main
from grpo_core.config.files import load
from grpo_core.config.sections import LoraConfig, LossConfig, ModelConfig, RunConfig, SftConfig, TargetConfig
from grpo_core.data.word_problems import make_word_problems
from grpo_core.distributed.signals import RunFailed
from grpo_core.model.loading import load_tokenizer
from grpo_core.model.memory import Budgets
from grpo_core.model.new_model import new_tokenizer
from grpo_core.model.packing import Budget
from grpo_core.model.policy import load_policy
from grpo_core.monitor.aggregates import Stats
from grpo_core.objective.token_weights import Totals
from grpo_core.random_keys import make_key
from grpo_core.schema import ConfigError
from grpo_core.training import checkpoint, sft
from grpo_core.training.control import Control
from grpo_core.training.prepare import build_objective
from grpo_core.training.sft_targets import build_target_rollouts
from grpo_core.training.update import micro_loss

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny.yaml"
THINK = "<think>{cot}</think>\n{answer}"
ROWS = make_word_problems("train", 40)


def make_tasks(tokenizer, count=40):
    prompts = [f"Question: {row['question']}\n" for row in ROWS[:count]]
    return [Task(i, p, tokenizer(p)["input_ids"], ROWS[i], seed=(0, 0, i)) for i, p in enumerate(prompts)]


def test_the_loss_is_the_models_own_cross_entropy():
    tokenizer = load_tokenizer("builtin:tiny")
    policy = load_policy(ModelConfig(), LoraConfig(r=0), dtype=torch.float32, temperature=1.0)
    rollouts = build_target_rollouts(
        make_tasks(tokenizer, 6), SftConfig(), tokenizer, tokenizer.eos_token_id, torch.device("cpu")
    )
    config = RunConfig(loss=LossConfig(name="reinforce", average="token", kl_coef=0.0))
    mask = rollouts.completion_mask
    totals = Totals(tokens=mask.sum(), completions=torch.tensor(6), max_new_tokens=1)
    ours = micro_loss(
        build_objective(config), TrainBatch(rollouts, torch.ones(6, 1), mask), policy.forward(rollouts), totals, Control(0.0, 0.0), Stats()
    )
    summed = 0.0
    for i in range(6):
        prompt, target = rollouts.prompt_ids[i][rollouts.prompt_mask[i]], rollouts.completion_ids[i][mask[i]]
        assert target[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(target[:-1]) == f"<think>{ROWS[i]['cot']}</think>\n{ROWS[i]['answer']}"
        labels = torch.cat([torch.full_like(prompt, -100), target])
        summed += policy.causal_lm(torch.cat([prompt, target])[None], labels=labels[None]).loss * len(target)
    torch.testing.assert_close(ours, summed / mask.sum())


def own_cross_entropy(model, tokenizer, rows, template=THINK):
    """Summed over the tokens of all rows, and their number: transformers' own loss, a row at a time."""
    nats, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(f"Question: {row['question']}\n")["input_ids"]
        target = [*tokenizer(template.format(**row), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + target])
        with torch.no_grad():
            nats += float(model(ids, labels=torch.tensor([[-100] * len(prompt) + target])).loss) * len(target)
        count += len(target)
    return nats, count


def test_the_held_out_loss_is_the_models_own_whatever_the_order_and_the_seeds():
    tokenizer = load_tokenizer("builtin:tiny")
    policy = load_policy(ModelConfig(), LoraConfig(r=0), dtype=torch.float32, temperature=1.0)
    config = SftConfig(targets=[TargetConfig("{answer}"), TargetConfig(THINK)])

    def answers(tasks):
        rollouts = build_target_rollouts(tasks, config, tokenizer, tokenizer.eos_token_id, torch.device("cpu"))
        return rollouts, rollouts.completion_mask

    def measure(tasks):
        budgets = Budgets(Budget(100), Budget(150))
        return sft.compute_held_out_loss(SimpleNamespace(policy=policy, budgets=budgets), answers, tasks)

    tasks = make_tasks(tokenizer, 12)
    chosen = answers([replace(task, seed=make_key("held_out", task.index)) for task in tasks])[0].completions
    thinks = [text.startswith("<think>") for text in chosen]
    assert 2 < sum(thinks) < 10
    parts = [
        own_cross_entropy(policy.causal_lm, tokenizer, [ROWS[i]], THINK if thinks[i] else "{answer}") for i in range(12)
    ]
    result = measure(tasks)
    assert result["tokens"] == sum(count for _, count in parts)
    assert result["loss"] == pytest.approx(sum(nats for nats, _ in parts) / result["tokens"], rel=1e-5)
    others = measure([replace(task, seed=(5, task.index)) for task in reversed(tasks)])
    assert others["tokens"] == result["tokens"] and others["loss"] == pytest.approx(result["loss"], rel=1e-6)


def test_targets_are_mixed_by_their_shares():
    tokenizer = load_tokenizer("builtin:tiny")
    config = SftConfig(targets=[TargetConfig("{answer}", 0.6), TargetConfig("<think>{cot}</think>\n{answer}", 0.4)])
    tasks = make_tasks(tokenizer)
    many = [
        Task(t.index, t.prompt, t.prompt_ids, t.columns, seed=(0, step, t.index)) for step in range(25) for t in tasks
    ]
    rollouts = build_target_rollouts(many, config, tokenizer, 1, torch.device("cpu"))
    direct = sum(not text.startswith("<think>") for text in rollouts.completions) / len(many)
    assert direct == pytest.approx(0.6, abs=0.05)


def test_the_tokenizer_keeps_digits_apart_and_encodes_anything():
    tokenizer = new_tokenizer([row["question"] for row in ROWS], 400)
    for text in ("<think>12 + 3 = 15.</think>\n#### 15", "Grüße, 日本 \t\n ~"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("<think>12")[0] == "<think>" and len(tokenizer.tokenize("1234")) == 4
    assert tokenizer.decode([tokenizer.eos_token_id, *tokenizer("a")["input_ids"]], skip_special_tokens=True) == "a"


def ranks(out, environment, *more):
    """Two processes of the command."""
    run = overrides(
        out,
        trainer__num_steps=8,
        checkpoint__every=3,
        evaluation__every=4,
        lora__dropout=0.1,
        sampling__temperature=0.5,
    )
    return start_two_ranks("-m", "grpo_core", "sft", "--config", TINY, *run, *more, environment=environment)


def ended(processes):
    """Exit codes, and what the first rank said."""
    codes, told = wait_for(processes)
    assert "Traceback" not in told[0][1] + told[1][1], told
    return codes, told[0][0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an adapter's run of two processes that nothing happened to, and what it said."""
    out = tmp_path_factory.mktemp("sft")
    codes, told = ended(ranks(out, child_environment()))
    assert codes == [0, 0]
    return out / "tiny", told


@pytest.mark.slow
@pytest.mark.soak
def test_two_processes_stopped_by_a_signal_and_resumed_are_bitwise_never_stopped(tmp_path, environment, whole):
    cut = ranks(tmp_path, environment)
    metrics, deadline = tmp_path / "tiny" / "metrics.jsonl", time.time() + 100
    while not metrics.exists() or not metrics.read_text():
        assert time.time() < deadline and cut[1].poll() is None
        time.sleep(0.01)
    cut[1].send_signal(signal.SIGTERM)
    codes, told = ended(cut)
    assert codes == [143, 143] and "stopped by SIGTERM after writing a checkpoint; resume=" in told
    assert len(read(metrics)) < 8
    codes, told = ended(ranks(tmp_path, environment, "resume=auto"))
    assert codes == [0, 0] and "resumed from" in told

    for name in ("metrics", "evaluation"):
        one, other = (read(folder / f"{name}.jsonl") for folder in (tmp_path / "tiny", whole[0]))
        assert without_times(one) == without_times(other)
    one, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (tmp_path / "tiny", whole[0]))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_an_adapter_of_two_processes(whole):
    """What is written, and that its loss is cross-entropy as written out here."""
    folder, told = whole
    assert told.splitlines()[-1] == f"adapter: {folder / 'adapter'}"
    rows, evaluations = read(folder / "metrics.jsonl"), read(folder / "evaluation.jsonl")
    columns = {name for name in rows[0] if not name.startswith("seconds")}
    assert columns == {*sft.COLUMNS, "tokens_per_second"} and rows[0]["tokens"] > 32 and rows[-1]["learning_rate"] > 0
    assert [row["step"] for row in evaluations] == [0, 4, 8] and all("accuracy" in row for row in evaluations)
    assert (
        evaluations[-1]["loss"] < evaluations[0]["loss"] and f"loss {evaluations[-1]['loss']:.4f} nats a token" in told
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(ROOT / "grpo_core" / "builtin" / "tiny", dtype=torch.float32).eval()
    before = own_cross_entropy(base, tokenizer, make_word_problems("test", 8))
    after = own_cross_entropy(PeftModel.from_pretrained(base, folder / "adapter"), tokenizer, make_word_problems("test", 8))
    for row, (nats, tokens) in ((evaluations[0], before), (evaluations[-1], after)):
        assert row["tokens"] == tokens and row["loss"] == pytest.approx(nats / tokens, rel=1e-4)


def configured(out, *more, file=TINY):
    return load(
        file, [*overrides(out), "trainer.num_steps=4", "evaluation.num_tasks=4", "trainer.hang_timeout=0", *more]
    )


def test_all_weights_over_a_full_disk_and_a_death_are_bitwise_those_of_a_run_left_alone(
    tmp_path, group, monkeypatch, capsys
):
    """A new model, too: what it starts as is a function of the seed."""

    def config(out, *more):
        steps = ["checkpoint.every=1", "trainer.num_steps=6", "engine.warmup_steps=2"]
        return configured(tmp_path / out, *steps, *more, file=ROOT / "configs" / "tiny_sft.yaml")

    model = sft.run_sft(config("whole", f"sft.output={tmp_path}/here"))
    assert model == tmp_path / "here"
    assert AutoModelForCausalLM.from_pretrained(model).config.vocab_size == len(AutoTokenizer.from_pretrained(model))
    losses = [row["loss"] for row in read(tmp_path / "whole" / "tiny_sft" / "metrics.jsonl")]
    assert losses[-1] < losses[0] - 1
    write, finish = checkpoint._write, sft.evaluate_save_or_stop

    def full(folder, name, *rest):
        if name == "step-000001":
            raise OSError(28, "No space left on device")
        write(folder, name, *rest)

    def dies(run, steps_taken, *rest):
        finish(run, steps_taken, *rest)
        if steps_taken == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", full)
        patch.setattr(sft, "evaluate_save_or_stop", dies)
        with pytest.raises(KeyboardInterrupt):
            sft.run_sft(config("cut"))
    assert (
        "the checkpoint after 1 step could not be written (No space left on device); earlier checkpoints stay"
        in capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match="sft.targets .* in the checkpoint"):
        sft.run_sft(config("cut", "resume=auto", "sft.targets=['{answer}']"))
    again = sft.run_sft(config("cut", "resume=auto", "sft.save_precision=auto"))
    assert "after 2 steps" in capsys.readouterr().out and again == tmp_path / "cut" / "tiny_sft" / "model"
    assert [row["loss"] for row in read(again.parent / "metrics.jsonl")] == losses
    one, other = (load_file(folder / "model.safetensors") for folder in (model, again))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name].bfloat16()) for name in one)
    assert {value.dtype for value in (*one.values(), *other.values())} == {torch.bfloat16, torch.float32}


def test_data_without_a_chain_of_thought_and_going_on_from_a_model(tmp_path, group):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "What is {i} + 1?", "answer": "{i + 1}"}}\n' for i in range(40)))
    data = [f"data.path={rows}", "trainer.num_steps=1"]
    whole = sft.run_sft(configured(tmp_path, *data, "name=a", "lora.r=0", "loss.kl_coef=0", 'sft.targets=["{answer}"]'))
    with pytest.raises(ConfigError, match="sft.targets uses the column {cot}; known: answer, question"):
        sft.run_sft(configured(tmp_path, *data, "name=b"))
    adapter = sft.run_sft(configured(tmp_path, *data, "name=c", f"model.path={whole}", "sft.targets=['{answer}']"))
    assert adapter == tmp_path / "c" / "adapter" and load_file(adapter / "adapter_model.safetensors")
    last, first = (read(tmp_path / name / "evaluation.jsonl")[i]["loss"] for name, i in (("a", -1), ("c", 0)))
    assert first == pytest.approx(last, rel=1e-5)
    with pytest.raises(ConfigError, match="holds an adapter and not a model.*export RUN --merged"):
        sft.run_sft(configured(tmp_path, *data, "name=d", f"model.path={adapter}"))


@pytest.mark.parametrize("column, given, message", [
    ("cot", None, "sft.targets uses the column 'cot', which is null in row 3 of {}"),
    ("cot", "1 + " * 2000, r"row 3 of {}.*: the target .* has \d,\d{{3}} tokens and the longest prompt \d+ .* only 1024 positions"),
])  # fmt: skip
@pytest.mark.parametrize("where", ["the data", "the evaluation data"])
def test_a_target_that_cannot_be_is_one_sentence_before_the_model_loads(
    tmp_path, group, monkeypatch, column, given, message, where
):
    monkeypatch.setattr(sft, "load_policy", None)
    files = {name: tmp_path / f"{name.split()[1]}.jsonl" for name in ("the data", "the evaluation data")}
    for name, path in files.items():
        bad = {column: given} if name == where else {}
        rows = [{**row, **(bad if i == 2 else {})} for i, row in enumerate(ROWS[:8])]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.path={files['the data']}", f"data.eval_path={files['the evaluation data']}"]
    with pytest.raises(ConfigError, match=message.format(where)):
        sft.run_sft(configured(tmp_path, *data))


@pytest.mark.parametrize("given, message", [
    (["trainer.num_passes=2"], "trainer.num_passes is 2; it must be 1 for sft: one optimizer step per batch"),
    (["sft.new_model={}", "sft.new_model.vocab_size=400"], "lora.r is 16; it must be 0 with sft.new_model"),
    (["sft.output=/dev/null/model"], "sft.output is /dev/null/model, which cannot be written: Not a directory"),
    (["sft.targets=[]"], "sft.targets is empty"),
    (["sft.targets=[{template: x, share: 0}]"], r"sft.targets\[0\].share is 0.0; it must be above 0"),
    (["sft.targets=['{answer:d}']"], "sft.targets: '{answer:d}' cannot be filled in"),
])  # fmt: skip
def test_what_sft_cannot_do_is_one_sentence(tmp_path, group, given, message):
    with pytest.raises(ConfigError, match=message):
        sft.run_sft(configured(tmp_path, *given))


def test_only_the_reward_of_the_evaluation_needs_its_columns(tmp_path, group):
    other = ["data.columns={reply: answer}", "sft.targets=['{reply}']", "trainer.num_steps=1"]
    with pytest.raises(ConfigError, match="reward correct_answer needs the column 'answer'"):
        sft.run_sft(configured(tmp_path, *other))
    adapter = sft.run_sft(configured(tmp_path, *other, "evaluation.num_tasks=0"))
    assert adapter.is_dir() and not (tmp_path / "tiny" / "evaluation.jsonl").exists()


def test_a_run_that_learns_nothing_and_one_that_is_not_finite_end(tmp_path, group):
    still = ["trainer.num_steps=12", "engine.learning_rate=1e-30", "alerts=stop", "trainer.completions_per_step=8"]
    with pytest.raises(RunFailed, match="alerts is stop, and the adapter has not moved in 10 steps"):
        sft.run_sft(configured(tmp_path, "name=still", "evaluation.num_tasks=0", *still))
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "still" / "checkpoints")] == ["step-000010"]
    broken = configured(tmp_path, "name=broken", "evaluation.num_tasks=0", "trainer.max_skipped_steps=2")
    run, _, answers = sft.setup(broken)
    calls = []

    def breaks(tasks):
        calls.append(tasks)
        if len(calls) == 2:
            run.policy.parameters()[0].data.fill_(float("nan"))
        return answers(tasks)

    with pytest.raises(RunFailed, match="not finite in 2 steps in a row, from step 2 on"):
        sft.train(run, breaks)
    assert [path.name for path in checkpoint.list_checkpoints(run.folder / "checkpoints")] == ["step-000001"]
    assert (run.folder / "incidents" / "step-000002-rank-0.safetensors").exists()
    assert [row["skipped"] for row in read(run.folder / "metrics.jsonl")] == [0, 1, 1]


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}ED{% endfor %}{% if add_generation_prompt %}<me>{% if thinks %}<think>{% endif %}{% endif %}"


@pytest.mark.slow
def test_a_chat_template_and_stop_strings_hold_in_sft_and_evaluate(tmp_path, capsys):
    """The prompts of targets and of held-out problems, the end of a target, and the end of a sampled answer."""
    model, (end,) = tmp_path / "model", load_tokenizer("builtin:tiny")("ED", add_special_tokens=False)["input_ids"][-1:]
    shutil.copytree(ROOT / "grpo_core" / "builtin" / "tiny", model)
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [settings["eos_token_id"], end]}))
    template = CHAT.replace("ED", load_tokenizer("builtin:tiny").decode([end]))
    words = [
        f"model.path={model}", f"output_dir={tmp_path}", "name=chat", "trainer.num_steps=2", "trainer.completions_per_step=8", "data.limit=40",
        "data.prompt=chat", f"data.chat_template={template}", "data.chat_template_kwargs={thinks: true}", "sampling.stop=['=']",
        "sampling.max_new_tokens=16", "evaluation.num_tasks=6", "evaluation.every=2", "engine.learning_rate=0.001",
    ]  # fmt: skip
    targets, build = [], sft.build_target_rollouts

    def keep(tasks, *given, **named):
        targets.append((tasks, build(tasks, *given, **named)))
        return targets[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "build_target_rollouts", keep)
        sft.run_sft(load(TINY, words))
    run = tmp_path / "chat"
    for tasks, rollouts in targets:
        assert all(task.prompt.startswith("<user>") and task.prompt.endswith("<me><think>") for task in tasks)
        last = rollouts.completion_ids.gather(1, rollouts.lengths()[:, None] - 1)
        assert (last == end).all()
    assert main(["evaluate", str(run), "--limit", "6", "--samples", "2"]) == 0
    for file in ("evaluation_completions.jsonl", "evaluate/completions.jsonl"):
        rows = [json.loads(line) for line in (run / file).read_text().splitlines()]
        assert all(row["prompt"].endswith("<me><think>") for row in rows if "prompt" in row)
        stopped = [row for row in rows if "=" in row["text"]]
        assert stopped and all(row["text"].endswith("=") and row["text"].count("=") == 1 and not row["truncated"] for row in stopped)
