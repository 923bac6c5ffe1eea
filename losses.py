"""Every loss of the project, as pure functions: log-probs in, per-example losses and metrics out.

No model, no process group and no reduction: a script sums what it gets and divides by the count of the WHOLE optimizer
step, so that packing, micro-batches and ranks cannot change a loss.

Letters: B pairs; c, r = log(policy / reference) of the chosen and the rejected response, summed over its tokens, (B,);
delta = c - r; len_c, len_r = scored tokens of each, (B,). Every function of the DPO family returns (B,).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DPO_LOSSES = (
    "sigmoid", "robust", "hinge", "ipo", "simpo", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
    "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "rpo_sq", "rpo_fwd_kl", "rpo_bwd_kl",
)  # fmt: skip
WHOLE_STEP_LOSSES = (
    "aot",
    "aot_unpaired",
)  # they sort over the step: no micro-batch can compute them alone
REWARD_LOSSES = (
    "rpo_sq",
    "rpo_fwd_kl",
    "rpo_bwd_kl",
)  # they need chosen_reward and rejected_reward in the data


def sigmoid(c: Tensor, r: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, arXiv 2305.18290 Eq. 7: -log σ(β Δ). With label_smoothing ε, cDPO: the label is wrong with probability ε."""
    x = beta * (c - r)
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def robust(c: Tensor, r: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO, arXiv 2403.00409 Eq. 12: unbiased under labels flipped with probability ε < 1/2; may be negative."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"robust needs 0 <= label_smoothing < 0.5, not {label_smoothing}: it is the share of flips"
        )
    x = beta * (c - r)
    kept, flipped = -F.logsigmoid(x), -F.logsigmoid(-x)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge(c: Tensor, r: Tensor, beta: float) -> Tensor:
    """SLiC, arXiv 2305.10425, in the form of RSO, arXiv 2309.06657 Eq. 8: max(0, 1 - β Δ)."""
    return F.relu(1 - beta * (c - r))


def ipo(c: Tensor, r: Tensor, beta: float) -> Tensor:
    """IPO, arXiv 2310.12036 Eq. 17: (Δ - 1/(2β))². TRL divides c and r by their lengths first: --average-logps."""
    return (c - r - 1 / (2 * beta)) ** 2


def simpo(
    logps_c: Tensor, logps_r: Tensor, len_c: Tensor, len_r: Tensor, beta: float, gamma: float
) -> Tensor:
    """SimPO, arXiv 2405.14734 Eq. 6: -log σ(β (log π_c / |c| - log π_r / |r|) - γ). No reference model."""
    return -F.logsigmoid(beta * (logps_c / len_c - logps_r / len_r) - gamma)


def sigmoid_norm(c: Tensor, r: Tensor, len_c: Tensor, len_r: Tensor, beta: float) -> Tensor:
    """Length-normalised DPO, arXiv 2411.15124 Eq. 6 (Tülu 3): -log σ(β (c / |c| - r / |r|))."""
    return -F.logsigmoid(beta * (c / len_c - r / len_r))


