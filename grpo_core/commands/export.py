"""The `export` command: write a run's policy as a merged model or as an adapter, with tokenizer and model card.

The adapter is merged in float32 and rounded once. The logits are compared twice with those of base and adapter in
float32: after merging, where they may differ by the order of additions only, and after loading the written model,
where they also differ by rounding.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from grpo_core.commands.errors import print_error
from grpo_core.commands.evaluate import load_problems
from grpo_core.commands.model_card import base_name, make_card
from grpo_core.commands.open_policy import OpenedPolicy, open_source
from grpo_core.config.lora_checks import ADAPTER_FILE
from grpo_core.config.precision import DTYPES
from grpo_core.counts import format_significant, quantify
from grpo_core.data.word_problems import make_word_problems
from grpo_core.model.adapter import count_adapter, find_base_layer, list_trained_tokens, shares_tokens
from grpo_core.model.quantized import count_weights, to_plain
from grpo_core.monitor import run_lock
from grpo_core.monitor.file_modes import apply_umask
from grpo_core.monitor.progress import show_elapsed
from grpo_core.report.run_reader import locate_completions, read_rows
from grpo_core.schema import ConfigError, describe_impossible_path, first_line, printable, summarize_error
from grpo_core.training.checkpoint import error_text
from grpo_core.training.run_dir import describe_unwritable

MARK = "export.json"  # in every exported folder: dtype and gap; a folder with it may be overwritten
MAX_MERGE_GAP = 1e-3  # relative gap after merging in float32; a wrong merge is orders of magnitude above it
# relative gap after rounding to 8 (bf16) or 11 (fp16) bits, which adds up over layers; 0.03 to 0.09 was seen in bf16
MAX_ROUNDING_GAP = {"fp32": 1e-3, "bf16": 0.3, "fp16": 0.05}
MAX_REPOSITORY_CHARS = 96  # the hub's own limit
MAX_COMPARED_TEXTS, MAX_COMPARED_TOKENS = 8, 512  # tokens of each text


@dataclass(frozen=True)
class Gap:
    """The difference between the logits of an exported model and those of base and adapter, over all positions."""

    largest: float  # the greatest absolute difference
    relative: float  # norm of all differences / norm of the logits minus their mean over the vocabulary
    kl: float  # nats per token, KL(base and adapter || exported)
    same_token: float  # share of positions with the same most probable token
    tokens: int

    def __str__(self) -> str:
        return (
            f"over {quantify(self.tokens, 'token')}: largest {self.largest:.2g}, relative {self.relative:.2g}, KL "
            f"{format_significant(self.kl, 2)} "
            f"nats per token, the same most probable token at {self.same_token:.2%}"
        )


def run_export(
    source: str,
    overrides: Sequence[str] = (),
    *,
    output: Path | None = None,
    adapter: bool = False,
    dtype: str = "auto",
    push: str | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> int:
    """Write the model, or the adapter, with tokenizer and card; upload it if `push` names a hub repository.

    `overrides` are as in `open_source`: model.path names a base model that has moved.

    Returns 0, or 3 if the logits differ by more than merging or rounding explains. An export that fails is deleted.

    Raises:
        ConfigError: the source cannot be opened, written, loaded again or uploaded, or has no adapter to export.
    """
    check_repository(push)
    if output is not None or os.path.exists(Path(source) / "config.yaml"):
        _check_output(output or Path(source) / _default_name(adapter), is_written=not dry_run)
    opened = open_source(source, [*overrides, "model.precision=fp32"], notify=partial(print, file=sys.stderr))
    if adapter and not opened.has_adapter:
        raise ConfigError(f"--adapter: {opened.weights} is a whole model and has no adapter")
    folder = output or (opened.folder or Path()) / _default_name(adapter)
    dtype = _trained_dtype(opened) if dtype == "auto" else dtype
    if dry_run:
        _preview(opened, folder, adapter, dtype, push)
        return 0
    if not _write(opened, folder, adapter, dtype):
        return 3
    print(f"{'adapter' if adapter else 'model'}: {folder}")
    if push is not None:
        upload(folder, push, private=private)
        print(f"uploaded: {push}")
    return 0


def _write(opened: OpenedPolicy, folder: Path, adapter: bool, dtype: str) -> bool:
    """Write all files of an export. Return False if the logits differ too much; the folder is then deleted.

    Raises:
        ConfigError: see `run_export`. Whatever is raised, the folder is deleted.
    """
    _make_empty_folder(folder)
    is_whole, gap = False, None
    try:
        if adapter:
            _write_adapter(opened, folder)
        else:
            rows = choose_rows(opened)
            with show_elapsed("merging and comparing"):
                merge_gap, gap = write_merged(opened, folder, dtype, rows)
            if not _check_gaps(merge_gap, gap, dtype):
                return False
        _write_rest(opened, folder, adapter, dtype, gap)
        is_whole = True
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--output {folder} cannot be written: {error_text(error)}") from None
    finally:
        if not is_whole:
            shutil.rmtree(folder, ignore_errors=True)
    return True


def write_merged(opened: OpenedPolicy, folder: Path, dtype: str, rows: Sequence[Tensor]) -> tuple[Gap, Gap]:
    """Merge the adapter in float32 and write the model in `dtype`. Changes the opened policy.

    Weights in 4 bits are dequantised first. `rows` are the token ids whose logits are compared.

    Returns the gaps after merging and after loading the written model.
    """
    expected = compute_logits(opened.policy.causal_lm, rows)
    to_plain(opened.policy.model, torch.float32)  # PEFT cannot merge into weights in 4 bits
    untie_adapted_embeddings(opened.policy.causal_lm)
    model = opened.policy.model.merge_and_unload() if opened.has_adapter else opened.policy.model
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and embeddings is not None and head.weight is not embeddings.weight:
        _declare_untied(model)  # one of them was trained as a whole module
    merge_gap = compare(expected, compute_logits(model, rows))
    model.to(DTYPES[dtype])
    model.config.dtype = DTYPES[dtype]
    model.save_pretrained(folder)
    apply_umask(*folder.glob("*.safetensors"))
    try:
        trust = opened.config.model.trust_remote_code
        written = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust)
    except Exception as error:  # models raise errors of many types
        raise ConfigError(f"the written model cannot be loaded: {summarize_error(error)}; not exported") from error
    return merge_gap, compare(expected, compute_logits(written.to(opened.sampler.device).eval(), rows))


def untie_adapted_embeddings(model: PreTrainedModel) -> None:
    """Give the head its own weight where it shares that of the embeddings and one of the two has an adapter of its own.

    Merging would otherwise change both. Trained tokens of the embeddings are those of a tied head too, so they stay
    tied.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embeddings is None:
        return
    bases = [find_base_layer(embeddings), find_base_layer(head)]
    is_adapted = bases[0] is not embeddings or bases[1] is not head
    if not is_adapted or bases[0].weight is not bases[1].weight or shares_tokens(head):
        return
    bases[1].weight = torch.nn.Parameter(bases[1].weight.detach().clone(), requires_grad=False)
    _declare_untied(model)


