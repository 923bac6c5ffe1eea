"""Log-probs of a linear layer equal torch's log_softmax over whole logits, kept or recomputed."""

import functools

import pytest
import torch

from kernels import logprob


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_values_and_gradients_equal_log_softmax(keep: bool, scale: float, monkeypatch):
    """Targets at chunk borders, small and large logits: within 1e-12 in float64."""
    monkeypatch.setattr(logprob, "KEEP_BYTES", 1 << 40 if keep else 0)
    monkeypatch.setattr(logprob, "CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = (torch.randn(31, 5, dtype=torch.float64, generator=generator) * scale).requires_grad_()
    target = torch.tensor([0, 6, 7, 13, 14, 30, 29, 28, 27])
    upstream = torch.randn(9, dtype=torch.float64, generator=generator)
    wanted = (hidden @ weight.t()).log_softmax(-1).gather(1, target[:, None])[:, 0]
    got = logprob.linear_logprob(hidden, weight, target)
    assert (got - wanted).abs().max() < 1e-12 * scale
    gradients, exact = (
        torch.autograd.grad((x * upstream).sum(), (hidden, weight)) for x in (got, wanted)
    )
    for a, b in zip(gradients, exact):
        assert (a - b).abs().max() < 1e-12 * scale


@pytest.mark.parametrize("keep", [True, False])
def test_bf16_keeps_logits_in_fp32(keep: bool, monkeypatch):
    """With bf16 weights, log-probs are those of fp32 logits of the same numbers, up to fp32
    rounding.
    """
    monkeypatch.setattr(logprob, "KEEP_BYTES", 1 << 40 if keep else 0)
    hidden = torch.randn(20, 64).bfloat16().requires_grad_()
    weight = torch.randn(5000, 64).bfloat16().requires_grad_()
    target = torch.randint(0, 5000, (20,))
    got = logprob.linear_logprob(hidden, weight, target)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted = (exact[0] @ exact[1].t()).log_softmax(-1).gather(1, target[:, None])[:, 0]
    assert got.dtype == torch.float32 and (got - wanted).abs().max() < 1e-4
    got.sum().backward()
    wanted.sum().backward()
    for mine, theirs in zip((hidden, weight), exact):
        assert (mine.grad - theirs.grad).norm() < 1e-2 * theirs.grad.norm()


def test_gradients_that_are_not_asked_for_are_not_computed():
    """A frozen weight gets no gradient, and under no_grad nothing is kept."""
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(10, 4)
    logprob.linear_logprob(hidden, weight, torch.tensor([1, 2, 3])).sum().backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not logprob.linear_logprob(hidden, weight, torch.tensor([1, 2, 3])).requires_grad


@pytest.mark.parametrize("keep", [True, False])
def test_temperature_entropy_and_shards(keep: bool, monkeypatch):
    """Temperature, entropies and two merged vocabulary shards equal the dense softmax within
    1e-12.
    """
    monkeypatch.setattr(logprob, "KEEP_BYTES", 1 << 40 if keep else 0)
    monkeypatch.setattr(logprob, "CHUNK", 7)
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 5, dtype=torch.float64), torch.randn(31, 5, dtype=torch.float64)
    target = torch.tensor([0, 6, 7, 13, 14, 30, 29, 28, 12])
    slopes = torch.randn(2, 9, dtype=torch.float64)

    def run(function, *leaves):
        """Return [log-probs, entropies, gradient of each leaf]."""
        leaves = [x.detach().requires_grad_() for x in leaves]
        logps, entropies = function(*leaves)
        loss = (logps * slopes[0] + entropies * slopes[1]).sum()
        return [logps, entropies, *torch.autograd.grad(loss, leaves)]

    def dense(h, w):
        logp = (h @ w.t() / 0.7).log_softmax(-1)
        return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(1)

    wanted = run(dense, hidden, weight)
    got = run(lambda h, w: logprob.linear_logprob(h, w, target, 0.7, True), hidden, weight)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(got, wanted))
    cuts = (slice(0, 13), slice(13, 31))
    parts = []

    def keep_part(x):
        parts.append(x)
        return x

    for cut in cuts:
        logprob.linear_logprob(hidden, weight[cut], target, 0.7, True, cut.start, keep_part)
    whole = logprob.merge_partials(torch.stack(parts))

    def shard(h, w, first):
        return logprob.linear_logprob(h, w, target, 0.7, True, first, lambda x: whole)

    for cut in cuts:
        got = run(functools.partial(shard, first=cut.start), hidden, weight[cut])
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(got[:2], wanted[:2]))
        assert (got[3] - wanted[3][cut]).abs().max() < 1e-12
