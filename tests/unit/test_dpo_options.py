"""f-divergences and WPO's weights of the DPO family, against their formulas in plain numbers."""

import math

import pytest
import torch

import losses
from losses import Pairs

COLUMNS = [  # log-probs of policy and reference, lengths
    (-3.0, -4.0, -3.5, -3.0, 3, 5),
    (-0.5, -9.0, -2.5, -8.0, 1, 4),
    (-12.0, -2.0, -11.0, -5.0, 8, 2),
    (-1.0, -1.0, -1.0, -1.0, 2, 2),
]


def pairs() -> Pairs:
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*COLUMNS)]
    nothing = torch.full((len(COLUMNS),), math.nan, dtype=torch.float64)
    columns[:2] = [column.requires_grad_() for column in columns[:2]]
    return Pairs(*columns, nothing, nothing)


def slope(u: float, divergence: str) -> float:
    """f'(u), arXiv 2309.16240: f = u log u, -log u, and u log u - (u + 1) log((u + 1) / 2)."""
    f_slopes = {
        "reverse_kl": lambda u: math.log(u) + 1,
        "forward_kl": lambda u: -1 / u,
        "js": lambda u: math.log(2 * u / (1 + u)),
    }
    return f_slopes[divergence](u)


@pytest.mark.parametrize("divergence", losses.F_DIVERGENCES)
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_f_divergence_dpo_is_the_papers(divergence: str, beta: float):
    """-log σ(β f'(π/π_ref of chosen) - β f'(π/π_ref of rejected)), and its metrics."""
    got, metrics = losses.dpo(pairs(), beta=beta, f_divergence=divergence)
    for i, (c, r, ref_c, ref_r, _, _) in enumerate(COLUMNS):
        x = beta * (slope(math.exp(c - ref_c), divergence) - slope(math.exp(r - ref_r), divergence))
        assert got[i].item() == pytest.approx(math.log(1 + math.exp(-x)), abs=1e-12)
        assert metrics["rewards/margins"][i].item() == pytest.approx(x, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", [-900.0, 900.0])
def test_far_log_ratios_stay_finite(dtype: torch.dtype, x: float):
    for divergence in losses.F_DIVERGENCES:
        logratio = torch.tensor([x], dtype=dtype, requires_grad=True)
        value = losses.f_reward(logratio, divergence)
        value.sum().backward()
        assert value.isfinite().all() and logratio.grad.isfinite().all()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "simpo", "apo_zero"])
def test_wpo_weighs_pairs_by_their_mean_probability(loss: str):
    """min(1, exp(mean log π of chosen + that of rejected)) times the loss; no gradient from it."""
    plain_pairs, weighted_pairs = pairs(), pairs()
    plain, _ = losses.dpo(plain_pairs, loss)
    got, _ = losses.dpo(weighted_pairs, loss, wpo=True)
    plain.sum().backward()
    got.sum().backward()
    for i, (c, r, _, _, len_c, len_r) in enumerate(COLUMNS):
        weight = min(1.0, math.exp(c / len_c + r / len_r))
        assert got[i].item() == pytest.approx(weight * plain[i].item(), abs=1e-12)
        for name in ("chosen", "rejected"):
            wanted = weight * getattr(plain_pairs, name).grad[i].item()
            assert getattr(weighted_pairs, name).grad[i].item() == pytest.approx(wanted, abs=1e-12)


def test_what_has_no_meaning_is_refused():
    with pytest.raises(ValueError, match="needs a loss of a difference of rewards"):
        losses.dpo(pairs(), "bco_pair", f_divergence="js")
    with pytest.raises(ValueError, match="--loss aot sorts them"):
        losses.dpo(pairs(), "aot", wpo=True)
    with pytest.raises(ValueError, match="unknown divergence"):
        losses.dpo(pairs(), f_divergence="chi")


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_tokens_beyond_the_shorter_answer_count_alpha(alpha: float):
    """LD-DPO, arXiv 2409.06411: the first min(length) tokens of both answers count 1."""
    lengths = [3, 5, 4, 4, 1, 0, 2, 6]  # chosen, rejected of four pairs; one has no scored token
    response = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])
    wanted = []
    for i, n in enumerate(lengths):
        shorter = min(n, lengths[i ^ 1])
        wanted += [1.0] * shorter + [alpha] * (n - shorter)
    got = losses.length_weights(response, torch.tensor(lengths).float(), alpha)
    assert got.dtype == torch.float64 and got.tolist() == wanted


def test_a_mixture_is_read():
    assert losses.read_mixture("ipo", []) == {"ipo": 1.0}
    assert losses.read_mixture("ipo", ["hinge:0.5"]) == {"ipo": 1.0, "hinge": 0.5}
    mpo = losses.read_mixture("sigmoid", ["sigmoid:0.8", "bco_pair:0.2"])
    assert mpo == {"sigmoid": 0.8, "bco_pair": 0.2} and next(iter(mpo)) == "sigmoid"
    for bad in ("hinge", "hinge:", "hinge:x", "hinge:-1", "hinge:0", "hinge:nan", "hinge:inf"):
        with pytest.raises(ValueError, match="is not NAME:WEIGHT"):
            losses.read_mixture("sigmoid", [bad])
