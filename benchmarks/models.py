"""Check every decoder-only text type of transformers' causal-LM mapping, each built tiny from its configuration class.

    python benchmarks/models.py [TYPE ...]       check these types (default: all); one JSON line each
    python benchmarks/models.py --write          the same, keep the rows, and write the table of docs/models.md
    python benchmarks/models.py --draw           write the table from the rows that were kept
    python benchmarks/models.py --check          check one type, without training

Each type is saved with random weights, loaded as a run loads it, and compared in float32 with plain transformers and PEFT,
with eager attention, row by row, without padding: the log-probs of the sampler, the policy and the reference, the
gradient of the adapter, and greedy completions with `generate`. Then two steps are trained, and the second one again
from the checkpoint of the first, as after a kill.

Verdicts: right; refused, with the sentence; wrong, with the gap; traceback, with the exception; not built, with the
exception.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import tiny_models
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor
from transformers import MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForMultimodalLM, AutoTokenizer

from grpo_core.batch import Rollouts, Task, take
from grpo_core.config.files import load_job
from grpo_core.config.sections import LoraConfig, ModelConfig
from grpo_core.model.base_model import load_base_model
from grpo_core.model.loading import BUILTIN, load_model_config, load_whole_config
from grpo_core.model.packing import Budget
from grpo_core.model.policy import Policy, load_policy
from grpo_core.model.quieten import quieten
from grpo_core.sampling.sampler import Sampler
from grpo_core.schema import ConfigError
from grpo_core.training import job

OUT = ROOT / "benchmarks" / "results" / "models.json"
PAGE, BEGIN, END = ROOT / "docs" / "models.md", "<!-- table -->", "<!-- end of the table -->"
VERDICTS = ("right", "refused", "wrong", "traceback", "not built")
VOCABULARY = 496  # of the built-in tokenizer
LOGPROB_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-5  # nats; relative
ROUTING_TOLERANCE = 0.002  # share of tokens and routers; a token on a tie may go either way
PROMPT_LENGTHS, GROUP_SIZE, NEW_TOKENS = (11, 5, 11, 14), 2, 12
MINUTES = 3  # that one type may take


class Wrong(Exception):
    """A number that is not that of plain transformers with PEFT."""


class TimedOut(Exception):
    """A type took too long."""


def check_type(name: str, folder: Path, trains: bool = True) -> dict[str, Any]:
    """Return the row of one model type."""
    start, row = time.perf_counter(), {"type": name}
    try:
        with time_limit(60 * MINUTES):
            row |= judge(name, folder, trains)
    except TimedOut:
        row |= {"verdict": "traceback", "reason": f"took more than {MINUTES} minutes"}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def judge(name: str, folder: Path, trains: bool) -> dict[str, Any]:
    """Return the verdict on a model type, its gaps, and the reason where it is not right."""
    numbers: dict[str, float] = {}
    try:
        save_model(name, folder)
    except TimedOut:
        raise
    except Exception as error:
        return {"verdict": "not built", "reason": describe(error)}
    try:
        attention = find_attention(folder)
        check_numbers(folder, attention, numbers)
        if trains:
            check_resume(folder, attention)
    except TimedOut:
        raise
    except ConfigError as error:
        return {"verdict": "refused", "reason": str(error), **numbers}
    except Wrong as error:
        return {"verdict": "wrong", "reason": str(error), **numbers}
    except Exception as error:
        return {"verdict": "traceback", "reason": describe(error), **numbers}
    return {"verdict": "right", **numbers, "resumed": trains}


def save_model(name: str, folder: Path) -> None:
    """Write a tiny model of the type, with its towers if it is composite, and the built-in tokenizer."""
    config = tiny_models.make_config(name, VOCABULARY)
    model = tiny_models.make_model(config, is_composite=is_composite(config))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 23)[None], use_cache=False)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    model.save_pretrained(folder)
    for file in (BUILTIN / "tiny").glob("*token*"):
        shutil.copy(file, folder)


def is_composite(config: Any) -> bool:
    """Return whether the type has a text model and towers, of which the text model alone is trained."""
    return config.get_text_config(decoder=True) is not config and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING


def check_numbers(folder: Path, attention: str, numbers: dict[str, float]) -> None:
    """Compare log-probs, gradient and greedy completions with plain transformers and PEFT."""
    model = ModelConfig(path=str(folder), precision="fp32", attention=attention)
    lora = LoraConfig(r=4, alpha=8, target_modules="all-linear")
    load_model_config(model)
    policy = load_policy(model, lora, dtype=torch.float32, temperature=1.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    plain = make_plain(model, policy)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"max_new_tokens": NEW_TOKENS, "notify": lambda text: None}
    sampler = Sampler(policy.causal_lm, tokenizer, routers=policy.routers, **options)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    tasks = [Task(i, "", ids, {}, seed=(0, 0, i)) for i, ids in enumerate(prompts)]
    rollouts = sampler.generate(tasks, GROUP_SIZE)
    numbers["layout"], numbers["decoder"] = policy.layout, sampler.decoder_name if sampler.decoder_name != "plain" else sampler._plain.method
    with policy.training():
        trained = forwards(policy, rollouts)
    with torch.no_grad(), policy.reference():
        reference = forwards(policy, rollouts)
    logprobs = row_by_row(plain, rollouts)
    with torch.no_grad(), plain.disable_adapter():
        plain_reference = row_by_row(plain, rollouts)
    for key, values, expected in (
        ("trainer", trained.detach(), logprobs.detach()),
        ("sampler", rollouts.rollout_logprobs, logprobs.detach()),
        ("reference", reference, plain_reference),
    ):
        numbers[key] = float((values - expected).abs().max())
    numbers["effect"] = float((logprobs - plain_reference).detach().abs().mean())  # of the adapter, in nats
    ours, theirs = gradient(trained, trained_of(policy.model)), gradient(logprobs, trained_of(plain))
    numbers["gradient"] = float((ours - theirs).norm() / theirs.norm())
    tolerance = GRADIENT_TOLERANCE
    if numbers["gradient"] > tolerance:  # it may be as near to the exact gradient as that of float32 is
        exact = gradient(row_by_row(plain.double(), rollouts), trained_of(plain))
        tolerance, numbers["gradient"] = (float((x - exact).norm() / exact.norm()) for x in (theirs, ours))
        tolerance = max(GRADIENT_TOLERANCE, 2 * tolerance)
        plain.float()
    check_routing(policy, rollouts, trained.detach(), numbers)
    greedy = sampler.generate(tasks, 1, greedy=True)
    numbers["greedy"] = float(count_greedy_differences(plain, tasks, greedy))
    for key in ("trainer", "reference", "sampler"):
        if not numbers[key] <= LOGPROB_TOLERANCE:
            raise Wrong(f"log-probs of the {key} differ by {numbers[key]:.2g} nats")
    if not numbers["gradient"] <= tolerance:
        raise Wrong(f"the gradient differs by {numbers['gradient']:.2g}")
    if numbers["greedy"]:
        raise Wrong(f"{numbers['greedy']:.0f} of {len(tasks)} greedy completions differ from generate")


def check_routing(policy: Policy, rollouts: Rollouts, logprobs: Tensor, numbers: dict[str, float]) -> None:
    """Compare the experts of sampler and trainer, and the log-probs [B, C] with those under replayed routing."""
    if policy.routers is None:
        return
    with torch.no_grad():
        numbers["routing_mismatch"] = float(policy.forward(rollouts).routing_mismatch.mean())
        policy.replays_routing = True
        numbers["replay"] = float((forwards(policy, rollouts) - logprobs).abs().max())
        policy.replays_routing = False
    if numbers["routing_mismatch"] > ROUTING_TOLERANCE:
        raise Wrong(f"{numbers['routing_mismatch']:.2%} of the choices of experts differ between sampler and trainer")
    if not numbers["replay"] <= LOGPROB_TOLERANCE:
        raise Wrong(f"log-probs under replayed routing differ by {numbers['replay']:.2g} nats")


def make_plain(model: ModelConfig, policy: Policy) -> Any:
    """Return the same model as PEFT wraps it, with eager attention and the policy's adapter.

    Of a composite model it is the whole one, with the adapter on its text model.
    """
    whole = load_whole_config(model)
    config = policy.model.peft_config["default"]
    options = {"r": config.r, "lora_alpha": config.lora_alpha}
    if not is_composite(whole):
        base = load_base_model(ModelConfig(path=model.path, precision="fp32", attention="eager"), torch.float32)
        excluded = config.exclude_modules
        adapter = PeftLoraConfig(**options, target_modules="all-linear", exclude_modules=excluded, task_type="CAUSAL_LM")
    else:
        base = AutoModelForMultimodalLM.from_pretrained(model.path, dtype=torch.float32, attn_implementation="eager")
        names = {p.rpartition(".lora_A")[0].removeprefix("base_model.model.model.") for p, _ in policy.model.named_parameters() if "lora_A" in p}
        targets = [name for name, _ in base.named_modules() if "language_model" in name and any(name.endswith("." + n) for n in names)]
        adapter = PeftLoraConfig(**options, target_modules=targets, task_type="CAUSAL_LM")
    plain = get_peft_model(base, adapter, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for own, other in zip(trained_of(plain), trained_of(policy.model), strict=True):
            own.copy_(other)
    return plain


def trained_of(model: Any) -> list[torch.nn.Parameter]:
    """Return the trained parameters."""
    return [p for p in model.parameters() if p.requires_grad]


def forwards(policy: Policy, rollouts: Rollouts) -> Tensor:
    """Return log-probs [B, C], in several forwards."""
    out = torch.zeros(rollouts.completion_ids.shape)
    for packing in policy.plan(rollouts, Budget(120)):
        out = out.index_copy(0, packing.rows, policy.forward(take(rollouts, packing.rows), packing).logprobs)
    return out


def row_by_row(plain: Any, rollouts: Rollouts) -> Tensor:
    """Return log-probs [B, C] of one unpadded row at a time, from the model's own logits."""
    rows = []
    for i in range(len(rollouts)):
        prompt = rollouts.prompt_ids[i][rollouts.prompt_mask[i]]
        completion = rollouts.completion_ids[i][rollouts.completion_mask[i]]
        logits = plain(input_ids=torch.cat([prompt, completion])[None, :-1], use_cache=False).logits[0]
        logprobs = logits[len(prompt) - 1 :].log_softmax(-1).gather(1, completion[:, None]).squeeze(1)
        rows.append(torch.nn.functional.pad(logprobs, (0, rollouts.completion_ids.shape[1] - len(completion))))
    return torch.stack(rows)


