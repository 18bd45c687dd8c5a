"""The `export` command: a run's policy as others load it, merged or as an adapter, with a card that says what it is.

LoRA is merged in float32 and rounded once. Logits are compared twice with those of base and adapter in float32: merged,
where the gap is the order of additions and nothing else, and loaded again from what was written, where it is rounding.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from grpo_core.commands.evaluate import problems
from grpo_core.commands.model_card import base_name, card
from grpo_core.commands.open_policy import Opened, open_source
from grpo_core.data.word_problems import word_problems
from grpo_core.monitor.progress import working
from grpo_core.report.run_reader import completion_places, rows_at
from grpo_core.schema import ConfigError, printable
from grpo_core.training.checkpoint import in_words

MARK = "export.json"  # in every folder that was exported to
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MERGED = 1e-3  # the relative gap that merging in float32 may leave; a wrong merge is orders above it
# after rounding, which has 8 bits in bf16 and 11 in fp16 and adds up over layers: 0.03 to 0.09 was seen in bf16
ALLOWED = {"fp32": 1e-3, "bf16": 0.3, "fp16": 0.05}
COMPARED, LONGEST = 8, 512  # texts, and tokens of each


@dataclass(frozen=True)
class Gap:
    """How far the logits of what was written are from those of base and adapter, over all compared positions."""

    largest: float  # the greatest difference of a logit
    relative: float  # the norm of all differences over the norm of the logits about their mean
    kl: float  # nats a token, from the merged model to base and adapter
    same_token: float  # the share of positions whose most probable token is the same
    tokens: int

    def __str__(self) -> str:
        return (
            f"over {self.tokens} tokens: largest {self.largest:.2g}, relative {self.relative:.2g}, KL {self.kl:.2g} "
            f"nats a token, the same most probable token at {self.same_token:.2%}"
        )


def run_export(
    source: str,
    *,
    output: Path | None = None,
    adapter: bool = False,
    dtype: str = "auto",
    push: str | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> int:
    """Write the model or adapter with its tokenizer and card, and upload it where asked to. Returns 3 where it is off.

    Raises:
        ConfigError: what cannot be opened, written or uploaded; --adapter of what has none.
    """
    opened = open_source(source, ["model.precision=fp32"], say=partial(print, file=sys.stderr))
    if adapter and not opened.has_adapter:
        raise ConfigError(f"--adapter: {opened.weights} is a whole model and has no adapter")
    folder = output or (opened.folder or Path()) / ("export-adapter" if adapter else "export")
    dtype = _trained_dtype(opened) if dtype == "auto" else dtype
    if dry_run:
        _preview(opened, folder, adapter, dtype, push)
        return 0
    _make_room(folder)
    gap = None
    try:
        if adapter:
            _write_adapter(opened, folder)
        else:
            texts = texts_to_compare(opened)
            with working("merging and comparing"):
                merged, gap = write_merged(opened, folder, dtype, texts)
            checked = [("merged", "fp32", merged, MERGED), ("as written", dtype, gap, ALLOWED[dtype])]
            for step, kind, found, bound in checked:
                print(f"{step} in {kind}, against base and adapter: {found}")
                if not found.relative <= bound:
                    shutil.rmtree(folder)
                    print(f"grpo_core: that is more than {kind} explains ({bound}): not exported", file=sys.stderr)
                    return 3
        opened.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card(opened, adapter, dtype, str(gap) if gap else None), encoding="utf-8")
        told = {"dtype": dtype, "gap": asdict(gap) if gap else None}
        (folder / MARK).write_text(json.dumps(told), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be written: {in_words(error)}") from None
    print(f"{'adapter' if adapter else 'model'}: {folder}")
    if push:
        upload(folder, push, private=private)
        print(f"uploaded: {push}")
    return 0


def write_merged(opened: Opened, folder: Path, dtype: str, texts: Sequence[str]) -> tuple[Gap, Gap]:
    """Merge, write in `dtype`, and compare: as merged in float32, and as loaded from what was written.

    The policy is merged and rounded afterwards.
    """
    wanted = logits_of(opened.policy.causal_lm, opened, texts)
    model = opened.policy.model.merge_and_unload() if opened.has_adapter else opened.policy.model
    merged = compare(wanted, logits_of(model, opened, texts))
    model.to(DTYPES[dtype])
    model.config.dtype = DTYPES[dtype]
    model.save_pretrained(folder)
    written = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(opened.sampler.device).eval()
    return merged, compare(wanted, logits_of(written, opened, texts))


@torch.no_grad()
def logits_of(model: PreTrainedModel, opened: Opened, texts: Sequence[str]) -> list[Tensor]:
    """The logits after every token of each text, [T, V] float32 on the CPU."""
    found = []
    for text in texts:
        ids = opened.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :LONGEST]
        found.append(model(ids.to(opened.sampler.device), use_cache=False).logits[0].float().cpu())
    return found


def compare(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> Gap:
    """The gap between two lists of logits."""
    one, other = torch.cat([*wanted]), torch.cat([*got])
    spread = one - one.mean(dim=1, keepdim=True)
    p, q = one.log_softmax(dim=1), other.log_softmax(dim=1)
    return Gap(
        float((one - other).abs().max()),
        float((one - other).norm() / spread.norm()),
        float((p.exp() * (p - q)).sum(dim=1).mean()),
        float((one.argmax(dim=1) == other.argmax(dim=1)).double().mean()),
        len(one),
    )


def texts_to_compare(opened: Opened) -> list[str]:
    """Prompts with completions of the run's last step; else prompts of its data; else the built-in problems."""
    file = (opened.folder or Path()) / "completions.jsonl"
    if opened.folder and (places := completion_places(file)):
        last = places[max(places)]
        rows = rows_at(file, last[:: max(1, len(last) // COMPARED)][:COMPARED])
        return [row["prompt"] + row["text"] for row in rows]
    try:
        return [task.prompt for task in problems(opened, None, None, COMPARED)[0][:COMPARED]]
    except ConfigError:  # data that is not here
        return [row["question"] for row in word_problems("test", COMPARED)]


def upload(folder: Path, repository: str, *, private: bool) -> None:
    """Put the folder into a repository of the hub, which is made where it is not there.

    Raises:
        ConfigError: the hub does not take it.
    """
    from huggingface_hub import HfApi

    try:
        with working(f"uploading to {repository}"):
            api = HfApi()
            api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(folder_path=folder, repo_id=repository, ignore_patterns=[MARK])
    except Exception as error:  # of many kinds: no network, no login, a name that is none
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--push {repository}: the hub did not take it ({why}); `hf auth login` or HF_TOKEN says who you are, and "
            f"what would have gone is in {folder}"
        ) from error


def _write_adapter(opened: Opened, folder: Path) -> None:
    """The adapter in PEFT's format; a folder of this machine is no name for its base."""
    opened.policy.model.to(DTYPES[_trained_dtype(opened)])
    opened.policy.save(folder)
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = base_name(opened)
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _trained_dtype(opened: Opened) -> str:
    """The precision in which the adapter or the model lies in the run folder."""
    from safetensors import safe_open

    found = opened.folder and next(
        (path for kind in ("adapter", "model") for path in (opened.folder / kind).glob("*.safetensors")), None
    )
    if not found:
        return "fp32"
    with safe_open(found, framework="pt") as file:
        kind = file.get_slice(next(iter(file.keys()))).get_dtype()
    return {"BF16": "bf16", "F16": "fp16"}.get(kind, "fp32")


def _make_room(folder: Path) -> None:
    """Raise ConfigError where something else than an earlier export lies."""
    if folder.is_file():
        raise ConfigError(f"--output {folder} is a file; name a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise ConfigError(f"--output {folder} holds something that is no export; name another folder")
    if folder.exists():
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
        (folder / MARK).write_text("{}", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be written: {in_words(error)}") from None


def _preview(opened: Opened, folder: Path, adapter: bool, dtype: str, push: str | None) -> None:
    """What would be written and uploaded."""
    size = DTYPES[dtype].itemsize
    policy = opened.policy
    named = dict(policy.model.named_parameters())
    counted = [p.numel() for name, p in named.items() if ("lora_" in name) == adapter]
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    print(f"to {folder}{f' and https://huggingface.co/{push}' if push else ''}:")
    print(f"  {weights:<28} {sum(counted) * size / 1e6:,.2f} MB in {dtype}")
    rest = ["adapter_config.json"] if adapter else ["config.json", "generation_config.json"]
    print("\n".join(f"  {name}" for name in [*rest, "the tokenizer's files", "README.md"]))
    print("\nREADME.md:\n")
    print(printable(card(opened, adapter, dtype, None)))
    print("Nothing was written.")