def _declare_untied(model: PreTrainedModel) -> None:
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False


def _check_gaps(merge_gap: Gap, written_gap: Gap, dtype: str) -> bool:
    """Print the gaps. Return whether both are within their bounds; print an error for the first that is not."""
    checks = [
        ("the merged model", "fp32", merge_gap, MAX_MERGE_GAP),
        ("the written model", dtype, written_gap, MAX_ROUNDING_GAP[dtype]),
    ]
    for model, kind, gap, bound in checks:
        print(f"logits of {model} ({kind}) against base and adapter, {gap}")
        if not gap.relative <= bound:  # NaN fails too
            print_error(
                f"the relative gap of {model} is {gap.relative:.2g}, but {kind} explains {bound} at most; not exported"
            )
            return False
    return True


@torch.no_grad()
def compute_logits(model: PreTrainedModel, rows: Sequence[Tensor]) -> list[Tensor]:
    """Return the logits after every token of each row of ids, [T, V] float32 on the CPU."""
    return [model(ids[None].to(model.device), use_cache=False).logits[0].float().cpu() for ids in rows]


def compare(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> Gap:
    """Return the gap between two lists of logits, each [T, V]."""
    reference, other = torch.cat([*expected]), torch.cat([*actual])
    spread = reference - reference.mean(dim=1, keepdim=True)
    p, q = reference.log_softmax(dim=1), other.log_softmax(dim=1)
    return Gap(
        float((reference - other).abs().max()),
        float((reference - other).norm() / spread.norm()),
        float((p.exp() * (p - q)).sum(dim=1).mean()),
        float((reference.argmax(dim=1) == other.argmax(dim=1)).double().mean()),
        len(reference),
    )


def choose_rows(opened: OpenedPolicy) -> list[Tensor]:
    """Return the token ids to compare logits on: texts, and the tokens whose embeddings the adapter trains."""
    rows = [
        opened.tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_COMPARED_TOKENS]
        for text in choose_texts(opened)
    ]
    trained = list_trained_tokens(opened.policy.model)
    rows += [trained[i : i + MAX_COMPARED_TOKENS] for i in range(0, len(trained), MAX_COMPARED_TOKENS)]
    return [torch.tensor(ids) for ids in rows if ids]