def gradient(logprobs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return the gradient of a weighted sum of the log-probs, as one vector."""
    weights = torch.cos(torch.arange(logprobs.numel())).view(logprobs.shape)
    grads = torch.autograd.grad((logprobs * weights).sum(), parameters, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, parameters, strict=True)])


def count_greedy_differences(plain: Any, tasks: Sequence[Task], rollouts: Rollouts) -> int:
    """Return the number of completions that are not those of transformers' `generate`, one prompt at a time."""
    differing = 0
    for i, task in enumerate(tasks):
        ids = torch.tensor([task.prompt_ids])
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
        try:
            out = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        except (ValueError, RuntimeError):  # types whose cache transformers itself cannot use
            out = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
        expected = out[0, len(task.prompt_ids) :].tolist()
        differing += expected != rollouts.completion_ids[i][rollouts.completion_mask[i]].tolist()
    return differing


def find_attention(folder: Path) -> str:
    """Return sdpa, or eager for a model that does not support sdpa."""
    try:
        load_base_model(ModelConfig(path=str(folder), precision="fp32"), torch.float32)
    except ConfigError as error:
        if "use eager" in str(error):
            return "eager"
        raise
    return "sdpa"


def check_resume(folder: Path, attention: str) -> None:
    """Train two steps, and the second one again from the checkpoint of the first."""
    out = folder / "runs"
    words = [
        f"model.path={folder}", f"output_dir={out}", "name=run", "model.precision=fp32", f"model.attention={attention}", "lora.r=4", "data.limit=40",
        "trainer.num_steps=2", "trainer.completions_per_step=8", "sampling.group_size=4", "sampling.max_new_tokens=6",
        "checkpoint.every=1", "evaluation.num_tasks=0", "rewards=[{name: num_unique_chars}]", "loss.kl_coef=0.1",
    ]  # fmt: skip
    job.train(load_job(ROOT / "configs" / "tiny.yaml", words))
    whole = read_step(out / "run", 1)
    newest = max((out / "run" / "checkpoints").glob("step_*"), default=None) or max((out / "run" / "checkpoints").iterdir())
    shutil.rmtree(newest)
    shutil.rmtree(out / "run" / "adapter")
    job.train(load_job(None, [f"resume={out / 'run'}"]))
    again = read_step(out / "run", 1)
    for key in ("loss", "grad_norm", "reward", "kl"):
        if whole[key] != again[key]:
            raise Wrong(f"after a resume {key} is {again[key]}, not {whole[key]}")
    if not whole["grad_norm"] > 0:
        raise Wrong("nothing is trained")
    if not whole["logprob_gap"] < 10 * LOGPROB_TOLERANCE:
        raise Wrong(f"in training the log-probs of sampler and trainer differ by {whole['logprob_gap']:.2g} nats")


def read_step(run: Path, step: int) -> dict[str, Any]:
    """Return the metrics of a step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in reversed(rows) if row["step"] == step)


def describe(error: Exception) -> str:
    """Return the exception and the place that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error).strip()[:160]} ({Path(frame.filename).name}:{frame.lineno})".replace("\n", " ")


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimedOut in the block after some seconds."""

    def stop(*_: Any) -> None:
        raise TimedOut

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def keep(rows: Sequence[dict[str, Any]]) -> None:
    """Put the rows in the place of earlier ones of their types."""
    stored = {row["type"]: row for row in json.loads(OUT.read_text())["rows"]} if OUT.exists() else {}
    stored |= {row["type"]: row for row in rows}
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    lines = ",\n".join(json.dumps(stored[name]) for name in sorted(stored))
    OUT.write_text(f'{{"versions": {json.dumps(versions)}, "rows": [\n{lines}\n]}}\n')


def draw() -> str:
    """Return docs/models.md with the table of the rows that were kept."""
    stored = json.loads(OUT.read_text())
    rows, counts = stored["rows"], Counter(row["verdict"] for row in stored["rows"])
    built = len(rows) - counts["not built"]
    numbers = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    lines = [
        f"{len(rows)} types with {', '.join(f'{name} {number}' for name, number in stored['versions'].items())} on a CPU: {numbers}. Of the "
        f"{built} that can be built, {counts['right'] / built:.1%} are right.",
        "",
        "| type | verdict | sampled | trained in | largest gap in nats | resumed | reason |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gaps = [row[key] for key in ("trainer", "sampler", "reference") if key in row]
        cells = (
            f"`{row['type']}`", row["verdict"], row.get("decoder", ""), row.get("layout", ""),
            f"{max(gaps):.0e}" if gaps else "", "yes" if row.get("resumed") else "", shorten(row.get("reason", "")),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    head, _, rest = PAGE.read_text().partition(BEGIN)
    return f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}"


def shorten(reason: str) -> str:
    """Return a reason without what differs between runs, as a cell of a table."""
    return re.sub(r"/tmp/\S+", "FOLDER", reason).replace("|", "/").split(" You can install")[0]


def main() -> None:
    """Check the types of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--no-training", action="store_true")
    options = parser.parse_args()
    if options.draw:
        PAGE.write_text(draw())
        return
    torch.set_num_threads(1)
    quieten()
    rows = []
    for name in ["llama"] if options.check else options.types or tiny_models.TYPES:
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            rows.append(check_type(name, Path(folder), trains=not (options.check or options.no_training)))
        print(json.dumps(rows[-1]), flush=True)
    if options.write:
        keep(rows)
        PAGE.write_text(draw())
    print(json.dumps(dict(Counter(row["verdict"] for row in rows))), file=sys.stderr)


if __name__ == "__main__":
    main()
