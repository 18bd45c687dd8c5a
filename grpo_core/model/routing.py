"""The routers of a mixture-of-experts model: record the experts that they choose, compare, and replace them.

Sampler and trainer compute in other orders and shapes, so their router logits differ by rounding, and a token near a
tie goes to other experts. The share of such tokens is a metric, and `sampling.replay_routing` trains with the sampler's
experts: R3, arXiv:2510.11370. The trainer's router still computes the gates of these experts from its own logits.

A router is a module whose class is named so and which chooses experts by `topk`, as in all types of transformers but
a few. While a forward is watched, that call is intercepted, and nothing else of the model is touched: so there is no
code for single model types. Whether it works is tried once with every model (`find_routers`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

from grpo_core.model.lora_targets import make_without_weights
from grpo_core.model.trial import is_same, without_trace
from grpo_core.model.update_mode import evaluation_mode, keep_when_recomputed
from grpo_core.schema import ConfigError

ROUTER_NAME = re.compile(r"(Router|Gate|Gating)$")  # of the class, in all versions of transformers that are supported
COPY_NAME = re.compile(r"\.(original_module|modules_to_save\.[^.]+)$")  # of a module of which PEFT trains a copy
NUM_TRIED_TOKENS = 5


def name_routers(model: nn.Module) -> list[str]:
    """Return the names of the modules whose class is named as a router; empty for a dense model."""
    return [name for name, module in model.named_modules() if ROUTER_NAME.search(type(module).__name__)]


def check_has_routers(config: PretrainedConfig, key: str, value: object, trust_remote_code: bool = False) -> None:
    """Refuse `key` for a model without routers, of which the configuration suffices.

    Raises:
        ConfigError: names the key, its value and the model type.
    """
    try:
        model = make_without_weights(config, trust_remote_code)
    except Exception:  # loading the weights will raise the same error
        return
    if not name_routers(model):
        raise ConfigError(f"{_begin_refusal(key, value, config.model_type)} has no routers; set it to {_off(value)}")


def check_can_route(model_type: str, routers: Routers | None, key: str, value: object, *, balances: bool) -> None:
    """Refuse `key` for a loaded model whose routers choose in a way that is not known here; None: not found.

    Raises:
        ConfigError: the chosen experts cannot be recorded; or their probabilities are not known, and `key` needs them.
    """
    problem = None
    if routers is None:
        problem = "choice of experts cannot be recorded"
    elif balances and not routers.has_probabilities:
        problem = "probabilities of experts are not known"
    if problem:
        raise ConfigError(
            f"{_begin_refusal(key, value, model_type)} has routers whose {problem}; set it to {_off(value)}"
        )


def _begin_refusal(key: str, value: object, model_type: str) -> str:
    return f"{key} is {str(value).lower()}, but the {model_type} model at model.path"


def _off(value: object) -> str:
    return "false" if value is True else "0"


class _Choice(TorchFunctionMode):
    """Watch the functions that one router calls, and replace the experts that its topk number `number` chooses.

    Without a number, nothing is replaced, and the last topk is taken for the choice.
    """

    def __init__(self, number: int | None = None, experts: Tensor | None = None) -> None:
        super().__init__()
        self.number, self.experts, self.count = number, experts, 0
        self.scores = self.own = torch.empty(0)  # input and indices of the topk that chooses
        self.used: Tensor | None = None  # indices that the router goes on with
        self.normalised: Tensor | None = None  # the last output of a softmax or sigmoid before that topk
        self.is_sigmoid = False
        self._last: tuple[Tensor | None, bool] = (None, False)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("softmax", "sigmoid"):
            self._last = out, name == "sigmoid"
        if name != "topk":
            return out
        self.count += 1
        if self.number is None or self.count == self.number:
            self.scores, self.own = args[0] if args else kwargs["input"], out[1]
            self.used, (self.normalised, self.is_sigmoid) = self.own, self._last
            if self.experts is not None:
                self.used = self.experts.reshape(self.own.shape).to(self.own.dtype)
                return torch.return_types.topk((self.scores.gather(-1, self.used), self.used))
        return out

    def probabilities(self) -> Tensor:
        """Return the probabilities of all experts, [..., E]: the router's softmax, or its sigmoid over their sum.

        A router that chooses by its logits has the softmax of these.
        """
        if self.normalised is None or self.normalised.shape != self.scores.shape:
            return self.scores.float().softmax(dim=-1)
        values = self.normalised.float()
        return values / values.sum(dim=-1, keepdim=True) if self.is_sigmoid else values


@dataclass
class RoutedForward:
    """One forward whose routers are watched: T tokens, L routers, k experts for each token."""

    routers: Routers
    sampled: Tensor | None = None  # [T, L, k] experts that the sampler chose; None: unknown
    replays: bool = False  # they replace those that the routers choose
    keeps_choices: bool = False  # the backward needs the probabilities
    own: dict[int, Tensor] = field(default_factory=dict)  # [T, k] that each router chose by itself
    choices: dict[int, _Choice] = field(default_factory=dict)

    @contextmanager
    def active(self, *, is_recomputed: bool = False) -> Iterator[None]:
        """Watch the routers while the model computes, and when checkpointed layers are computed again."""
        modules = [module for place in self.routers.places for module in place]
        previous = [vars(module).get("forward") for module in modules]
        for layer, place in enumerate(self.routers.places):
            for module in place:
                vars(module)["forward"] = self._watch(layer, module.forward, is_recomputed)
        try:
            if is_recomputed:
                yield
            else:
                with keep_when_recomputed(lambda: self.active(is_recomputed=True)):
                    yield
        finally:
            for module, forward in zip(modules, previous, strict=True):
                if forward is None:
                    del vars(module)["forward"]
                else:
                    vars(module)["forward"] = forward

    def _watch(self, layer: int, forward: Callable, is_recomputed: bool) -> Callable:
        def compute(*args: Any, **kwargs: Any) -> Any:
            experts = self.sampled[:, layer] if self.replays and self.sampled is not None else None
            choice = _Choice(self.routers.numbers[layer], experts)
            with choice:
                out = forward(*args, **kwargs)
            if not is_recomputed:
                self.own[layer] = choice.own.reshape(-1, self.routers.top_k).to(self.routers.dtype)
                if self.keeps_choices:
                    self.choices[layer] = choice
            return out

        return compute

    def own_experts(self) -> Tensor:
        """Return the experts that the routers chose by themselves, [T, L, k] in the dtype of the routers."""
        return torch.stack([self.own[layer] for layer in range(len(self.routers))], dim=1)

    def mismatch(self) -> Tensor:
        """Return the share of the routers whose own choice is another set than the sampler's, [T] float32."""
        assert self.sampled is not None
        own, sampled = (x.sort(dim=-1).values for x in (self.own_experts(), self.sampled))
        return (own != sampled).any(dim=-1).float().mean(dim=-1)

    def balance(self, members: Tensor) -> Tensor:
        """Return the load-balancing loss of each row, [b]: E * sum_i f_i P_i, a mean over the layers.

        f_i is the share of the row's tokens that go to expert i, and P_i the mean of its probability: the formula of
        transformers' `load_balancing_loss_func`, of one layer and one sequence at a time. Its least value is about k.
        `members` [b, T] float32 is 1 where a token belongs to a row. arXiv:2101.03961, arXiv:2412.19437 (per sequence).
        """
        members = members / members.sum(dim=1, keepdim=True).clamp(min=1)
        losses = []
        for layer in range(len(self.routers)):
            choice = self.choices[layer]
            probabilities = choice.probabilities().flatten(0, -2)  # [T, E]
            assert choice.used is not None
            used = choice.used.reshape(-1, self.routers.top_k)
            load = torch.zeros_like(probabilities).scatter_(1, used, 1.0)
            losses.append(probabilities.shape[1] * ((members @ load) * (members @ probabilities)).sum(dim=1))
        return torch.stack(losses).mean(dim=0)