def choose_texts(opened: OpenedPolicy) -> list[str]:
    """Return the texts to compare logits on.

    They are prompts with completions of the run's last step; else prompts of its data; else built-in problems.
    """
    file = (opened.folder or Path()) / "completions.jsonl"
    if opened.folder and (places := locate_completions(file)):
        last = places[max(places)]
        every = max(1, len(last) // MAX_COMPARED_TEXTS)
        rows = read_rows(file, last[::every][:MAX_COMPARED_TEXTS])
        return [row["prompt"] + row["text"] for row in rows]
    try:
        tasks, _ = load_problems(opened, None, None, MAX_COMPARED_TEXTS)
        return [task.prompt for task in tasks[:MAX_COMPARED_TEXTS]]
    except ConfigError:  # the data is not on this machine
        return [row["question"] for row in make_word_problems("test", MAX_COMPARED_TEXTS)]


def check_repository(name: str | None) -> None:
    """Check the name of a hub repository, if there is one, without the network.

    Raises:
        ConfigError: the hub accepts no such name.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if name is None:
        return
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ConfigError(
            f"--push is {name!r}; it must be ORG/NAME or NAME, of at most {MAX_REPOSITORY_CHARS} letters, digits, "
            f"hyphens, underscores and points, with no hyphen or point at either end, no two in a row, and no .git at "
            f"the end"
        ) from None


def upload(folder: Path, repository: str, *, private: bool) -> None:
    """Upload the folder to a hub repository, which is created if it does not exist.

    Raises:
        ConfigError: the upload failed.
    """
    from huggingface_hub import HfApi

    try:
        with show_elapsed(f"uploading to {repository}"):
            api = HfApi()
            api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(folder_path=folder, repo_id=repository, ignore_patterns=[MARK])
    except Exception as error:  # of many types: no network, no login, an invalid name
        raise ConfigError(
            f"--push {repository}: the upload failed ({first_line(error)}); log in with `hf auth login` or set "
            f"HF_TOKEN; the exported files are in {folder}"
        ) from error


def _write_rest(opened: OpenedPolicy, folder: Path, adapter: bool, dtype: str, gap: Gap | None) -> None:
    """Write the tokenizer, the model card and the mark of an export."""
    opened.tokenizer.save_pretrained(folder)
    card = make_card(opened, adapter, dtype, str(gap) if gap else None)
    (folder / "README.md").write_text(card, encoding="utf-8")
    mark = {"dtype": dtype, "gap": asdict(gap) if gap else None}
    (folder / MARK).write_text(json.dumps(mark), encoding="utf-8")


def _write_adapter(opened: OpenedPolicy, folder: Path) -> None:
    """Write the adapter in PEFT's format, without paths of this machine."""
    opened.policy.model.to(DTYPES[_trained_dtype(opened)])
    opened.policy.save(folder)
    path = folder / ADAPTER_FILE
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = base_name(opened)
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _trained_dtype(opened: OpenedPolicy) -> str:
    """Return the precision of the adapter or model in the run folder; fp32 if there is none."""
    from safetensors import safe_open

    files = []
    if opened.folder:
        files = [path for kind in ("adapter", "model") for path in (opened.folder / kind).glob("*.safetensors")]
    if not files:
        return "fp32"
    with safe_open(files[0], framework="pt") as file:
        kind = file.get_slice(next(iter(file.keys()))).get_dtype()
    return {"BF16": "bf16", "F16": "fp16"}.get(kind, "fp32")


def _default_name(adapter: bool) -> str:
    return "export-adapter" if adapter else "export"


def _check_output(folder: Path, *, is_written: bool) -> None:
    """Check the output folder before the model loads: as `_check_folder`, and that it can be written."""
    _check_folder(folder, is_written=is_written)
    if problem := describe_unwritable(folder):
        raise ConfigError(f"--output {folder} cannot be written: {problem}")


def _check_folder(folder: Path, *, is_written: bool = True) -> None:
    """Check that the folder may be created, or emptied because it is an earlier export.

    Raises:
        ConfigError: it holds anything else, is a symbolic link, cannot exist, or, if it `is_written` now, lies in
            the folder of a run that is being written.
    """
    if problem := describe_impossible_path(folder):
        raise ConfigError(f"--output {problem}")
    if is_written:
        run_lock.check_not_written(folder, "--output")
    if folder.is_symlink():
        raise ConfigError(f"--output {folder} is a symbolic link, which is not replaced; name another folder")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {folder} is a file; name a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise ConfigError(f"--output {folder} holds files that are not an export; name another folder")


def _make_empty_folder(folder: Path) -> None:
    """Create the folder, or empty it if it is an earlier export.

    Raises:
        ConfigError: as `_check_folder`, or the folder cannot be written.
    """
    _check_folder(folder)
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / MARK).write_text("{}", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be written: {error_text(error)}") from None


def _preview(opened: OpenedPolicy, folder: Path, adapter: bool, dtype: str, push: str | None) -> None:
    """Print the names of the files that would be written or uploaded, the size of the weights, and the model card."""
    whole = count_weights(opened.policy.model.parameters(), opened.policy.model).count
    added = count_adapter(opened.policy.model)
    count = added if adapter else whole - added
    size = count * DTYPES[dtype].itemsize / 1e6
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    configs = ["adapter_config.json"] if adapter else ["config.json", "generation_config.json"]
    print(f"to {folder}{f' and https://huggingface.co/{push}' if push else ''}:")
    print(f"  {weights:<28} {size:,.2f} MB in {dtype}")
    print("\n".join(f"  {name}" for name in [*configs, "the tokenizer's files", "README.md"]))
    print("\nREADME.md:\n")
    print(printable(make_card(opened, adapter, dtype, None)))
    print("Nothing was written.")
