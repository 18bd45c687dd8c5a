"""The reward model: a frozen sequence classification model with one label, whose logit is the reward.

It computes in the training process, on the policy's device. The value of a completion depends on its own group alone:
the rows of a prompt are one batch, or several of at most MAX_TOKENS, whatever else is scored in the same call.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo_core.batch import Task
from grpo_core.config.sections import DataConfig, ModelConfig, RunConfig
from grpo_core.counts import quantify
from grpo_core.data.turns import add_completion, list_turns
from grpo_core.model.base_model import describe_wrong_weights
from grpo_core.model.finite_weights import check_finite
from grpo_core.model.loading import (
    check_vocabulary,
    load_tokenizer,
    load_whole_config,
    resolve_model_path,
    using_key,
)
from grpo_core.schema import ConfigError, summarize_error

NAME = "reward_model"  # of the reward
MAX_TOKENS = 8192  # of one forward, padding included; a single longer row is computed alone
MAX_LIMIT = 1e9  # tokens; a tokenizer without a limit has a greater number
MAX_MEASURED = 16  # prompts, the longest, whose tokens are counted before the weights load


@dataclass(frozen=True)
class RewardModel:
    """A reward: the logit of a conversation that consists of the prompt and the completion as the assistant's turn.

    A tokenizer with a chat template renders it; without one the text is the prompt with the completion behind it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: DataConfig  # how the prompts were made

    def __call__(self, completions: Sequence[str], *, prompts: Sequence[str], **columns: Any) -> list[float | None]:
        """Return one logit for each completion; None where the conversation is longer than the model's positions."""
        rows = [{name: values[i] for name, values in columns.items()} for i in range(len(completions))]
        texts = [encode(self.tokenizer, self.data, *texts) for texts in zip(prompts, completions, rows, strict=True)]
        values: list[float | None] = []
        for _, group in groupby(range(len(texts)), key=lambda i: prompts[i]):
            values += self._score_group([texts[i] for i in group])
        return values

    def parameters(self) -> list[torch.Tensor]:
        """Return the weights."""
        return [*self.model.parameters()]

    def _score_group(self, rows: list[list[int]]) -> list[float | None]:
        """Return the logits of the rows of one prompt."""
        limit = find_max_length(self.model.config, self.tokenizer)
        is_scored = [bool(row) and (limit is None or len(row) <= limit) for row in rows]
        scored = [row for row, is_short_enough in zip(rows, is_scored, strict=True) if is_short_enough]
        logits = iter([value for batch in _cut_into_batches(scored) for value in self._compute(batch)])
        return [next(logits) if is_short_enough else None for is_short_enough in is_scored]

    @torch.no_grad()
    def _compute(self, rows: list[list[int]]) -> list[float]:
        """Return the logits of rows that are padded on the right to the longest of them."""
        config, device = self.model.config.get_text_config(), self.model.device
        own_pad = config.pad_token_id
        # the model takes the last token that is no padding, so padding must not be a token of a row
        pad = own_pad if own_pad is not None else next(i for i in range(config.vocab_size) if not _holds(rows, i))
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        config.pad_token_id = pad
        try:
            return self.model(input_ids=ids, attention_mask=mask).logits.float().flatten().tolist()
        finally:
            config.pad_token_id = own_pad


def encode(
    tokenizer: PreTrainedTokenizerBase, data: DataConfig, prompt: str, completion: str, row: dict[str, Any]
) -> list[int]:
    """Return the tokens that the reward model sees of a completion; `row` has the columns of the prompt's task."""
    if tokenizer.chat_template:
        turns = add_completion(list_turns(row, data), completion)
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer(prompt + completion)["input_ids"]


def find_max_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the greatest number of tokens that the model and its tokenizer allow; None without a limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit and limit < MAX_LIMIT]
    return min(limits, default=None)


def _holds(rows: list[list[int]], token: int) -> bool:
    return any(token in row for row in rows)