@dataclass(frozen=True)
class Routers:
    """The routers of a model, in the order of its modules. All of them choose the same number of experts.

    Where an adapter has a trained copy of a router (lora.modules_to_save), the two are one router.
    """

    places: Sequence[Sequence[nn.Module]]  # L routers: modules of which one computes
    numbers: Sequence[int]  # [L] the call of topk that chooses the experts, from 1, in each router's forward
    top_k: int  # k experts for each token
    num_experts: int  # of the router that has most
    has_probabilities: bool = True  # the probabilities of the experts are known, for the load-balancing loss

    def __len__(self) -> int:
        return len(self.places)

    @property
    def dtype(self) -> torch.dtype:
        """The smallest dtype that holds the number of an expert."""
        return torch.uint8 if self.num_experts <= 256 else torch.int16

    def begin(
        self, sampled: Tensor | None = None, *, replays: bool = False, keeps_choices: bool = False
    ) -> RoutedForward:
        """Return a forward to be watched; `sampled` [T, L, k] are compared, or replace what the routers choose."""
        return RoutedForward(self, sampled, replays, keeps_choices)


def find_routers(model: Any) -> Routers | None:
    """Return the routers of a causal language model; None where it has none, or their experts cannot be replaced.

    Tried on a few tokens: every router must choose experts for each token once, the model must compute the same with
    the experts that it chose, and something else with others.
    """
    names = name_routers(model)
    if not names:
        return None
    places: dict[str, list[nn.Module]] = {}
    for name in names:
        places.setdefault(COPY_NAME.sub("", name), []).append(model.get_submodule(name))
    with torch.no_grad(), without_trace(model), evaluation_mode([*model.modules()]):
        try:
            routers, logits = _watch_once(model, [*places.values()])
            return routers if routers is not None and _replaces(model, routers, logits) else None
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return None


