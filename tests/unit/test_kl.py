"""Divergences of two linear layers: their formulas written out again, and their gradients."""

import math

import pytest
import torch
from torch import Tensor

from kernels import kl
from kernels.kl import DIVERGENCES, linear_kl

ROWS, WIDTH, TEACHER_WIDTH, VOCAB = 9, 6, 11, 37


def inputs(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return hidden states and head of a student, then of a teacher."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(ROWS, WIDTH), (VOCAB, WIDTH), (ROWS, TEACHER_WIDTH), (VOCAB, TEACHER_WIDTH)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def plain(p: list[float], q: list[float], divergence: str, mix: float) -> float:
    """Return a divergence by its definition, column by column, from probabilities."""

    def kl_of(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b))

    def between(share: float) -> list[float]:
        return [share * x + (1 - share) * y for x, y in zip(p, q)]

    if divergence == "forward":
        return kl_of(p, q)
    if divergence == "reverse":
        return kl_of(q, p)
    if divergence == "jsd":
        return mix * kl_of(p, between(mix)) + (1 - mix) * kl_of(q, between(mix))
    if divergence == "skew_forward":
        return kl_of(p, between(mix))
    return kl_of(q, between(1 - mix))


def capped(z: Tensor, cap: float) -> Tensor:
    """Return logits with a soft cap; 0: as they are."""
    return cap * torch.tanh(z / cap) if cap else z


def dense(
    h, w, teacher_h, teacher_w, divergence: str, mix: float, temperature: float, caps=(0.0, 0.0)
) -> Tensor:
    """Return the same from whole softmaxes, for autograd."""
    q = (capped(h @ w.T, caps[0]) / temperature).softmax(-1)
    p = (capped(teacher_h @ teacher_w.T, caps[1]) / temperature).softmax(-1)

    def kl_of(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    m = mix * p + (1 - mix) * q
    return {
        "forward": lambda: kl_of(p, q),
        "reverse": lambda: kl_of(q, p),
        "jsd": lambda: mix * kl_of(p, m) + (1 - mix) * kl_of(q, m),
        "skew_forward": lambda: kl_of(p, m),
        "skew_reverse": lambda: kl_of(q, (1 - mix) * p + mix * q),
    }[divergence]()


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("mix", "temperature", "caps"),
    [(0.5, 1.0, (0, 0)), (0.1, 0.7, (0, 0)), (0.9, 2.0, (0, 0)), (0.3, 0.7, (2.0, 3.0))],
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_and_gradients_are_the_formulas(
    divergence, mix, temperature, caps, kept, monkeypatch
):
    """1e-12 in float64, with chunks of odd width: values in plain Python, gradients by autograd."""
    monkeypatch.setattr(kl, "CHUNK", 8)
    monkeypatch.setattr(kl, "KEEP_BYTES", 16 * ROWS * VOCAB - (not kept))  # exactly enough, or not
    student = [x.requires_grad_() for x in inputs()[:2]]
    teacher = inputs()[2:]
    ours = linear_kl(*student, *teacher, divergence, mix, temperature, None, caps)
    q = (capped(student[0] @ student[1].T, caps[0]) / temperature).softmax(-1).tolist()
    p = (capped(teacher[0] @ teacher[1].T, caps[1]) / temperature).softmax(-1).tolist()
    for value, *row in zip(ours.tolist(), p, q):
        assert value == pytest.approx(plain(*row, divergence, mix), abs=1e-12)
    slope = torch.randn(ROWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(
        dense(*student, *teacher, divergence, mix, temperature, caps), student, slope
    )
    for _ in range(2):  # a second backward finds what the first did
        grads = torch.autograd.grad(ours, student, slope, retain_graph=True)
        for a, b in zip(grads, wanted, strict=True):
            assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_shards_of_the_vocabulary_give_the_whole(divergence):
    """Two ranks with a part of the vocabulary each: the same values, and gradients that sum up."""
    h, w, teacher_h, teacher_w = inputs()
    student = [h.requires_grad_(), w.requires_grad_()]
    slope = torch.linspace(-1, 1, ROWS, dtype=torch.float64)
    whole = linear_kl(*student, teacher_h, teacher_w, divergence, 0.3)
    wanted_h, wanted_w = torch.autograd.grad(whole, student, slope)
    parts = [slice(0, 20), slice(20, VOCAB)]
    sent: list[list[Tensor]] = [[], []]  # what each rank contributes to its two exchanges

    def collect(rank: int, known: list[list[Tensor]]):
        calls = iter(range(2))

        def gather(x: Tensor) -> Tensor:
            i = next(calls)
            sent[rank][i:] = [x]
            return torch.stack([ranks[i] for ranks in known]) if known else torch.stack([x, x])

        return gather

    for rank, part in enumerate(parts):  # first exchange only
        linear_kl(h, w[part], teacher_h, teacher_w[part], divergence, 0.3, 1.0, collect(rank, []))
    first = [[x[0]] for x in sent]
    for rank, part in enumerate(parts):
        known = [[one[0], torch.zeros(ROWS, 2, dtype=torch.float64)] for one in first]
        args = (h, w[part], teacher_h, teacher_w[part], divergence, 0.3, 1.0)
        linear_kl(*args, collect(rank, known))
    known = [[x[0], x[1]] for x in sent]
    total_h = torch.zeros_like(h)
    for rank, part in enumerate(parts):
        args = (h, w[part], teacher_h, teacher_w[part], divergence, 0.3, 1.0)
        ours = linear_kl(*args, collect(rank, known))
        assert (ours - whole).abs().max() < 1e-12
        d_h, d_w = torch.autograd.grad(ours, student, slope)
        total_h += d_h
        assert (d_w[part] - wanted_w[part]).abs().max() < 1e-12
    assert (total_h - wanted_h).abs().max() < 1e-12


def test_the_family_has_its_known_members():
    """Skew 0 is the plain KL; jsd at 1/2 is symmetric and at most ln 2; equal models are at 0."""
    h, w, teacher_h, teacher_w = inputs()

    def value(*args, **flags) -> Tensor:
        return linear_kl(h, w, teacher_h, teacher_w, *args, **flags)

    assert (value("skew_forward", 0.0) - value("forward")).abs().max() < 1e-12
    assert (value("skew_reverse", 0.0) - value("reverse")).abs().max() < 1e-12
    swapped = linear_kl(teacher_h, teacher_w, h, w, "jsd", 0.5)
    assert (value("jsd", 0.5) - swapped).abs().max() < 1e-12
    assert value("jsd", 0.5).max() < math.log(2)
    for divergence in DIVERGENCES:
        leaf = h.clone().requires_grad_()
        same = linear_kl(leaf, w, h, w, divergence, 0.4)
        assert same.abs().max() < 1e-14
        assert torch.autograd.grad(same.sum(), leaf)[0].abs().max() < 1e-14


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_half_precision_is_near_the_exact_one(divergence):
    """bf16 inputs, fp32 sums; far-apart distributions stay finite."""
    exact = [x.to(torch.bfloat16).double() for x in inputs(3)]
    student = [x.to(torch.bfloat16).requires_grad_() for x in exact[:2]]
    ours = linear_kl(*student, *(x.to(torch.bfloat16) for x in exact[2:]), divergence, 0.3)
    wanted = linear_kl(*exact, divergence, 0.3)
    assert ours.dtype == torch.float32
    assert (ours - wanted).abs().max() < 1e-4 * wanted.max()
    far = linear_kl(
        student[0] * 40, student[1], -exact[2].float() * 40, exact[3].float(), divergence
    )
    far.sum().backward()
    assert far.isfinite().all() and student[1].grad.isfinite().all()
