"""Every loss of the project, as pure functions: log-probs in, per-example losses and metrics out.

No model, no process group and no reduction: a script sums what it gets and divides by the count of the WHOLE optimizer
step, so that packing, micro-batches and ranks cannot change a loss.

Letters: B pairs; c, r = log(policy / reference) of the chosen and the rejected response, summed over its tokens, (B,);
delta = c - r; len_c, len_r = scored tokens of each, (B,). Every function of the DPO family returns (B,).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DPO_LOSSES = (
    "sigmoid", "robust", "hinge", "ipo", "simpo", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
    "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "rpo_sq", "rpo_fwd_kl", "rpo_bwd_kl",
)  # fmt: skip
WHOLE_STEP_LOSSES = ("aot", "aot_unpaired")  # they sort over the step: no micro-batch can compute them alone
REWARD_LOSSES = ("rpo_sq", "rpo_fwd_kl", "rpo_bwd_kl")  # they need chosen_reward and rejected_reward in the data


def sigmoid(c: Tensor, r: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, arXiv 2305.18290 Eq. 7: -log σ(β Δ). With label_smoothing ε, cDPO: the label is wrong with probability ε."""
    x = beta * (c - r)
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def robust(c: Tensor, r: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO, arXiv 2403.00409 Eq. 12: unbiased under labels flipped with probability ε < 1/2; may be negative."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"robust needs 0 <= label_smoothing < 0.5, not {label_smoothing}: it is the share of flips")
    x = beta * (c - r)
    kept, flipped = -F.logsigmoid(x), -F.logsigmoid(-x)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge(c: Tensor, r: Tensor, beta: float) -> Tensor:
    """SLiC, arXiv 2305.10425, in the form of RSO, arXiv 2309.06657 Eq. 8: max(0, 1 - β Δ)."""
    return F.relu(1 - beta * (c - r))


def ipo(c: Tensor, r: Tensor, beta: float) -> Tensor:
    """IPO, arXiv 2310.12036 Eq. 17: (Δ - 1/(2β))². TRL divides c and r by their lengths first: --average-logps."""
    return (c - r - 1 / (2 * beta)) ** 2


def simpo(logps_c: Tensor, logps_r: Tensor, len_c: Tensor, len_r: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO, arXiv 2405.14734 Eq. 6: -log σ(β (log π_c / |c| - log π_r / |r|) - γ). No reference model."""
    return -F.logsigmoid(beta * (logps_c / len_c - logps_r / len_r) - gamma)


def sigmoid_norm(c: Tensor, r: Tensor, len_c: Tensor, len_r: Tensor, beta: float) -> Tensor:
    """Length-normalised DPO, arXiv 2411.15124 Eq. 6 (Tülu 3): -log σ(β (c / |c| - r / |r|))."""
    return -F.logsigmoid(beta * (c / len_c - r / len_r))


def exo_pair(c: Tensor, r: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """EXO, arXiv 2402.00856 Eq. 16: KL(p ‖ (1 - ε, ε)) with p = (σ(βΔ), σ(-βΔ)), the policy's own preference."""
    if not 0 < label_smoothing < 1:
        raise ValueError(f"exo_pair needs 0 < label_smoothing < 1, not {label_smoothing}: try 0.001")
    x = beta * (c - r)
    smooth = torch.as_tensor(label_smoothing, dtype=x.dtype, device=x.device)
    win = torch.sigmoid(x) * (F.logsigmoid(x) - torch.log1p(-smooth))
    lose = torch.sigmoid(-x) * (F.logsigmoid(-x) - torch.log(smooth))
    return win + lose


def nca_pair(c: Tensor, r: Tensor, beta: float) -> Tensor:
    """NCA, arXiv 2402.05369 (pair form): -log σ(βc) - ½ log σ(-βc) - ½ log σ(-βr)."""
    return -F.logsigmoid(beta * c) - 0.5 * F.logsigmoid(-beta * c) - 0.5 * F.logsigmoid(-beta * r)


def bco_pair(c: Tensor, r: Tensor, beta: float, delta: float) -> Tensor:
    """BCO, arXiv 2404.04656 Eq. 15: -log σ(βc - δ) - log σ(δ - βr), δ the running mean of all rewards."""
    return -F.logsigmoid(beta * c - delta) - F.logsigmoid(delta - beta * r)


def sppo_hard(c: Tensor, r: Tensor, beta: float) -> Tensor:
    """SPPO, arXiv 2405.00675 Eq. 4.7 with win probability 1 and 0: (c - 1/(2β))² + (r + 1/(2β))²."""
    return (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2


def aot(margin: Tensor, ref_margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT (paired), arXiv 2406.05882: the sorted policy margins must dominate the sorted reference margins.

    margin = log π(chosen) - log π(rejected), ref_margin the reference's, both (B,) over the WHOLE optimizer step.
    The k-th value returned belongs to the k-th quantile, not to the k-th pair: only the sum has a meaning.
    """
    return sigmoid(margin.sort().values, ref_margin.sort().values, beta, label_smoothing)


def aot_unpaired(c: Tensor, r: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT (unpaired), arXiv 2406.05882: the sorted c must dominate the sorted r, over the WHOLE optimizer step."""
    return sigmoid(c.sort().values, r.sort().values, beta, label_smoothing)


def apo_zero(c: Tensor, r: Tensor, beta: float) -> Tensor:
    """APO-zero, arXiv 2408.06266 Eq. 7: 1 - σ(βc) + σ(βr); for chosen answers better than the model's own."""
    return torch.sigmoid(-beta * c) + torch.sigmoid(beta * r)


def apo_down(c: Tensor, r: Tensor, beta: float) -> Tensor:
    """APO-down, arXiv 2408.06266 Eq. 8: σ(βc) + 1 - σ(βΔ); for chosen answers worse than the model's own."""
    return torch.sigmoid(beta * c) + torch.sigmoid(-beta * (c - r))


def discopop(c: Tensor, r: Tensor, beta: float, tau: float = 0.05) -> Tensor:
    """DiscoPOP, arXiv 2406.08414 Eq. 5: (1 - m) · -log σ(x) + m · e^(-x), x = βΔ, m = σ(x/τ)."""
    x = beta * (c - r)
    # m · e^-x as e^(log m - x): for very negative x the product is 0 · inf, its logarithm is a plain number.
    return torch.sigmoid(-x / tau) * -F.logsigmoid(x) + torch.exp(F.logsigmoid(x / tau) - x)


def _reward_logits(c, r, beta, gt_c, gt_r, scale):
    """(log-odds the rewards ask for, log-odds of the policy), each (B,)."""
    return scale * (gt_c - gt_r), beta * (c - r)


def _bernoulli_kl(x: Tensor, y: Tensor) -> Tensor:
    """KL(Bernoulli(σ(x)) ‖ Bernoulli(σ(y)))."""
    return torch.sigmoid(x) * (F.logsigmoid(x) - F.logsigmoid(y)) + torch.sigmoid(-x) * (
        F.logsigmoid(-x) - F.logsigmoid(-y)
    )


def rpo_sq(c: Tensor, r: Tensor, beta: float, gt_c: Tensor, gt_r: Tensor, scale: float) -> Tensor:
    """Reward-aware preference optimisation, arXiv 2406.11704 Sec. 3.3.2, squared distance: (βΔ - s (gt_c - gt_r))²."""
    wanted, policy = _reward_logits(c, r, beta, gt_c, gt_r, scale)
    return (policy - wanted) ** 2


def rpo_bwd_kl(c: Tensor, r: Tensor, beta: float, gt_c: Tensor, gt_r: Tensor, scale: float) -> Tensor:
    """RPO, arXiv 2406.11704, as NeMo-Aligner's rpo_bwd_kl: KL(σ(s (gt_c - gt_r)) ‖ σ(βΔ))."""
    wanted, policy = _reward_logits(c, r, beta, gt_c, gt_r, scale)
    return _bernoulli_kl(wanted, policy)


def rpo_fwd_kl(c: Tensor, r: Tensor, beta: float, gt_c: Tensor, gt_r: Tensor, scale: float) -> Tensor:
    """RPO, arXiv 2406.11704, as NeMo-Aligner's rpo_fwd_kl: KL(σ(βΔ) ‖ σ(s (gt_c - gt_r)))."""
    wanted, policy = _reward_logits(c, r, beta, gt_c, gt_r, scale)
    return _bernoulli_kl(policy, wanted)


class Pairs(NamedTuple):
    """Preference pairs as the losses see them, every field (B,): sums of log-probs over the scored tokens, in nats."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor  # zeros when there is no reference
    ref_rejected: Tensor
    len_chosen: Tensor  # scored tokens
    len_rejected: Tensor
    gt_chosen: Tensor  # ground-truth rewards of the data; NaN where it has none
    gt_rejected: Tensor


def dpo(
    pairs: Pairs,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    gamma: float = 0.5,
    reward_scale: float = 1.0,
    running_mean: float = 0.0,
    average_logps: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One loss of the DPO family, chosen by name.

    Returns per-pair losses (B,) and metrics, each detached (B,), under TRL's names. `average_logps` divides every
    log-prob by its length first. `running_mean` is bco_pair's δ. ValueError: unknown loss, or one that cannot be.
    """
    pi_c, pi_r, ref_c, ref_r, len_c, len_r, gt_c, gt_r = pairs
    if average_logps:
        pi_c, ref_c, pi_r, ref_r = pi_c / len_c, ref_c / len_c, pi_r / len_r, ref_r / len_r
    c, r = pi_c - ref_c, pi_r - ref_r  # (B,) log-ratios

    match loss:
        case "sigmoid":
            losses = sigmoid(c, r, beta, label_smoothing)
        case "robust":
            losses = robust(c, r, beta, label_smoothing)
        case "hinge":
            losses = hinge(c, r, beta)
        case "ipo":
            losses = ipo(c, r, beta)
        case "simpo":
            losses = simpo(pairs.chosen, pairs.rejected, len_c, len_r, beta, gamma)
        case "sigmoid_norm":
            whole_c, whole_r = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
            losses = sigmoid_norm(whole_c, whole_r, len_c, len_r, beta)
        case "exo_pair":
            losses = exo_pair(c, r, beta, label_smoothing)
        case "nca_pair":
            losses = nca_pair(c, r, beta)
        case "bco_pair":
            losses = bco_pair(c, r, beta, running_mean)
        case "sppo_hard":
            losses = sppo_hard(c, r, beta)
        case "aot":
            losses = aot(pi_c - pi_r, ref_c - ref_r, beta, label_smoothing)
        case "aot_unpaired":
            losses = aot_unpaired(c, r, beta, label_smoothing)
        case "apo_zero":
            losses = apo_zero(c, r, beta)
        case "apo_down":
            losses = apo_down(c, r, beta)
        case "discopop":
            losses = discopop(c, r, beta)
        case "rpo_sq":
            losses = rpo_sq(c, r, beta, gt_c, gt_r, reward_scale)
        case "rpo_fwd_kl":
            losses = rpo_fwd_kl(c, r, beta, gt_c, gt_r, reward_scale)
        case "rpo_bwd_kl":
            losses = rpo_bwd_kl(c, r, beta, gt_c, gt_r, reward_scale)
        case _:
            raise ValueError(f"unknown loss {loss!r}: take one of {', '.join(DPO_LOSSES)}")

    if loss == "simpo":  # its implicit reward has no reference and is per token
        c, r = pairs.chosen / len_c, pairs.rejected / len_r
    with torch.no_grad():
        rewards_c, rewards_r = beta * c.detach(), beta * r.detach()
        metrics = {
            "rewards/chosen": rewards_c,
            "rewards/rejected": rewards_r,
            "rewards/margins": rewards_c - rewards_r,
            "rewards/accuracies": (rewards_c > rewards_r).to(c.dtype),
            "logps/chosen": pairs.chosen.detach(),
            "logps/rejected": pairs.rejected.detach(),
        }
    return losses, metrics


# ---- reward models ---------------------------------------------------------------------------------------------------

REWARD_MODEL_LOSSES = ("bradley_terry", "margin_bt", "scaled_bt", "regression")


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log σ(r_c - r_r - m), (B,); m = 0: InstructGPT, arXiv 2203.02155 Eq. 1; margins: Llama 2, 2307.09288 Eq. 2."""
    return -F.logsigmoid(chosen - rejected - margin)


def margin_bt(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """-log σ(Δ - |m|), (B,): HelpSteer2-Preference, arXiv 2410.01257; m: how much better it was judged."""
    return bradley_terry(chosen, rejected, margin.abs())


def scaled_bt(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """|m| · -log σ(Δ), (B,): HelpSteer2-Preference, arXiv 2410.01257; clear preferences count more."""
    return margin.abs() * bradley_terry(chosen, rejected)


def pairwise_reward(
    scores: Tensor, margin: Tensor, loss: str = "bradley_terry", centering: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """A reward model's loss on pairs, chosen by name: scores (B, 2) of chosen and rejected, margins (B,).

    `centering` λ adds λ (r_c² + r_r²), GPT-NeoX's z-loss: scores are only defined up to a constant, this holds it at 0.
    Returns per-pair losses (B,) and metrics, each detached (B,). ValueError: unknown loss.
    """
    chosen, rejected = scores.unbind(1)
    match loss:
        case "bradley_terry":
            losses = bradley_terry(chosen, rejected)
        case "margin_bt":
            losses = margin_bt(chosen, rejected, margin)
        case "scaled_bt":
            losses = scaled_bt(chosen, rejected, margin)
        case _:
            raise ValueError(f"unknown loss {loss!r}: take one of {', '.join(REWARD_MODEL_LOSSES)}")
    if centering:
        losses = losses + centering * (chosen.square() + rejected.square())
    with torch.no_grad():
        c, r = chosen.detach(), rejected.detach()
        metrics = {
            "rewards/chosen": c,
            "rewards/rejected": r,
            "rewards/margins": c - r,
            "rewards/accuracies": (c > r).to(c.dtype),
            "rewards/mean": (c + r) / 2,
            "rewards/square": (c.square() + r.square()) / 2,  # with the mean, the deviation
        }
    return losses, metrics


def regression(scores: Tensor, wanted: Tensor) -> Tensor:
    """(score - wanted)², (R, attributes), exactly 0 without gradient where `wanted` is NaN (missing).

    Divide the sum by the number of labels of the whole step, not by R times attributes.
    """
    known = ~wanted.isnan()
    return torch.where(known, scores - torch.where(known, wanted, 0.0), 0.0).square()


# ---- KTO and others that need no pairs -------------------------------------------------------------------------------
# ratio = log(policy / reference) of a response, summed over its tokens, (B,); label 1 desirable, 0 undesirable, (B,).

KTO_LOSSES = ("kto", "apo_zero_unpaired", "bco")


def kto(ratio: Tensor, label: Tensor, z: Tensor | float, beta: float) -> Tensor:
    """KTO, arXiv 2402.01306 Eq. 8: 1 - σ(β (ratio - z)) where desirable, 1 - σ(β (z - ratio)) where not, (B,).

    z: reference point of the whole step (`reference_point`), no gradient. Weights λ are the caller's.
    """
    return torch.sigmoid(-beta * torch.where(label > 0, ratio - z, z - ratio))


def reference_point(ratio_sum: Tensor, n: int | Tensor) -> Tensor:
    """KTO's z: the mean log-ratio of n mismatched pairs, at least 0; sum over ALL micro-batches and ranks, THEN this.

    The clamp comes last: a mean of clamped means would be another number for every way to cut the step.
    """
    return (ratio_sum / n).clamp(min=0)


def apo_zero_unpaired(ratio: Tensor, label: Tensor, beta: float) -> Tensor:
    """APO-zero, arXiv 2408.06266 Eq. 7, taken apart: 1 - σ(β ratio) where desirable, σ(β ratio) where not, (B,)."""
    return torch.sigmoid(-beta * torch.where(label > 0, ratio, -ratio))


def bco(ratio: Tensor, label: Tensor, beta: float, delta: float) -> Tensor:
    """BCO, arXiv 2404.04656 Eq. 15: -log σ(β ratio - δ) where desirable, -log σ(δ - β ratio) where not, (B,).

    δ: midway between the running means of the desirable and the undesirable rewards.
    """
    shifted = beta * ratio - delta
    return -F.logsigmoid(torch.where(label > 0, shifted, -shifted))


# ---- SteerLM 2.0 -----------------------------------------------------------------------------------------------------


def group_log_softmax(values: Tensor, group: Tensor) -> Tensor:
    """log softmax of (R,) values within groups; group (R,) int64 says which of 0 ... each belongs to."""
    n = int(group.max()) + 1
    top = values.new_full((n,), float("-inf")).scatter_reduce(0, group, values.detach(), "amax")
    shifted = values - top[group]
    return shifted - values.new_zeros(n).index_add(0, group, shifted.exp()).log()[group]


def steerlm2(pi_logps: Tensor, q_logps: Tensor, wanted: Tensor, group: Tensor) -> Tensor:
    """SteerLM 2.0, arXiv 2406.08673: KL(w ‖ b) within each prompt's responses; its terms, (R,).

    w = softmax(wanted), wanted = log P(a|x,y) + log P(y|x) - log Q(y|a,x); b = softmax(log π(y|a,x) - log Q(y|a,x));
    all (R,), Q what the responses were drawn from. The gradient by log π is -(w - b), the paper's. Sum, divide by the
    prompts of the whole step.
    """
    log_w = group_log_softmax(wanted, group).detach()
    log_b = group_log_softmax(pi_logps - q_logps, group)
    return log_w.exp() * (log_w - log_b)
