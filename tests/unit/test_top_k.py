"""A teacher's top K: whole softmaxes written out, the chain rule of the tail, and its bounds."""

import math

import pytest
import torch
from test_kl import ROWS, VOCAB, capped, dense, inputs
from torch import Tensor

from kernels import top_k
from kernels.kl import DIVERGENCES, linear_kl
from kernels.top_k import bucket_divergence, linear_buckets, linear_top_k

K = 5


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the vocabulary of 37 into chunks of 8."""
    monkeypatch.setattr(top_k, "CHUNK", 8)


def both(
    k: int, tau: float, student: list[Tensor], caps: tuple[float, float] = (0.0, 0.0)
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, log-probs of the teacher and of the student over the K tokens and the rest."""
    ids, p = linear_top_k(*inputs()[2:], k, tau, cap=caps[1])
    sums = linear_buckets(*student, ids, tau, cap=caps[0])
    if k == VOCAB:
        p, sums = p[:, :-1], sums[:, :-1]
    return ids, p, sums.log_softmax(1)


def merged(chances: Tensor, ids: Tensor) -> Tensor:
    """Return chances (M, V) of the K tokens and of all others together, (M, K + 1)."""
    others = torch.ones_like(chances).scatter(1, ids, 0.0)
    return torch.cat([chances.gather(1, ids), (chances * others).sum(1, keepdim=True)], 1)


def divergence_of(p: Tensor, q: Tensor, name: str, mix: float) -> Tensor:
    """Return a divergence of chances (M, n), by its definition."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(1)

    m = mix * p + (1 - mix) * q
    return {
        "forward": lambda: kl(p, q),
        "reverse": lambda: kl(q, p),
        "jsd": lambda: mix * kl(p, m) + (1 - mix) * kl(q, m),
        "skew_forward": lambda: kl(p, m),
        "skew_reverse": lambda: kl(q, (1 - mix) * p + mix * q),
    }[name]()


@pytest.mark.parametrize(("tau", "caps"), [(1.0, (0, 0)), (0.7, (0, 0)), (0.7, (2.0, 3.0))])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_and_gradients_are_those_of_merged_softmaxes(
    divergence, kept, tau, caps, monkeypatch
):
    """1e-12 in float64, with logits kept for the backward or computed again."""
    if not kept:
        monkeypatch.setattr(top_k, "KEEP_BYTES", 0)
    student = [x.requires_grad_() for x in inputs()[:2]]
    ids, p, q = both(K, tau, student, caps)
    h, w, teacher_h, teacher_w = *student, *inputs()[2:]
    teacher = (capped(teacher_h @ teacher_w.T, caps[1]) / tau).softmax(1)
    assert ids.tolist() == teacher.topk(K).indices.tolist()
    plain = merged((capped(h @ w.T, caps[0]) / tau).softmax(1), ids)
    assert (p.exp() - merged(teacher, ids)).abs().max() < 1e-14
    assert (q - plain.log()).abs().max() < 1e-12
    ours = bucket_divergence(p, q, divergence, 0.3)
    wanted = divergence_of(merged(teacher, ids), plain, divergence, 0.3)
    assert (ours - wanted).abs().max() < 1e-12
    slope = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    pairs = zip(*(torch.autograd.grad(x, student, slope) for x in (ours, wanted)), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-12


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_whole_vocabulary_is_the_full_divergence(divergence):
    student = [x.requires_grad_() for x in inputs()[:2]]
    _, p, q = both(VOCAB, 1.0, student)
    ours = bucket_divergence(p, q, divergence, 0.3)
    full = linear_kl(*student, *inputs()[2:], divergence, 0.3)
    assert (ours - full).abs().max() < 1e-12
    slope = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    pairs = zip(*(torch.autograd.grad(x, student, slope) for x in (ours, full)), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-12


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_what_is_missing_is_the_divergence_inside_the_tail(divergence):
    """The chain rule, and the bounds that follow from masses alone (docs/distill.md).

    With tails P, Q and mixed M: forward lacks P KL(p | q inside), reverse Q KL(q | p inside), jsd
    at most M ln 2, skew_forward at most P ln(M / αP), skew_reverse at most Q ln(M / αQ).
    """
    mix, (h, w, teacher_h, teacher_w) = 0.3, inputs()
    ids, p_log, q_log = both(K, 1.0, [h, w])
    full = dense(h, w, teacher_h, teacher_w, divergence, mix, 1.0)
    gap = full - bucket_divergence(p_log, q_log, divergence, mix)
    assert (gap > -1e-14).all()
    outside = torch.ones(ROWS, VOCAB, dtype=torch.float64).scatter(1, ids, 0.0)
    p, q = ((x @ y.T).softmax(1) * outside for x, y in ((teacher_h, teacher_w), (h, w)))
    p_tail, q_tail = p.sum(1), q.sum(1)

    def inside(a: Tensor, b: Tensor) -> Tensor:
        """Return a's mass times KL of the two, each made whole."""
        a_tail, b_tail = a.sum(1, keepdim=True), b.sum(1, keepdim=True)
        ratio = (a / a_tail) / (b / b_tail)
        return (a * torch.where(a > 0, ratio, 1.0).log()).sum(1)

    m = mix * p + (1 - mix) * q
    turned = (1 - mix) * p + mix * q
    gaps, bounds = {
        "forward": (inside(p, q), None),
        "reverse": (inside(q, p), None),
        "jsd": (mix * inside(p, m) + (1 - mix) * inside(q, m), m.sum(1) * math.log(2)),
        "skew_forward": (inside(p, m), p_tail * (m.sum(1) / (mix * p_tail)).log()),
        "skew_reverse": (inside(q, turned), q_tail * (turned.sum(1) / (mix * q_tail)).log()),
    }[divergence]
    assert (gap - gaps).abs().max() < 1e-12
    if bounds is not None:
        assert (gap <= bounds + 1e-14).all()


def test_a_tail_of_little_mass_keeps_its_digits():
    """The tail's log is exact in fp32 where the K tokens hold all but 1e-13 of the mass."""
    h = torch.tensor([[1.0]])
    w = torch.tensor([[30.0], [0.0], [-1.0], [-2.0]])
    _, p = linear_top_k(h, w, 1)
    wanted = math.log(1 + math.exp(-1) + math.exp(-2)) - 30
    assert p[0, 1].item() == pytest.approx(wanted, abs=1e-5)
    q = linear_buckets(h, w, torch.tensor([[0]])).log_softmax(1)
    assert q[0, 1].item() == pytest.approx(wanted, abs=1e-5)
