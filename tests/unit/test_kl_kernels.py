"""The Triton kernels of kernels/kl.py against whole softmaxes in float64, in the interpreter.

    TRITON_INTERPRET=1 PLUMB_KERNELS=on python -m pytest tests/unit/test_kl_kernels.py

test_kernels.py starts them together with the laws of the other kernels.
"""

import pytest
import torch
from interpreter import HALF, law, relative_error
from test_kl import dense

from kernels import kl
from kernels.kl import DIVERGENCES, linear_kl

ROWS, WIDTH, TEACHER_WIDTH, VOCAB = 7, 24, 40, 101
LOOSE = {torch.float32: 4e-6, torch.bfloat16: HALF}  # exp of numbers near 10 costs a few bits


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return hidden states and head of a student and of a teacher, with logits of spread 2."""
    torch.manual_seed(0)
    shapes = (ROWS, WIDTH), (VOCAB, WIDTH), (ROWS, TEACHER_WIDTH), (VOCAB, TEACHER_WIDTH)
    return [(1.4 * torch.randn(shape) / shape[1] ** 0.25).to(dtype) for shape in shapes]


@law
@pytest.mark.parametrize(
    ("dtype", "mix", "temperature", "caps"),
    [
        (torch.float32, 0.3, 0.7, (0.0, 0.0)),
        (torch.float32, 0.0, 1.0, (0.0, 0.0)),
        (torch.bfloat16, 0.3, 0.7, (0.0, 0.0)),
        (torch.float32, 0.3, 0.7, (2.0, 3.0)),
        (torch.bfloat16, 0.3, 0.7, (2.0, 0.0)),
    ],
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_are_those_of_whole_softmaxes(
    dtype, divergence, mix, temperature, caps, monkeypatch
):
    """Values and both gradients, for chunks and blocks that end within each other, slopes of both
    signs and zero."""
    monkeypatch.setattr(kl, "GPU_CHUNK", 72)
    monkeypatch.setattr(kl, "BLOCK", 64)
    plain, bound = inputs(dtype), LOOSE[dtype]
    student, teacher = [x.requires_grad_() for x in plain[:2]], plain[2:]
    exact = [x.detach().double().requires_grad_() for x in plain]
    slope = torch.linspace(-1, 1, ROWS)
    wanted = dense(*exact, divergence, mix, temperature, caps)
    wanted_h, wanted_w = torch.autograd.grad(wanted, exact[:2], slope.double())
    ours = linear_kl(*student, *teacher, divergence, mix, temperature, None, caps)
    assert ours.dtype == torch.float32
    assert relative_error(ours, wanted) < LOOSE[torch.float32]
    for a, b in zip(torch.autograd.grad(ours, student, slope), (wanted_h, wanted_w), strict=True):
        assert a.dtype == dtype and relative_error(a, b) < bound


@law
def test_two_shards_of_the_vocabulary_give_the_whole(monkeypatch):
    """Values, the shards' gradients of the weight, and gradients of hidden that sum up."""
    monkeypatch.setattr(kl, "GPU_CHUNK", 40)
    monkeypatch.setattr(kl, "BLOCK", 32)
    plain, slope = inputs(torch.float32), torch.linspace(-1, 1, ROWS)
    exact = [x.double().requires_grad_() for x in plain]
    student, teacher = [x.requires_grad_() for x in plain[:2]], plain[2:]
    wanted = dense(*exact, "jsd", 0.3, 0.7)
    wanted_h, wanted_w = torch.autograd.grad(wanted, exact[:2], slope.double())
    parts, heard = (slice(0, 47), slice(47, VOCAB)), []
    for exchange in range(3):  # the answers known so far; the first question without one is kept
        asked, d_hidden = [], 0
        for part in parts:
            answers, questions = iter(heard), []

            def gather(x, answers=answers, questions=questions):
                questions.append(x)
                return next(answers, torch.stack([x, x]))

            args = (student[0], student[1][part], teacher[0], teacher[1][part])
            ours = linear_kl(*args, "jsd", 0.3, 0.7, gather)
            assert len(questions) == 2
            asked.append(questions[min(exchange, 1)])
            if exchange == 2:
                d_h, d_w = torch.autograd.grad(ours, student, slope)
                d_hidden = d_hidden + d_h
                assert relative_error(ours, wanted) < LOOSE[torch.float32]
                assert relative_error(d_w[part], wanted_w[part]) < LOOSE[torch.float32]
        heard.append(torch.stack(asked))
    assert relative_error(d_hidden, wanted_h) < LOOSE[torch.float32]


@law
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_distributions_far_apart_stay_finite(divergence):
    """Logits of ±1000 give finite divergences and gradients."""
    h, w, teacher_h, teacher_w = (x * s for x, s in zip(inputs(torch.float32), (9, 9, 9, -9)))
    leaves = [x.requires_grad_() for x in (h, w)]
    far = linear_kl(*leaves, teacher_h, teacher_w, divergence, 0.1)
    assert far.isfinite().all() and (far >= -1e-6).all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(far.sum(), leaves))


@law
def test_the_operators_keep_their_schemas():
    """torch.compile may call them without looking inside (opcheck)."""
    from torch.library import opcheck

    z, teacher_z, lse, sums = (torch.randn(shape) for shape in ((5, 40), (5, 40), (5, 2), (5, 2)))
    flags = ("jsd", 0.5, 1.0)
    checks = ("test_schema", "test_faketensor")
    opcheck(torch.ops.plumb.kl_sums, (z, teacher_z, lse, sums, *flags), test_utils=checks)
    more = torch.randn(5), *flags, torch.bfloat16
    opcheck(torch.ops.plumb.kl_slopes, (z, teacher_z, lse, sums, *more), test_utils=checks)
