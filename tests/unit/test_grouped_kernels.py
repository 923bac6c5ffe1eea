"""Law 8 for the experts' grouped matmuls, in Triton's interpreter; their tiles."""

import numpy as np
import pytest
import torch
from interpreter import TOLERANCE, gradients, law, relative_error

from kernels import grouped
from kernels.grouped import grouped_mlp, plan

# rows of each expert: none at all, one, fewer and more than a tile, all in one expert
COUNTS = [(0, 1, 40, 33), (70, 0, 0, 5), (0, 0, 0), (1,), (3, 3, 3, 3, 3, 0, 19)]


def by_hand(x, counts, gates, ups, downs):
    """Return every expert's MLP, row by row."""
    experts = np.repeat(np.arange(len(counts)), counts)
    rows = []
    for row, e in zip(x, experts, strict=True):
        gate, up = gates[e] @ row, ups[e] @ row
        rows.append(downs[e] @ (gate / (1 + torch.exp(-gate)) * up))
    return torch.stack(rows) if rows else x.clone()


def weights_of(experts: int, width: int, hidden: int, dtype) -> list[list[torch.Tensor]]:
    """Return gates, ups and downs, that lie in memory in no order."""
    shapes = [(hidden, width)] * 2 + [(width, hidden)]
    made: list = [[None] * experts for _ in shapes]
    places = [(k, e) for k in range(3) for e in range(experts)]
    for i in np.random.default_rng(0).permutation(len(places)):
        k, e = places[i]
        made[k][e] = (torch.randn(shapes[k]) / shapes[k][1] ** 0.5).to(dtype)
    return made


@pytest.mark.parametrize("counts", COUNTS)
def test_the_twin_is_the_formula(counts: tuple):
    """In float64, forward and every gradient; experts without rows get zeros."""
    compare(counts, 24, 40, torch.float64, 1e-12)


@law
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "hidden"), [(64, 96), (40, 72)])
@pytest.mark.parametrize("counts", COUNTS)
def test_kernels_are_the_formula(counts: tuple, width: int, hidden: int, dtype, monkeypatch):
    """In every tile, also those beyond the last row or column; and twice the same bits."""
    small = ((16, 16, 16, 4, 1), (32, 32, 16, 4, 1), (16, 32, 16, 4, 1))
    monkeypatch.setattr(grouped, "tile_sizes", lambda arch, dtype, rows: small)
    one = compare(counts, width, hidden, dtype, TOLERANCE[dtype])
    two = compare(counts, width, hidden, dtype, TOLERANCE[dtype])
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def compare(counts: tuple, width: int, hidden: int, dtype, tolerance: float) -> list[torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(sum(counts), width).to(dtype).requires_grad_()
    weights = weights_of(len(counts), width, hidden, dtype)
    leaves = [x, *(w.requires_grad_() for kind in weights for w in kind)]
    y = grouped_mlp(x, counts, *weights)
    slopes = torch.randn(y.shape).to(dtype)
    ours = [y, *gradients(y, leaves, slopes)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    kinds = exact[1:]
    n = len(counts)
    wanted = by_hand(exact[0], counts, kinds[:n], kinds[n : 2 * n], kinds[2 * n :])
    grads = torch.autograd.grad(wanted, exact, slopes.double(), allow_unused=True)
    grads = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, exact)]
    for a, b in zip(ours, [wanted, *grads], strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert not a.numel() or relative_error(a, b) < tolerance
    return ours


@law
def test_gradients_that_nobody_needs_are_not_computed(monkeypatch):
    """Frozen experts (an adapter on the attention alone) give the rows' gradient only."""
    counts, weights = (5, 4), weights_of(2, 32, 48, torch.float32)
    x = torch.randn(9, 32, requires_grad=True)
    computed, of_weights = [], grouped._weight_gradients

    def counted(*args):
        computed.append(args)
        return of_weights(*args)

    monkeypatch.setattr(grouped, "_weight_gradients", counted)
    grouped_mlp(x, counts, *weights).sum().backward()
    assert not computed
    own = x.grad.clone()
    x.grad = None
    leaves = [w.requires_grad_() for kind in weights for w in kind]
    grouped_mlp(x, counts, *weights).sum().backward()
    assert torch.equal(own, x.grad) and all(w.grad is not None for w in leaves)
    assert len(computed) == 3  # gates, ups, downs


def test_tiles_hold_every_row_once():
    for counts in COUNTS:
        tiles = plan(counts, 16)
        ends = np.cumsum(counts)
        rows = [
            (row, expert)
            for expert, first, end in tiles
            for row in range(first, min(first + 16, end))
        ]
        wanted = [(row, int(np.searchsorted(ends, row, "right"))) for row in range(sum(counts))]
        assert rows == wanted
