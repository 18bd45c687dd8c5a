import pytest
import torch

from grpo_core.kl import kl_exact
from grpo_core.logprobs import token_divergence, token_logprobs


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunking_changes_nothing(chunk_size, temperature):
    torch.manual_seed(0)
    lm_head = torch.nn.Linear(8, 11, bias=False)
    hidden = torch.randn(3, 5, 8, requires_grad=True)
    ids = torch.randint(11, (3, 5))
    table = (lm_head(hidden) / temperature).log_softmax(-1)
    naive = table.gather(-1, ids[..., None]).squeeze(-1)
    chunked, entropy = token_logprobs(hidden, lm_head, ids, temperature=temperature, chunk_size=chunk_size)
    torch.testing.assert_close(chunked, naive)
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(-1).detach())
    assert not entropy.requires_grad
    upstream = torch.randn(3, 5)
    parameters = [hidden, lm_head.weight]
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


def test_the_whole_table_is_never_held():
    """[B, C, V] would be 512 rows; no tensor of more than a chunk's rows may be saved for backward."""
    lm_head = torch.nn.Linear(4, 64, bias=False)
    hidden = torch.randn(8, 64, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        token_logprobs(hidden, lm_head, torch.zeros(8, 64, dtype=torch.long), chunk_size=16)
    assert not any(shape[-1:] == (64,) and len(shape) == 2 and shape[0] > 16 for shape in saved), saved


def test_the_entropy_has_a_gradient_where_asked_to():
    torch.manual_seed(0)
    lm_head = torch.nn.Linear(8, 11, bias=False)
    hidden, ids = torch.randn(3, 5, 8, requires_grad=True), torch.zeros(3, 5, dtype=torch.long)
    table = (lm_head(hidden) / 0.7).log_softmax(-1)
    _, entropy = token_logprobs(hidden, lm_head, ids, temperature=0.7, chunk_size=4, entropy_gradient=True)
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
    assert torch.autograd.grad(token_divergence(hidden, reference, lm_head, kl_exact).sum(), reference, allow_unused=True) == (None,)
