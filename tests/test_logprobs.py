import pytest
import torch

from grpo_core.model.logprobs import token_divergence, token_logprobs
from grpo_core.objective.kl import kl_exact


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("frozen", [False, True])
def test_chunking_changes_nothing(chunk_size, temperature, frozen):
    torch.manual_seed(0)
    lm_head = torch.nn.Linear(8, 11, bias=False).requires_grad_(not frozen)
    hidden = torch.randn(3, 5, 8, requires_grad=True)
    ids = torch.randint(11, (3, 5))
    table = (lm_head(hidden) / temperature).log_softmax(-1)
    naive = table.gather(-1, ids[..., None]).squeeze(-1)
    chunked, entropy, squares = token_logprobs(hidden, lm_head, ids, temperature=temperature, chunk_size=chunk_size)
    torch.testing.assert_close(chunked, naive)
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(-1).detach())
    torch.testing.assert_close(squares, table.exp().square().sum(-1).detach())
    assert not entropy.requires_grad and not squares.requires_grad
    upstream = torch.randn(3, 5)
    parameters = [hidden] if frozen else [hidden, lm_head.weight]
    for a, b in zip(
        torch.autograd.grad(naive, parameters, upstream),
        torch.autograd.grad(chunked, parameters, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(
            token_logprobs(hidden, lm_head, ids, temperature=temperature, chunk_size=chunk_size)[0], naive
        )


@pytest.mark.parametrize("frozen", [False, True])
def test_the_whole_table_is_never_held(frozen):
    """[B, C, V] would be 512 rows; no tensor of more than a chunk's rows may be saved for backward."""
    lm_head = torch.nn.Linear(4, 64, bias=False).requires_grad_(not frozen)
    hidden = torch.randn(8, 64, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        token_logprobs(hidden, lm_head, torch.zeros(8, 64, dtype=torch.long), chunk_size=16)
    assert not any(shape[-1:] == (64,) and len(shape) == 2 and shape[0] > 16 for shape in saved), saved


@pytest.mark.parametrize("frozen", [False, True])
def test_the_entropy_has_a_gradient_where_asked_to(frozen):
    torch.manual_seed(0)
    lm_head = torch.nn.Linear(8, 11, bias=False).requires_grad_(not frozen)
    hidden, ids = torch.randn(3, 5, 8, requires_grad=True), torch.zeros(3, 5, dtype=torch.long)
    table = (lm_head(hidden) / 0.7).log_softmax(-1)
    _, entropy, squares = token_logprobs(hidden, lm_head, ids, temperature=0.7, chunk_size=4, entropy_gradient=True)
    torch.testing.assert_close(squares, table.exp().square().sum(-1).detach())
    assert not squares.requires_grad
    ours, naive = (torch.autograd.grad(e.sum(), hidden)[0] for e in (entropy, -(table.exp() * table).sum(-1)))
    torch.testing.assert_close(ours, naive)
    assert ours.abs().max() > 1e-3


@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_a_divergence_over_the_vocabulary_is_the_plain_sum_and_pulls_the_policy_only(chunk_size):
    torch.manual_seed(0)
    lm_head = torch.nn.Linear(8, 11, bias=False)
    hidden, reference = torch.randn(3, 5, 8, requires_grad=True), torch.randn(3, 5, 8, requires_grad=True)
    p, q = ((lm_head(h) / 0.7).log_softmax(-1) for h in (hidden, reference))
    naive = (p.exp() * (p - q.detach())).sum(-1)
    ours = token_divergence(hidden, reference, lm_head, kl_exact, temperature=0.7, chunk_size=chunk_size)
    torch.testing.assert_close(ours, naive)
    grads = [torch.autograd.grad(x.sum(), hidden)[0] for x in (ours, naive)]
    torch.testing.assert_close(*grads)
    assert torch.autograd.grad(
        token_divergence(hidden, reference, lm_head, kl_exact).sum(), reference, allow_unused=True
    ) == (None,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_gives_a_confident_token_its_small_gradient(dtype):
    """1 - p is rounded relative to itself, not to 1."""
    lm_head = torch.nn.Linear(2, 3, bias=False).requires_grad_(False).to(dtype)
    lm_head.weight.copy_(torch.tensor([[4.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    hidden = torch.tensor([[2.0, 0.5]], dtype=dtype, requires_grad=True)
    logprobs, *_ = token_logprobs(hidden, lm_head, torch.tensor([0]))
    logprobs.sum().backward()
    p = torch.tensor([8.0, 0.5, -0.5], dtype=torch.double).softmax(0)
    want = torch.stack([4 * (1 - p[0]), p[2] - p[1]])
    torch.testing.assert_close(hidden.grad[0].double(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=0)


def test_memory_is_bounded_whatever_the_length_and_vocabulary():
    """The largest tensor of logits that is ever asked for, at a vocabulary of 151,936."""
    largest = []

    def statistics(logits, ids, temperature, with_gradient):
        largest.append(logits.numel() * 12)  # float32 logits, their exponentials, one temporary
        return *(torch.zeros(len(ids)) for _ in range(3)), torch.zeros_like(logits)

    lm_head = torch.nn.Linear(2, 151_936, bias=False).requires_grad_(False)
    hidden = torch.randn(300, 2, requires_grad=True)
    token_logprobs(hidden, lm_head, torch.zeros(300, dtype=torch.long), statistics=statistics)
    assert len(largest) > 1 and max(largest) < 200e6