def _cut_into_batches(rows: list[list[int]]) -> Iterator[list[list[int]]]:
    """Yield consecutive rows, at most MAX_TOKENS together when padded to the longest of them."""
    batch: list[list[int]] = []
    for row in rows:
        width = max(map(len, [*batch, row]))
        if batch and width * (len(batch) + 1) > MAX_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def check_reward_model(config: RunConfig, tasks: Sequence[Task]) -> None:
    """Check what can be known of the reward model of a run before weights load; nothing without one.

    Raises:
        ConfigError: it cannot be found, is no sequence classification model, has more than one label, or its positions
            do not suffice for the longest prompt and sampling.max_new_tokens.
    """
    with _naming_path(config) as path:
        if path is None:
            return
        model = model_of_reward(config, path)
        whole, tokenizer = load_whole_config(model), load_tokenizer(path, model.trust_remote_code)
        check_vocabulary(whole, tokenizer)
        _check_is_reward_model(whole, path, model.trust_remote_code)
    if config.data.prompt == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            f"{_key(config)} is {path!r}, whose tokenizer has no chat template, but data.prompt is chat; choose a "
            f"reward model with a chat template, or data.prompt template"
        )
    longest = heapq.nlargest(MAX_MEASURED, tasks, key=lambda task: len(task.prompt))
    try:
        rows = [encode(tokenizer, config.data, task.prompt, "", task.columns) for task in longest]
    except ConfigError:
        raise
    except Exception as error:  # the template is a Jinja program of the model's author, which may raise anything
        raise ConfigError(
            f"{_key(config)} is {path!r}, whose chat template cannot be filled in: {summarize_error(error)}"
        ) from error
    tokens = max(map(len, rows), default=0)
    limit, new = find_max_length(whole, tokenizer), config.sampling.max_new_tokens
    if limit is not None and tokens + new > limit:
        raise ConfigError(
            f"{_key(config)} is {path!r}, which takes {quantify(limit, 'token')}, but a prompt of "
            f"{quantify(tokens, 'token')} and sampling.max_new_tokens {new} are together more; lower one of them"
        )


def load_reward_model(config: RunConfig, dtype: torch.dtype, device: torch.device) -> RewardModel:
    """Load the weights of the run's reward model in `dtype`.

    Raises:
        ConfigError: see `check_reward_model`; or the weights cannot be loaded, are incomplete or not finite.
    """
    with _naming_path(config) as path:
        assert path is not None
        model = model_of_reward(config, path)
        tokenizer = load_tokenizer(path, model.trust_remote_code)
        _check_is_reward_model(load_whole_config(model), path, model.trust_remote_code)
        prefix = f"model.path is {path!r}, and it cannot be loaded: "
        try:
            classifier, report = AutoModelForSequenceClassification.from_pretrained(
                resolve_model_path(path),
                dtype=dtype,
                attn_implementation=model.attention,
                trust_remote_code=model.trust_remote_code,
                ignore_mismatched_sizes=True,  # they are refused below
                output_loading_info=True,
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # models raise errors of many types
            raise ConfigError(prefix + summarize_error(error)) from error
        if problem := describe_wrong_weights(report):
            raise ConfigError(prefix + problem)
        check_finite(classifier, f"the reward model {path}")
    classifier.requires_grad_(False).eval().to(device)
    return RewardModel(classifier, tokenizer, config.data)


def model_of_reward(config: RunConfig, path: str) -> ModelConfig:
    """Return how the reward model is loaded: as the policy's model, without what is about that model alone."""
    return replace(config.model, path=path, revision=None, rope={})


def _key(config: RunConfig) -> str:
    place = next(i for i, reward in enumerate(config.rewards) if reward.name == NAME)
    return f"rewards[{place}].args.path"


@contextmanager
def _naming_path(config: RunConfig) -> Iterator[str | None]:
    """Yield the path of the run's reward model, or None; errors inside name its key instead of model.path."""
    reward = next((reward for reward in config.rewards if reward.name == NAME), None)
    if reward is None:
        yield None
        return
    with using_key(_key(config)):
        yield reward.args["path"]


def _check_is_reward_model(config: PretrainedConfig, path: str, trust_remote_code: bool) -> None:
    if config.num_labels != 1:
        raise ConfigError(
            f"model.path is {path!r}, which has {quantify(config.num_labels, 'label')}; a reward model is a sequence "
            f"classification model with one label (num_labels in its config.json)"
        )
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not trust_remote_code:
        raise ConfigError(
            f"model.path is {path!r}, of the type {config.model_type}, of which transformers has no sequence "
            f"classification model"
        )
