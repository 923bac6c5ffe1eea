"""The plain twin of linear_logprob equals torch's log_softmax of whole logits."""

import pytest
import torch
from test_kl import capped

from kernels import logprob


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (300.0, 0.0), (1.0, 2.0), (300.0, 2.0)])
def test_values_and_gradients_equal_log_softmax(keep: bool, scale: float, cap: float, monkeypatch):
    """For targets at chunk borders and logits of any size, capped or not: float64, 1e-12."""
    monkeypatch.setattr(logprob, "KEEP_BYTES", 1 << 40 if keep else 0)
    monkeypatch.setattr(logprob, "CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = (torch.randn(31, 5, dtype=torch.float64, generator=generator) * scale).requires_grad_()
    target = torch.tensor([0, 6, 7, 13, 14, 30, 29, 28, 27])
    upstream = torch.randn(9, dtype=torch.float64, generator=generator)
    z = capped(hidden @ weight.t(), cap)
    wanted = z.log_softmax(-1).gather(1, target[:, None])[:, 0]
    got = logprob.linear_logprob(hidden, weight, target, cap=cap)
    assert (got - wanted).abs().max() < 1e-12 * scale
    leaves = (hidden, weight)
    ours, theirs = (torch.autograd.grad((x * upstream).sum(), leaves) for x in (got, wanted))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-12 * scale


@pytest.mark.parametrize("keep", [True, False])
def test_bf16_keeps_logits_in_fp32(keep: bool, monkeypatch):
    """Log-probs of bf16 weights are those of fp32 logits of the same numbers, to fp32 rounding."""
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
    for mine, theirs in zip((hidden, weight), exact, strict=True):
        assert (mine.grad - theirs.grad).norm() < 1e-2 * theirs.grad.norm()


def test_gradients_that_are_not_asked_for_are_not_computed():
    """A frozen weight gets no gradient, and under no_grad nothing is kept."""
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(10, 4)
    logprob.linear_logprob(hidden, weight, torch.tensor([1, 2, 3])).sum().backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not logprob.linear_logprob(hidden, weight, torch.tensor([1, 2, 3])).requires_grad


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("keep", [True, False])
def test_temperature_entropy_cap_and_shards(keep: bool, cap: float, monkeypatch):
    """Scaled or capped logits, entropies and a vocabulary in two shards, merged, are those of the
    dense softmax; within 1e-12."""
    monkeypatch.setattr(logprob, "KEEP_BYTES", 1 << 40 if keep else 0)
    monkeypatch.setattr(logprob, "CHUNK", 7)
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 5, dtype=torch.float64), torch.randn(31, 5, dtype=torch.float64)
    target = torch.tensor([0, 6, 7, 13, 14, 30, 29, 28, 12])
    slopes = torch.randn(2, 9, dtype=torch.float64)

    def run(function, *leaves):
        leaves = [x.detach().requires_grad_() for x in leaves]
        logps, entropies = function(*leaves)
        total = (logps * slopes[0] + entropies * slopes[1]).sum()
        return [logps, entropies, *torch.autograd.grad(total, leaves)]

    def dense(h, w):
        logp = (capped(h @ w.t(), cap) / 0.7).log_softmax(-1)
        return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(1)

    def chunked(h, w, start=0, combine=None):
        return logprob.linear_logprob(h, w, target, 0.7, True, start, combine, cap)

    wanted = run(dense, hidden, weight)
    got = run(chunked, hidden, weight)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(got, wanted, strict=True))
    shards, parts = (slice(0, 13), slice(13, 31)), []
    for shard in shards:
        chunked(hidden, weight[shard], shard.start, lambda x: parts.append(x) or x)
    whole = logprob.merge_partials(torch.stack(parts))
    d_hidden = 0
    for shard in shards:

        def on_one_rank(h, w, start=shard.start):
            return chunked(h, w, start, lambda x: whole)

        logps, entropies, d_h, d_w = run(on_one_rank, hidden, weight[shard])
        assert (logps - wanted[0]).abs().max() < 1e-12
        assert (entropies - wanted[1]).abs().max() < 1e-12
        assert (d_w - wanted[3][shard]).abs().max() < 1e-12
        d_hidden = d_hidden + d_h
    assert (d_hidden - wanted[2]).abs().max() < 1e-12
