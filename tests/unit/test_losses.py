"""Law 9: every loss of the DPO family equals its paper's formula, written out in plain numbers.

Each reference below has the name of its twin in losses.py but takes the numbers of one pair (the
two aot ones the whole step, as lists), under the letters of the formula: c and r are the log-ratios
policy / reference of the chosen and the rejected response.
"""

import inspect
import math
import random

import pytest
import torch

import losses

LN2 = math.log(2.0)


def sigma(x: float) -> float:
    """Logistic function; the branch keeps exp from overflowing."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def log_sigma(x: float) -> float:
    """log σ(x) = -log(1 + e^-x) = x - log(1 + e^x)."""
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def kl_bernoulli(a: float, b: float) -> float:
    """KL(Bern σ(a) || Bern σ(b)) = σ(a) log(σ(a)/σ(b)) + (1-σ(a)) log((1-σ(a))/(1-σ(b))).

    1 - σ(x) = σ(-x).
    """
    return sigma(a) * (log_sigma(a) - log_sigma(b)) + sigma(-a) * (log_sigma(-a) - log_sigma(-b))


def sigmoid(c, r, beta, label_smoothing=0.0):
    """DPO, arXiv 2305.18290 Eq. 7; cDPO: Mitchell 2023, "A note on DPO with noisy preferences"."""
    x = beta * (c - r)
    return -(1 - label_smoothing) * log_sigma(x) - label_smoothing * log_sigma(-x)


def robust(c, r, beta, label_smoothing):
    """Robust DPO, arXiv 2403.00409: its mean over labels flipped at rate ε is the clean loss."""
    clean, flipped = -log_sigma(beta * (c - r)), -log_sigma(beta * (r - c))
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge(c, r, beta):
    """SLiC-HF, arXiv 2305.10425 Eq. 1, on the margin of log-ratios as in RSO, arXiv 2309.06657."""
    return max(0.0, 1.0 - beta * (c - r))


def ipo(c, r, beta):
    """IPO, arXiv 2310.12036 Eq. 17 (τ = β), on the numbers it is given."""
    return (c - r - 1 / (2 * beta)) ** 2


def simpo(logps_c, logps_r, len_c, len_r, beta, gamma):
    """SimPO, arXiv 2405.14734 Eq. 6: no reference, mean log-probs, margin γ."""
    return -log_sigma(beta / len_c * logps_c - beta / len_r * logps_r - gamma)


def sigmoid_norm(c, r, len_c, len_r, beta):
    """Length-normalised DPO, Tülu 3, arXiv 2411.15124 Eq. 6."""
    return -log_sigma(beta / len_c * c - beta / len_r * r)


def exo_pair(c, r, beta, label_smoothing):
    """EXO-pref, arXiv 2402.00856 Eq. 16: KL(p || (1-ε, ε)), p = softmax of β (c, r)."""
    p_c, p_r = sigma(beta * (c - r)), sigma(beta * (r - c))
    log_p_c, log_p_r = log_sigma(beta * (c - r)), log_sigma(beta * (r - c))
    log_q_c, log_q_r = math.log(1 - label_smoothing), math.log(label_smoothing)
    return p_c * (log_p_c - log_q_c) + p_r * (log_p_r - log_q_r)


def nca_pair(c, r, beta):
    """NCA for K = 2 responses, arXiv 2402.05369: -log σ(r_w) - ½ Σ over both of log σ(-r_i)."""
    return -log_sigma(beta * c) - 0.5 * (log_sigma(-beta * c) + log_sigma(-beta * r))


def bco_pair(c, r, beta, delta):
    """BCO, arXiv 2404.04656: cross-entropy of "chosen" against "rejected", rewards shifted by δ."""
    return -log_sigma(beta * c - delta) - log_sigma(-(beta * r - delta))


def sppo_hard(c, r, beta):
    """SPPO, arXiv 2405.00675 Eq. 4.7: (log-ratio - η (P - ½))², P = 1 and 0, η = 1/β."""
    return (c - (1 - 0.5) / beta) ** 2 + (r - (0 - 0.5) / beta) ** 2


def apo_zero(c, r, beta):
    """APO-zero, arXiv 2408.06266 Eq. 7, plus the constant 1 that makes it start at 1."""
    return 1 - sigma(beta * c) + sigma(beta * r)


def apo_down(c, r, beta):
    """APO-down, arXiv 2408.06266 Eq. 8, plus the constant 1."""
    return sigma(beta * c) + 1 - sigma(beta * (c - r))


def discopop(c, r, beta, tau=0.05):
    """DiscoPOP, arXiv 2406.08414 Eq. 5: (1 - m) (-log σ(x)) + m e^-x, m = σ(x/τ)."""
    x = beta * (c - r)
    weighted_exp = math.exp(log_sigma(x / tau) - x)  # in one exp: m e^-x may be 0 times infinity
    return -sigma(-x / tau) * log_sigma(x) + weighted_exp


def rpo_sq(c, r, beta, gt_c, gt_r, scale):
    """RPO with squared distance, Nemotron-4 340B, arXiv 2406.11704; arXiv 2502.00203."""
    return (beta * (c - r) - scale * (gt_c - gt_r)) ** 2


def rpo_bwd_kl(c, r, beta, gt_c, gt_r, scale):
    """RPO with the backward KL, same papers: KL(Bern σ(data's gap) || Bern σ(implicit gap))."""
    return kl_bernoulli(scale * (gt_c - gt_r), beta * (c - r))


def rpo_fwd_kl(c, r, beta, gt_c, gt_r, scale):
    """RPO with the forward KL, same papers: KL(Bern σ(implicit gap) || Bern σ(data's gap))."""
    return kl_bernoulli(beta * (c - r), scale * (gt_c - gt_r))


def aot(margin, ref_margin, beta, label_smoothing=0.0):
    """AOT paired, arXiv 2406.05882: DPO's loss between sorted margins of policy and reference."""
    pairs = zip(sorted(margin), sorted(ref_margin), strict=True)
    return [sigmoid(m, ref, beta, label_smoothing) for m, ref in pairs]


def aot_unpaired(c, r, beta, label_smoothing=0.0):
    """AOT unpaired, arXiv 2406.05882: DPO's loss between sorted chosen and rejected log-ratios."""
    return aot(c, r, beta, label_smoothing)


# Hand-picked: the start, ordinary gaps, and what a collapsing policy reaches, where a naive exp
# overflows and a naive log meets 0. No two values of a column are equal, for sorting has no
# derivative there; no x is hinge's corner.
HAND_PICKED = [
    (0.0, 0.01),
    (0.3, -0.2),
    (-1.5, 2.5),
    (200.0, 0.5),
    (-0.5, 200.0),
    (-200.0, -1.0),
    (1.0, -200.0),
    (2000.0, -2000.0),
    (-2000.0, 2000.0),
    (90.0, 88.5),
]
_random = random.Random(0)
PAIRS = HAND_PICKED + [(_random.gauss(0, 8), _random.gauss(0, 8)) for _ in range(12)]
_c, _r = [c for c, _ in PAIRS], [r for _, r in PAIRS]
COLUMNS = {
    "c": _c,
    "r": _r,
    "logps_c": _c,
    "logps_r": _r,
    "margin": _c,
    "ref_margin": _r,
    "len_c": [_random.randint(1, 400) for _ in PAIRS],
    "len_r": [_random.randint(1, 400) for _ in PAIRS],
    "gt_c": [_random.uniform(-4, 4) for _ in PAIRS],
    "gt_r": [_random.uniform(-4, 4) for _ in PAIRS],
}
NAMES = {  # letters of the formulas -> arguments in losses.py
    "c": "chosen_logratios",
    "r": "rejected_logratios",
    "logps_c": "chosen_logps",
    "logps_r": "rejected_logps",
    "margin": "pi_logratios",
    "ref_margin": "ref_logratios",
    "len_c": "chosen_lengths",
    "len_r": "rejected_lengths",
    "gt_c": "chosen_rewards",
    "gt_r": "rejected_rewards",
}
LEARNED = ("c", "r", "logps_c", "logps_r", "margin", "ref_margin")  # gradients flow through these

CASES = [
    (sigmoid, {}),
    (sigmoid, {"label_smoothing": 0.1}),
    (sigmoid, {"label_smoothing": 0.5}),
    (robust, {"label_smoothing": 0.0}),
    (robust, {"label_smoothing": 0.1}),
    (robust, {"label_smoothing": 0.45}),
    (hinge, {}),
    (ipo, {}),
    (simpo, {"gamma": 0.5}),
    (simpo, {"gamma": 0.0}),
    (sigmoid_norm, {}),
    (exo_pair, {"label_smoothing": 1e-3}),
    (exo_pair, {"label_smoothing": 0.3}),
    (nca_pair, {}),
    (bco_pair, {"delta": 0.0}),
    (bco_pair, {"delta": -0.7}),
    (sppo_hard, {}),
    (apo_zero, {}),
    (apo_down, {}),
    (discopop, {}),
    (discopop, {"tau": 0.5}),
    (rpo_sq, {"scale": 0.5}),
    (rpo_bwd_kl, {"scale": 0.5}),
    (rpo_fwd_kl, {"scale": 0.5}),
    (rpo_fwd_kl, {"scale": 30.0}),
    (rpo_bwd_kl, {"scale": 30.0}),
    (aot, {}),
    (aot, {"label_smoothing": 0.1}),
    (aot_unpaired, {}),
    (aot_unpaired, {"label_smoothing": 0.1}),
]
CASES = [(law, {"beta": beta, **settings}) for law, settings in CASES for beta in (0.1, 1.0)]
every_loss = pytest.mark.parametrize(
    "law, settings",
    CASES,
    ids=[f"{law.__name__}-{'-'.join(map(str, s.values()))}" for law, s in CASES],
)


def columns_of(law) -> list[str]:
    """Return the arguments of a formula that are one number a pair."""
    return [name for name in inspect.signature(law).parameters if name in COLUMNS]


def expected(law, columns: dict[str, list[float]], settings: dict[str, float]) -> list[float]:
    """Evaluate the formula on every pair of the step."""
    if law in (aot, aot_unpaired):
        return law(**columns, **settings)
    rows = zip(*columns.values(), strict=True)
    return [law(**dict(zip(columns, row, strict=True)), **settings) for row in rows]


def actual(law, columns: dict[str, list[float]], settings: dict[str, float], dtype=torch.float64):
    """Evaluate losses.py on the same columns, lengths as integers; return losses and leaves."""
    leaves = {}
    for name, values in columns.items():
        is_length = name.startswith("len_")
        leaves[name] = torch.tensor(values) if is_length else torch.tensor(values, dtype=dtype)
        leaves[name].requires_grad_(name in LEARNED)
    arguments = {NAMES[name]: leaf for name, leaf in leaves.items()}
    return getattr(losses, law.__name__)(**arguments, **settings), leaves


def close(a: float, b: float, tolerance: float) -> bool:
    """Compare relatively above 1, absolutely below; NaN is close to nothing."""
    return abs(a - b) <= tolerance * max(1.0, abs(b))


@every_loss
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
def test_value_is_the_papers(law, settings, dtype, tolerance):
    """Each pair's loss is its paper's formula: within 1e-12 in float64, finite and within 1e-5 in
    float32."""
    columns = {name: COLUMNS[name] for name in columns_of(law)}
    got, _ = actual(law, columns, settings, dtype)
    want = expected(law, columns, settings)
    assert got.shape == (len(PAIRS),) and got.dtype == dtype
    got = got.tolist()
    if law in (aot, aot_unpaired):  # which pair carries which loss is not part of the law
        got, want = sorted(got), sorted(want)
    rows = enumerate(zip(got, want, strict=True))
    wrong = [(i, g, w) for i, (g, w) in rows if not close(g, w, tolerance)]
    assert not wrong, f"(pair, loss, formula): {wrong}"


@every_loss
def test_gradient_is_the_papers(law, settings):
    """Autograd's derivative is the central difference of the formula, at the far ends too."""
    columns = {name: COLUMNS[name] for name in columns_of(law)}
    got, leaves = actual(law, columns, settings)
    got.sum().backward()
    h = 1e-5
    for name in [name for name in columns if name in LEARNED]:
        for i, value in enumerate(columns[name]):
            up, down = list(columns[name]), list(columns[name])
            up[i], down[i] = value + h, value - h
            above = expected(law, {**columns, name: up}, settings)
            below = expected(law, {**columns, name: down}, settings)
            slope = sum(a - b for a, b in zip(above, below, strict=True)) / (2 * h)
            grad = leaves[name].grad[i].item()
            message = f"d loss / d {name}[{i}] at {PAIRS[i]}: {grad}, formula {slope}"
            assert close(grad, slope, 1e-6), message


@every_loss
def test_gradient_is_finite_in_float32(law, settings):
    """Log-ratios of thousands give finite float32 gradients: no backward hides infinity times 0."""
    columns = {name: COLUMNS[name] for name in columns_of(law)}
    got, leaves = actual(law, columns, settings, torch.float32)
    got.sum().backward()
    for name in [name for name in leaves if name in LEARNED]:
        assert leaves[name].grad.isfinite().all(), f"{name}.grad = {leaves[name].grad.tolist()}"


ODDS_4 = math.log(4.0)  # a reward gap that asks for a preference of (0.8, 0.2)
START = [
    (sigmoid, {}, LN2),
    (sigmoid, {"label_smoothing": 0.1}, LN2),
    (sigmoid, {"label_smoothing": 0.4}, LN2),
    (robust, {"label_smoothing": 0.2}, LN2),
    (sigmoid_norm, {}, LN2),
    (aot, {}, LN2),
    (aot, {"label_smoothing": 0.1}, LN2),
    (aot_unpaired, {}, LN2),
    (aot_unpaired, {"label_smoothing": 0.1}, LN2),
    (simpo, {"gamma": 0.0}, LN2),
    (simpo, {"gamma": 1.0}, math.log(1 + math.e)),
    (nca_pair, {}, 2 * LN2),
    (bco_pair, {"delta": 0.0}, 2 * LN2),
    (bco_pair, {"delta": 1.0}, 2 * math.log(1 + math.e) - 1),
    (hinge, {}, 1.0),
    (apo_zero, {}, 1.0),
    (apo_down, {}, 1.0),
    (discopop, {}, 0.5 * LN2 + 0.5),
    (ipo, {}, 25.0),  # 1/(4β²) at β = 0.1
    (sppo_hard, {}, 50.0),  # 1/(2β²)
    (exo_pair, {"label_smoothing": 0.2}, -LN2 - 0.5 * math.log(0.8 * 0.2)),  # KL from a fair coin
    (rpo_sq, {"scale": 0.5, "gt_c": 3.0, "gt_r": 1.0}, 1.0),
    (rpo_sq, {"scale": 0.5, "gt_c": 2.0, "gt_r": 2.0}, 0.0),
    (rpo_fwd_kl, {"scale": 1.0, "gt_c": ODDS_4, "gt_r": 0.0}, 0.5 * math.log(0.25 / (0.8 * 0.2))),
    (rpo_fwd_kl, {"scale": 0.5, "gt_c": 2.0, "gt_r": 2.0}, 0.0),
    (
        rpo_bwd_kl,
        {"scale": 1.0, "gt_c": ODDS_4, "gt_r": 0.0},
        0.8 * math.log(1.6) + 0.2 * math.log(0.4),
    ),
    (rpo_bwd_kl, {"scale": 0.5, "gt_c": 2.0, "gt_r": 2.0}, 0.0),
]


@pytest.mark.parametrize(
    "law, settings, value", START, ids=[f"{law.__name__}-{v:.3f}" for law, _, v in START]
)
def test_step_0(law, settings, value):
    """While the policy is the reference (c = r = 0) the loss is the number its formula gives, for
    most losses ln 2."""
    columns = {}
    for name in columns_of(law):
        columns[name] = [7] * 3 if name.startswith("len_") else [settings.get(name, 0.0)] * 3
    scalars = {name: number for name, number in settings.items() if name not in columns}
    got, _ = actual(law, columns, {"beta": 0.1, **scalars})
    assert all(close(loss, value, 1e-12) for loss in got.tolist()), got.tolist()


def unshifted_bco(c, r, beta):
    return sigmoid(c, 0.0, beta) + sigmoid(0.0, r, beta)


def half_dpo_half_exponential(c, r, beta):
    return (sigmoid(c, r, beta) + math.exp(-beta * (c - r))) / 2


@pytest.mark.parametrize(
    "special, settings, general",
    [
        (robust, {"label_smoothing": 0.0}, sigmoid),
        (sigmoid, {"label_smoothing": 0.0}, sigmoid),
        (bco_pair, {"delta": 0.0}, unshifted_bco),
        (discopop, {"tau": 1e9}, half_dpo_half_exponential),
    ],
    ids=["robust-no-flips", "sigmoid-no-smoothing", "bco-no-shift", "discopop-half-half"],
)
def test_limits(special, settings, general):
    """At the neutral value of its own parameter a variant becomes the loss it varies."""
    columns = {"c": [0.4, -30.0, 2.0, 250.0], "r": [0.1, 5.0, -2.0, 3.0]}
    got, _ = actual(special, columns, {"beta": 0.1, **settings})
    got = got.tolist()
    want = [general(c, r, 0.1) for c, r in zip(columns["c"], columns["r"], strict=True)]
    assert all(close(g, w, 1e-8) for g, w in zip(got, want, strict=True)), (got, want)


@pytest.mark.parametrize("law", [aot, aot_unpaired])
def test_aot_compares_distributions(law):
    """aot sees the step as two sets: shuffling one column leaves the sum, one pair alone is DPO."""
    (first, second), shuffled = columns_of(law), random.Random(1)
    columns = {first: COLUMNS[first][:], second: COLUMNS[second][:]}
    total = actual(law, columns, {"beta": 0.1})[0].sum().item()
    for name in (first, second):
        shuffled.shuffle(columns[name])
        assert close(actual(law, columns, {"beta": 0.1})[0].sum().item(), total, 1e-12)
    alone, _ = actual(law, {first: [3.0], second: [-1.0]}, {"beta": 0.1})
    assert close(alone.item(), sigmoid(3.0, -1.0, 0.1), 1e-12)


@pytest.mark.parametrize(
    "law, smoothing",
    [(exo_pair, 0.0), (robust, 0.5), (robust, 0.7)],
    ids=["exo_pair-0", "robust-0.5", "robust-0.7"],
)
def test_impossible_smoothing_is_refused(law, smoothing):
    """EXO's KL is infinite without smoothing, robust's divisor 1 - 2ε is at most 0 from ½ on: the
    error names the setting."""
    with pytest.raises(ValueError, match="label_smoothing|label-smoothing"):
        actual(law, {"c": [0.0], "r": [0.0]}, {"beta": 0.1, "label_smoothing": smoothing})