def exo_pair(c: Tensor, r: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """EXO, arXiv 2402.00856 Eq. 16: KL(p ‖ (1 - ε, ε)) with p = (σ(βΔ), σ(-βΔ)), the policy's own preference."""
    if not 0 < label_smoothing < 1:
        raise ValueError(
            f"exo_pair needs 0 < label_smoothing < 1, not {label_smoothing}: try 0.001"
        )
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


def rpo_bwd_kl(
    c: Tensor, r: Tensor, beta: float, gt_c: Tensor, gt_r: Tensor, scale: float
) -> Tensor:
    """RPO, arXiv 2406.11704, as NeMo-Aligner's rpo_bwd_kl: KL(σ(s (gt_c - gt_r)) ‖ σ(βΔ))."""
    wanted, policy = _reward_logits(c, r, beta, gt_c, gt_r, scale)
    return _bernoulli_kl(wanted, policy)


def rpo_fwd_kl(
    c: Tensor, r: Tensor, beta: float, gt_c: Tensor, gt_r: Tensor, scale: float
) -> Tensor:
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
    if not beta > 0:
        raise ValueError(
            f"--beta {beta} must be above 0: 0.1 is common, smaller strays further from the reference"
        )
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


class _WithGradient(torch.autograd.Function):
    """Losses (n,) computed elsewhere, with their derivatives by k inputs: slopes (n, k)."""

    @staticmethod
    def forward(ctx, losses, slopes, *inputs):
        ctx.save_for_backward(slopes)
        return losses.clone()

    @staticmethod
    def backward(ctx, grad):
        (slopes,) = ctx.saved_tensors
        return None, None, *(grad * slope for slope in slopes.unbind(1))


class StepLosses:
    """Losses of all pairs of an optimizer step, for those that sort the pairs (WHOLE_STEP_LOSSES).

    No micro-batch can compute such a loss alone, so a first pass without gradients collects the
    log-probs of the whole step. Here they become losses and derivatives by both log-probs, (n,) each,
    in the order of `examples`. `of` picks those of a micro-batch, so that a second pass can backpropagate.
    """

    def __init__(self, examples: list[int], chosen: Tensor, rejected: Tensor, losses: Tensor):
        """chosen, rejected: log-probs (n,) that require gradients, from which `losses` (n,) was made."""
        slopes = torch.autograd.grad(losses.sum(), (chosen, rejected))
        self.losses, self.slopes = losses.detach(), torch.stack(slopes, 1)  # (n,), (n, 2)
        self.row = {example: i for i, example in enumerate(examples)}

    def of(self, examples: list[int], chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the losses of some pairs, (B,), with gradients to their log-probs of this pass, (B,)."""
        rows = [self.row[example] for example in examples]
        return _WithGradient.apply(self.losses[rows], self.slopes[rows], chosen, rejected)


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


# ---- online algorithms: rewards, KL, advantages -----------------------------------------------
# A scored token is one that the policy sampled; tokens that it only read (tool output) do not occur.
# M scored tokens, response by response and in order; R responses; n prompts with G responses each,
# R = n G. lengths (R,): scored tokens of each response; response (M,): each token's response.
# Nothing in this part carries a gradient, but for kl_estimate as a term of the loss.

KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
ADVANTAGES = ("rloo", "grpo", "dr_grpo", "reinforce++")
SCALED_ADVANTAGES = ("grpo", "reinforce++")  # divided by a deviation, and β with it


def safe_exp(x: Tensor) -> Tensor:
    """Return e^x, bounded so that it, its slope and their products with ordinary numbers are finite.

    The bound (e^79 in fp32, e^638 in fp64) keeps 0 · e^x at 0 where a clip removes the gradient.
    Below it the result is exactly torch.exp.
    """
    limit = 0.9 * math.log(torch.finfo(x.dtype).max)
    excess = (x - limit).clamp(min=0).detach()  # no clamp of x itself: the slope stays e^x
    return (x - excess).exp()


def kl_estimate(logps: Tensor, ref_logps: Tensor, kind: str = "k1") -> Tensor:
    """Estimate KL(policy ‖ reference) at each token sampled from the policy, (M,), in nats.

    Schulman, joschu.net/blog/kl-approx.html, with x = log π - log π_ref:
    k1   x; unbiased, noisy.
    k2   x²/2; biased.
    k3   e^(-x) - 1 + x; unbiased and never negative.
    abs  |x|; NeMo-Aligner's penalty.
    Expected gradient over samples of the policy, with KL = KL(π ‖ π_ref):
                  as a term of the loss       β times it, inside the reward
    k1            0                           -∇ KL
    k2            ∇ KL                        -E[x²/2 ∇ log π]
    k3            ∇ KL(π_ref ‖ π)             -∇ KL + ∇ KL(π_ref ‖ π)
    abs           ∇ Σ |π - π_ref|             -E[|x| ∇ log π]
    ValueError: unknown kind.
    """
    x = logps - ref_logps
    match kind:
        case "k1":
            return x
        case "k2":
            return 0.5 * x.square()
        case "k3":
            limit = 0.9 * math.log(torch.finfo(x.dtype).max)  # e^(-x) stays finite, as in safe_exp
            excess = (-x - limit).clamp(min=0).detach()
            return torch.expm1(-x - excess) + x
        case "abs":
            return x.abs()
    raise ValueError(f"unknown KL estimator {kind!r}: choose one of {', '.join(KL_ESTIMATORS)}")


def token_rewards(rewards: Tensor, kl: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """Return -β kl_t per token plus the response's reward at its last scored token, (M,).

    InstructGPT, arXiv 2203.02155 Eq. 2. rewards (R,), kl (M,), lengths (R,), each at least 1.
    Example: rewards [5.], kl [1., 2.], lengths [2], beta 0.1 -> [-0.1, 4.8].
    """
    per_token = -beta * kl
    last = lengths.long().cumsum(0) - 1  # (R,) index of each response's last scored token
    per_token[last] += rewards.to(per_token.dtype)
    return per_token


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Compute generalised advantage estimates: (advantages, returns), (M,) each.

    arXiv 1506.02438 Eq. 16, for each response on its own:
    δ_t = r_t + γ V_{t+1} - V_t,  A_t = δ_t + γ λ A_{t+1},  return_t = A_t + V_t,
    where V and A are 0 after the last scored token and t + 1 is the next scored token.

    rewards (M,); values (M,): V of the state in which each token was sampled. With V = 0 and λ = 1
    the advantage is the discounted reward to go.
    Example: one response, rewards [0, 0, 1], values [.5, .4, .8], γ = 1, λ = 0
    -> advantages [-.1, .4, .2], returns [.4, .8, 1.].
    """
    lengths = lengths.long()
    starts = lengths.cumsum(0) - lengths  # (R,) index of each response's first token
    responses = torch.arange(len(lengths), device=rewards.device)
    response = torch.repeat_interleave(responses, lengths)  # (M,)
    t = torch.arange(len(rewards), device=rewards.device) - starts[response]  # (M,)
    # One row per time step, one column per response; the extra last row is the end, all zero.
    shape = (int(lengths.max()) + 1, len(lengths))
    r = rewards.new_zeros(shape)
    v = rewards.new_zeros(shape)
    r[t, response] = rewards
    v[t, response] = values
    a = torch.zeros_like(r)
    for i in range(shape[0] - 2, -1, -1):
        a[i] = r[i] + gamma * v[i + 1] - v[i] + gamma * lam * a[i + 1]
    advantages = a[t, response]
    return advantages, advantages + values


class Moments(NamedTuple):
    """Number, mean and Σ (x - mean)² of some values, fp64; those of parts add up to the whole's."""

    n: Tensor
    mean: Tensor
    squares: Tensor

    def __add__(self, other: "Moments") -> "Moments":  # type: ignore[override]
        """Merge those of two parts (Chan et al., 1979)."""
        n = self.n + other.n
        gap = other.mean - self.mean
        mean = self.mean + gap * other.n / n
        squares = self.squares + other.squares
        return Moments(n, mean, squares + gap.square() * self.n * other.n / n)

    def __radd__(self, other: int) -> "Moments":
        """Begin a sum: 0 + moments."""
        return self


def moments(values: Tensor) -> Moments:
    """Return the moments of (n,) values, n > 0: exact for equal values and at any offset.

    A sum of squares would cancel: at an offset of 1e8 it gave a deviation of 0.2 for 1.0. Add the
    moments of several micro-batches or ranks, then pass the total to `whiten`.
    """
    x = values.double()
    pivot = x.flatten()[0]  # equal values: x - pivot is exactly 0
    mean = pivot + (x - pivot).mean()
    return Moments(torch.full_like(mean, x.numel()), mean, (x - mean).square().sum())


def whiten(values: Tensor, totals: Moments) -> Tensor:
    """Return (x - mean) / deviation, in x's shape, given the `moments` of ALL values.

    The deviation is the sample deviation (n - 1), as in NeMo-Aligner, OpenRLHF and TRL. Equal
    values give exactly 0.
    """
    variance = totals.squares / (totals.n - 1).clamp(min=1)
    return ((values.double() - totals.mean) * (variance + 1e-8).rsqrt()).to(values.dtype)


def _centred(rewards: Tensor) -> Tensor:
    """Subtract the first reward of each group, (n, G): equal rewards become exactly 0."""
    return rewards - rewards[:, :1]


def rloo(rewards: Tensor) -> Tensor:
    """Compute leave-one-out advantages, arXiv 2402.14740 Eq. 8: (n, G) -> (n, G), G >= 2.

    Each reward minus the mean of the other rewards in its group.
    Example: [1, 2, 6] -> [-3, -1.5, 4.5].
    """
    rewards = _centred(rewards)
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def dr_grpo(rewards: Tensor) -> Tensor:
    """Compute Dr. GRPO advantages, arXiv 2503.20783 Sec. 3.2: (n, G) -> (n, G).

    Each reward minus the mean of its group: rloo times (G - 1) / G.
    """
    rewards = _centred(rewards)
    return rewards - rewards.mean(1, keepdim=True)


def grpo(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """Compute GRPO advantages, arXiv 2402.03300 Sec. 4.1.2: (n, G) -> (n, G), G >= 2.

    (reward - mean of its group) / (deviation of its group + ε). The sample deviation (n - 1) and ε
    are TRL's. A group of equal rewards gets 0 and teaches nothing.
    """
    return dr_grpo(rewards) / (_centred(rewards).std(1, keepdim=True) + eps)


def reinforce_plus_plus(token_rewards: Tensor, lengths: Tensor) -> Tensor:
    """Compute REINFORCE++ advantages, arXiv 2501.03262 Eq. 7-8: (M,) -> (M,).

    The reward to go of each token, whitened over ALL tokens of the step.
    """
    to_go, _ = gae(token_rewards, torch.zeros_like(token_rewards), lengths, 1.0, 1.0)
    return whiten(to_go, moments(to_go))


def advantages(
    name: str, rewards: Tensor, kl: Tensor, lengths: Tensor, group: int, beta: float = 0.0
) -> Tensor:
    """Compute the advantage of every scored token of a WHOLE step, (M,), by the baseline's name.

    rewards (R,), with the `group` responses of each prompt side by side; kl (M,). β kl is
    subtracted from the rewards: summed over the response, or per token with reinforce++.
    ValueError: unknown name, or a group of one where the baseline is the group's.
    """
    if name not in ADVANTAGES:
        raise ValueError(f"unknown advantage {name!r}: choose one of {', '.join(ADVANTAGES)}")
    if name == "reinforce++":
        return reinforce_plus_plus(token_rewards(rewards, kl, lengths, beta), lengths)
    if group < 2:
        raise ValueError(
            f"advantage {name} compares the responses to a prompt: "
            f"it needs a group of 2 or more, not {group}"
        )
    responses = torch.arange(len(lengths), device=kl.device)
    response = torch.repeat_interleave(responses, lengths.long())  # (M,)
    penalty = kl.new_zeros(len(lengths)).index_add(0, response, kl)  # (R,)
    grouped = (rewards.to(kl.dtype) - beta * penalty).view(-1, group)  # (n, G)
    baseline = {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo}[name]
    return baseline(grouped).flatten()[response]


# ---- online algorithms: policy and value losses -----------------------------------------------

POLICY_LOSSES = {  # name: (clip_low, clip_high), the papers' defaults
    "grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "cispo": (float("inf"), 4.0),
    "reinforce": (float("inf"), float("inf")),
}
AGGREGATES = ("token", "sequence", "constant")


def clipped_surrogate(
    ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Compute PPO's clipped surrogate, arXiv 1707.06347 Eq. 7: (losses, clipped), (M,) each.

    losses = -min(ρ A, clip(ρ, 1 - low, 1 + high) A); clipped is 1 where the clip removed the
    gradient, else 0.
    """
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    with torch.no_grad():
        above = ratio > 1 + clip_high
        below = (ratio < 1 - clip_low) & (advantage < 0)
        clipped = torch.where(advantage > 0, above, below)
    return -torch.minimum(ratio * advantage, bounded * advantage), clipped.to(ratio.dtype)


def clipped_value(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Compute PPO's clipped value loss, as in its reference code: (losses, clipped), (M,) each.

    losses = ½ max((V - R)², (V_old + clip(V - V_old, ±ε) - R)²); clipped is 1 where the second
    term is the larger one, else 0.
    """
    moved = values - old_values
    near = old_values + moved.clamp(-clip, clip)
    free_error = (values - returns).square()
    near_error = (near - returns).square()
    # Within the clip the two errors differ only by rounding.
    clipped = (moved.abs() > clip) & (near_error > free_error)
    return 0.5 * torch.maximum(free_error, near_error), clipped.to(values.dtype)


def sequence_ratio(log_ratio: Tensor, response: Tensor, lengths: Tensor) -> Tensor:
    """Compute GSPO's length-normalised ratio, arXiv 2507.18071 Eq. 7, (M,).

    s_i = exp(mean of log ratio over the scored tokens of response i), repeated for each token.
    log_ratio (M,), response (M,), lengths (R,).
    """
    total = log_ratio.new_zeros(len(lengths)).index_add(0, response, log_ratio)
    return safe_exp(total / lengths.to(total.dtype))[response]


def policy_gradient(
    logps: Tensor,
    old_logps: Tensor,
    advantage: Tensor,
    response: Tensor,
    lengths: Tensor,
    loss: str = "grpo",
    clip_low: float | None = None,
    clip_high: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a policy-gradient loss by name: per-token losses (M,) and metrics, (M,) each.

    Weight the losses with `token_weights`. ρ = π / π_old is the ratio of a token.
    grpo       PPO's clipped surrogate.
    dapo       grpo with a higher upper clip, arXiv 2503.14476 Eq. 8.
    gspo       grpo with the ratio of the whole response, length-normalised, arXiv 2507.18071 Eq. 5.
    cispo      -sg(min(ρ, 1 + high)) A log π: every token keeps a gradient. MiniMax-M1, arXiv
               2506.13585 Eq. 4; without a lower bound, as in the paper.
    reinforce  -A log π, for one update per rollout.
    logps, old_logps, advantage, response (M,); lengths (R,). A clip of None is the paper's.
    ValueError: unknown loss.
    """
    if loss not in POLICY_LOSSES:
        raise ValueError(f"unknown loss {loss!r}: choose one of {', '.join(POLICY_LOSSES)}")
    default_low, default_high = POLICY_LOSSES[loss]
    low = default_low if clip_low is None else clip_low
    high = default_high if clip_high is None else clip_high
    log_ratio = logps - old_logps
    ratio = safe_exp(log_ratio)
    if loss == "gspo":
        ratio = sequence_ratio(log_ratio, response, lengths)
    if loss == "reinforce":
        losses = -advantage * logps
        clipped = torch.zeros_like(ratio)
    elif loss == "cispo":
        losses = -ratio.detach().clamp(max=1 + high) * advantage * logps
        clipped = (ratio > 1 + high).to(ratio.dtype)
    else:
        losses, clipped = clipped_surrogate(ratio, advantage, low, high)
    return losses, {"ratio": ratio.detach(), "clip_fraction": clipped.detach()}


def token_weights(
    lengths: Tensor, step_lengths: Tensor, how: str = "token", constant: int = 1
) -> Tensor:
    """Return the weight of one token of each response in the loss, (R,).

    lengths (R,): scored tokens of the responses at hand; step_lengths: those of all responses of
    the WHOLE update, so that the loss does not depend on how it is cut into micro-batches.
    token     1 / tokens of the update (DAPO)
    sequence  1 / (responses · own length): the mean of per-response means (GRPO, GSPO)
    constant  1 / (responses · constant), constant the longest response allowed (Dr. GRPO)
    ValueError: unknown how.
    """
    match how:
        case "token":
            return torch.ones_like(lengths) / step_lengths.sum()
        case "sequence":
            return 1 / (len(step_lengths) * lengths)
        case "constant":
            return torch.ones_like(lengths) / (len(step_lengths) * constant)
    raise ValueError(f"unknown aggregate {how!r}: choose one of {', '.join(AGGREGATES)}")