def _watch_once(model: Any, places: Sequence[Sequence[nn.Module]]) -> tuple[Routers | None, Tensor]:
    """Return the routers among `places`, None where one does not choose once for each token, and the logits."""
    seen: list[list[tuple[_Choice, Any]]] = [[] for _ in places]  # calls that choose, with what they return

    def watch(forward: Callable, calls: list[tuple[_Choice, Any]]) -> Callable:
        def compute(*args: Any, **kwargs: Any) -> Any:
            with _Choice() as choice:
                out = forward(*args, **kwargs)
            if choice.count:
                calls.append((choice, out))
            return out

        return compute

    modules = [(module, calls) for place, calls in zip(places, seen, strict=True) for module in place]
    for module, calls in modules:
        vars(module)["forward"] = watch(module.forward, calls)
    logits = _compute_logits(model)
    for module, _ in modules:
        del vars(module)["forward"]
    chosen = [(place, *calls[0]) for place, calls in zip(places, seen, strict=True) if calls]
    is_for_each_token = all(choice.own.shape[:-1].numel() == NUM_TRIED_TOKENS for _, choice, _ in chosen)
    counts = {choice.own.shape[-1] for _, choice, _ in chosen}
    if len(counts) != 1 or not is_for_each_token or any(len(calls) > 1 for calls in seen):
        return None, logits
    routers = Routers(
        places=[place for place, _, _ in chosen],
        numbers=[choice.count for _, choice, _ in chosen],
        top_k=counts.pop(),
        num_experts=max(choice.scores.shape[-1] for _, choice, _ in chosen),
        has_probabilities=all(_has_probabilities(choice, out) for _, choice, out in chosen),
    )
    return routers, logits


def _has_probabilities(choice: _Choice, out: Any) -> bool:
    """Return whether the router has a softmax or sigmoid over all experts, or returns the logits that it chose by."""
    if choice.normalised is not None and choice.normalised.shape == choice.scores.shape:
        return True
    outputs = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]
    alike = [x for x in outputs if x.numel() == choice.scores.numel() and x.is_floating_point()]
    return any(torch.equal(x.reshape(choice.scores.shape), choice.scores) for x in alike)


def _replaces(model: Any, routers: Routers, logits: Tensor) -> bool:
    """Return whether the model computes the same with its own experts, and something else with others."""
    watched = routers.begin()
    with watched.active():
        _compute_logits(model)
    own, results = watched.own_experts().long(), []
    for experts in (own, (own + 1) % routers.num_experts):
        with routers.begin(experts, replays=True).active():
            results.append(_compute_logits(model))
    has_others = routers.top_k < routers.num_experts
    return is_same(results[0], logits) and not (has_others and torch.equal(results[1], logits))


def _compute_logits(model: Any) -> Tensor:
    ids = torch.arange(2, 2 + NUM_TRIED_TOKENS, device=model.device)[None]
    return model(input_ids=ids % model.config.get_text_config().vocab_size, use_cache=False).logits


def watching(routed: RoutedForward | None) -> AbstractContextManager[None]:
    """Return the context of a watched forward, or of one that is not watched."""
    return nullcontext() if routed is None else routed.active()
