"""Losses as pure functions: log-probs, values and rewards in, losses and metrics out.

There is no model, no process group and no reduction here. A script sums the losses and divides by
the count of the whole optimizer step, so that packing, micro-batches and ranks cannot change them.

A log-ratio is log(policy / reference) of a response, summed over its scored tokens, in nats.
Letters: B pairs or examples, R responses.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- preference pairs: DPO and its family --------------------------------------------------------
# Arguments are (B,) tensors, one number a pair; every loss returns (B,).

DPO_LOSSES = (
    "sigmoid", "robust", "hinge", "ipo", "simpo", "sigmoid_norm", "exo_pair", "nca_pair",
    "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "rpo_sq",
    "rpo_fwd_kl", "rpo_bwd_kl",
)  # fmt: skip  # a list of names
WHOLE_STEP_LOSSES = ("aot", "aot_unpaired")  # sort over the step: no micro-batch can do it alone
REWARD_LOSSES = ("rpo_sq", "rpo_fwd_kl", "rpo_bwd_kl")  # need the data's rewards of both responses


def sigmoid(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """DPO, arXiv 2305.18290 Eq. 7: -log σ(β (chosen - rejected)).

    With label_smoothing ε it is cDPO, where a label is wrong with probability ε:
    -(1 - ε) log σ(x) - ε log σ(-x), x = β (chosen - rejected).
    """
    x = beta * (chosen_logratios - rejected_logratios)
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def robust(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float
) -> Tensor:
    """Robust DPO, arXiv 2403.00409 Eq. 12: DPO's loss, unbiased although labels are flipped.

    (-(1 - ε) log σ(x) + ε log σ(-x)) / (1 - 2ε), x = β (chosen - rejected), ε = label_smoothing
    < 1/2 the probability of a flip. It may be negative. ValueError: an impossible ε.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"robust needs 0 <= label_smoothing < 0.5, not {label_smoothing}: it is the share of"
            " flipped labels"
        )
    x = beta * (chosen_logratios - rejected_logratios)
    kept, flipped = -F.logsigmoid(x), -F.logsigmoid(-x)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """SLiC, arXiv 2305.10425, in the form of RSO, arXiv 2309.06657 Eq. 8.

    max(0, 1 - β (chosen - rejected)).
    """
    return F.relu(1 - beta * (chosen_logratios - rejected_logratios))


def ipo(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """IPO, arXiv 2310.12036 Eq. 17: (chosen - rejected - 1 / (2β))².

    TRL divides both log-ratios by their lengths first: --average-logps.
    """
    return (chosen_logratios - rejected_logratios - 1 / (2 * beta)) ** 2


def simpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
    gamma: float,
) -> Tensor:
    """SimPO, arXiv 2405.14734 Eq. 6: -log σ(β (chosen / length - rejected / length) - γ).

    On log-probs, each divided by its own response's length; there is no reference.
    """
    means = chosen_logps / chosen_lengths - rejected_logps / rejected_lengths
    return -F.logsigmoid(beta * means - gamma)


def sigmoid_norm(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
) -> Tensor:
    """Length-normalised DPO (Tülu 3), arXiv 2411.15124 Eq. 6: -log σ(β (chosen - rejected)).

    On log-ratios, each divided by its own response's length.
    """
    means = chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths
    return -F.logsigmoid(beta * means)


def exo_pair(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float
) -> Tensor:
    """EXO, arXiv 2402.00856 Eq. 16: KL(p ‖ (1 - ε, ε)), ε = label_smoothing.

    p = (σ(x), σ(-x)), x = β (chosen - rejected), is the policy's own preference. ValueError: an
    impossible ε.
    """
    if not 0 < label_smoothing < 1:
        raise ValueError(
            f"exo_pair needs 0 < label_smoothing < 1, not {label_smoothing}: try 0.001"
        )
    x = beta * (chosen_logratios - rejected_logratios)
    smooth = torch.as_tensor(label_smoothing, dtype=x.dtype, device=x.device)
    win = torch.sigmoid(x) * (F.logsigmoid(x) - torch.log1p(-smooth))
    lose = torch.sigmoid(-x) * (F.logsigmoid(-x) - torch.log(smooth))
    return win + lose


def nca_pair(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """NCA for pairs, arXiv 2402.05369.

    -log σ(β chosen) - ½ log σ(-β chosen) - ½ log σ(-β rejected).
    """
    up = -F.logsigmoid(beta * chosen_logratios)
    chosen_down = -0.5 * F.logsigmoid(-beta * chosen_logratios)
    rejected_down = -0.5 * F.logsigmoid(-beta * rejected_logratios)
    return up + chosen_down + rejected_down


def bco_pair(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, delta: float
) -> Tensor:
    """BCO, arXiv 2404.04656 Eq. 15: -log σ(β chosen - δ) - log σ(δ - β rejected).

    delta: δ, the running mean of all rewards.
    """
    return -F.logsigmoid(beta * chosen_logratios - delta) - F.logsigmoid(
        delta - beta * rejected_logratios
    )


def sppo_hard(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """SPPO, arXiv 2405.00675 Eq. 4.7 with win probabilities 1 and 0.

    (chosen - 1 / (2β))² + (rejected + 1 / (2β))².
    """
    return (chosen_logratios - 0.5 / beta) ** 2 + (rejected_logratios + 0.5 / beta) ** 2


def aot(
    pi_logratios: Tensor, ref_logratios: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """AOT (paired), arXiv 2406.05882: DPO's loss between sorted margins of policy and reference.

    pi_logratios: log π(chosen) - log π(rejected), ref_logratios the reference's, both (B,) over the
    WHOLE optimizer step. The k-th loss belongs to the k-th quantile, not to the k-th pair: only the
    sum has a meaning.
    """
    return sigmoid(pi_logratios.sort().values, ref_logratios.sort().values, beta, label_smoothing)


def aot_unpaired(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """AOT (unpaired), arXiv 2406.05882: DPO's loss between sorted chosen and sorted rejected.

    Both are log-ratios (B,) over the WHOLE optimizer step; only the sum of losses has a meaning.
    """
    chosen, rejected = chosen_logratios.sort().values, rejected_logratios.sort().values
    return sigmoid(chosen, rejected, beta, label_smoothing)


def apo_zero(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """APO-zero, arXiv 2408.06266 Eq. 7: 1 - σ(β chosen) + σ(β rejected).

    For chosen responses that are better than the model's own.
    """
    return torch.sigmoid(-beta * chosen_logratios) + torch.sigmoid(beta * rejected_logratios)


def apo_down(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """APO-down, arXiv 2408.06266 Eq. 8: σ(β chosen) + 1 - σ(β (chosen - rejected)).

    For chosen responses that are worse than the model's own.
    """
    margin = chosen_logratios - rejected_logratios
    return torch.sigmoid(beta * chosen_logratios) + torch.sigmoid(-beta * margin)


def discopop(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, tau: float = 0.05
) -> Tensor:
    """DiscoPOP, arXiv 2406.08414 Eq. 5: (1 - m) · -log σ(x) + m · e^(-x).

    x = β (chosen - rejected), m = σ(x / τ).
    """
    x = beta * (chosen_logratios - rejected_logratios)
    # m · e^-x as e^(log m - x): for very negative x the product is 0 · inf, its logarithm a number.
    return torch.sigmoid(-x / tau) * -F.logsigmoid(x) + torch.exp(F.logsigmoid(x / tau) - x)


def rpo_sq(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    beta: float,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    scale: float,
) -> Tensor:
    """Reward-aware preference optimisation, arXiv 2406.11704 Sec. 3.3.2, squared distance.

    (β (chosen - rejected log-ratio) - scale (chosen - rejected reward))².
    """
    policy = beta * (chosen_logratios - rejected_logratios)
    return (policy - scale * (chosen_rewards - rejected_rewards)) ** 2


def rpo_bwd_kl(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    beta: float,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    scale: float,
) -> Tensor:
    """Reward-aware preference optimisation, arXiv 2406.11704; NeMo-Aligner's rpo_bwd_kl.

    KL(σ(scale (chosen - rejected reward)) ‖ σ(β (chosen - rejected log-ratio))).
    """
    policy = beta * (chosen_logratios - rejected_logratios)
    return _bernoulli_kl(scale * (chosen_rewards - rejected_rewards), policy)


def rpo_fwd_kl(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    beta: float,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    scale: float,
) -> Tensor:
    """Reward-aware preference optimisation, arXiv 2406.11704; NeMo-Aligner's rpo_fwd_kl.

    KL(σ(β (chosen - rejected log-ratio)) ‖ σ(scale (chosen - rejected reward))).
    """
    policy = beta * (chosen_logratios - rejected_logratios)
    return _bernoulli_kl(policy, scale * (chosen_rewards - rejected_rewards))


def _bernoulli_kl(x: Tensor, y: Tensor) -> Tensor:
    """Compute KL(Bernoulli(σ(x)) ‖ Bernoulli(σ(y)))."""
    win = torch.sigmoid(x) * (F.logsigmoid(x) - F.logsigmoid(y))
    lose = torch.sigmoid(-x) * (F.logsigmoid(-x) - F.logsigmoid(-y))
    return win + lose


class Pairs(NamedTuple):
    """Preference pairs as the losses read them: summed log-probs of scored tokens, (B,) each."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor  # zeros without a reference
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
    """Compute one loss of the DPO family, chosen by name.

    Return the losses (B,) and metrics under TRL's names, each detached (B,). `average_logps`
    divides every log-prob by its length first; `running_mean` is bco_pair's δ. ValueError: unknown
    loss, or a setting that it cannot take.
    """
    if not beta > 0:
        raise ValueError(
            f"--beta {beta} must be above 0: 0.1 is common, smaller strays further from the"
            " reference"
        )
    pi_chosen, pi_rejected, ref_chosen, ref_rejected, len_chosen, len_rejected = pairs[:6]
    if average_logps:
        pi_chosen, ref_chosen = pi_chosen / len_chosen, ref_chosen / len_chosen
        pi_rejected, ref_rejected = pi_rejected / len_rejected, ref_rejected / len_rejected
    chosen_logratios = pi_chosen - ref_chosen  # (B,)
    rejected_logratios = pi_rejected - ref_rejected  # (B,)
    logratios = (chosen_logratios, rejected_logratios)
    rewards = (pairs.gt_chosen, pairs.gt_rejected)

    match loss:
        case "sigmoid":
            losses = sigmoid(*logratios, beta, label_smoothing)
        case "robust":
            losses = robust(*logratios, beta, label_smoothing)
        case "hinge":
            losses = hinge(*logratios, beta)
        case "ipo":
            losses = ipo(*logratios, beta)
        case "simpo":
            losses = simpo(pairs.chosen, pairs.rejected, len_chosen, len_rejected, beta, gamma)
        case "sigmoid_norm":  # divides by the lengths itself
            sums = (pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected)
            losses = sigmoid_norm(*sums, len_chosen, len_rejected, beta)
        case "exo_pair":
            losses = exo_pair(*logratios, beta, label_smoothing)
        case "nca_pair":
            losses = nca_pair(*logratios, beta)
        case "bco_pair":
            losses = bco_pair(*logratios, beta, running_mean)
        case "sppo_hard":
            losses = sppo_hard(*logratios, beta)
        case "aot":
            margins = (pi_chosen - pi_rejected, ref_chosen - ref_rejected)
            losses = aot(*margins, beta, label_smoothing)
        case "aot_unpaired":
            losses = aot_unpaired(*logratios, beta, label_smoothing)
        case "apo_zero":
            losses = apo_zero(*logratios, beta)
        case "apo_down":
            losses = apo_down(*logratios, beta)
        case "discopop":
            losses = discopop(*logratios, beta)
        case "rpo_sq":
            losses = rpo_sq(*logratios, beta, *rewards, reward_scale)
        case "rpo_fwd_kl":
            losses = rpo_fwd_kl(*logratios, beta, *rewards, reward_scale)
        case "rpo_bwd_kl":
            losses = rpo_bwd_kl(*logratios, beta, *rewards, reward_scale)
        case _:
            raise ValueError(f"unknown loss {loss!r}: take one of {', '.join(DPO_LOSSES)}")

    if loss == "simpo":  # its implicit reward has no reference and is a mean over tokens
        chosen_logratios = pairs.chosen / len_chosen
        rejected_logratios = pairs.rejected / len_rejected
    with torch.no_grad():
        chosen_rewards, rejected_rewards = beta * chosen_logratios, beta * rejected_logratios
        metrics = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).to(chosen_rewards.dtype),
            "logps/chosen": pairs.chosen.detach(),
            "logps/rejected": pairs.rejected.detach(),
        }
    return losses, metrics


# ---- reward models -------------------------------------------------------------------------------
# chosen and rejected: the model's scores, (B,) each; every loss of a pair returns (B,).

REWARD_MODEL_LOSSES = ("bradley_terry", "margin_bt", "scaled_bt", "regression")


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Bradley-Terry: -log σ(chosen - rejected - margin).

    Without margin InstructGPT, arXiv 2203.02155 Eq. 1; with it Llama 2, arXiv 2307.09288 Eq. 2.
    """
    return -F.logsigmoid(chosen - rejected - margin)


def margin_bt(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """Margin Bradley-Terry, HelpSteer2-Preference, arXiv 2410.01257.

    -log σ(chosen - rejected - |margin|), margin: how much better the chosen response was rated.
    """
    return bradley_terry(chosen, rejected, margin.abs())


def scaled_bt(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """Scaled Bradley-Terry, HelpSteer2-Preference, arXiv 2410.01257.

    -|margin| log σ(chosen - rejected): clear preferences count more.
    """
    return margin.abs() * bradley_terry(chosen, rejected)


def pairwise_reward(
    scores: Tensor, margin: Tensor, loss: str = "bradley_terry", centering: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a reward model's loss on pairs, chosen by name.

    scores (B, 2) of chosen and rejected, margin (B,) -> losses (B,) and metrics, each detached
    (B,). Scores are defined only up to a constant: `centering` λ adds GPT-NeoX's z-loss,
    λ (chosen² + rejected²), which holds them around 0. ValueError: unknown loss.
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
        metrics = {
            "rewards/chosen": chosen.detach(),
            "rewards/rejected": rejected.detach(),
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "rewards/mean": (chosen + rejected) / 2,
            "rewards/square": (chosen.square() + rejected.square()) / 2,  # for the deviation
        }
    return losses, metrics


def regression(scores: Tensor, target: Tensor) -> Tensor:
    """Squared error (score - target)², (R, attributes) -> (R, attributes).

    0 without gradient where the target is NaN (missing). Divide the sum by the number of labels of
    the whole step, not by R times attributes.
    """
    known = ~target.isnan()
    return torch.where(known, scores - torch.where(known, target, 0.0), 0.0).square()


# ---- unpaired labels: KTO and others -------------------------------------------------------------
# logratios (B,); label (B,): 1 desirable, 0 undesirable; every loss returns (B,).

KTO_LOSSES = ("kto", "apo_zero_unpaired", "bco")


def kto(logratios: Tensor, label: Tensor, z: Tensor | float, beta: float) -> Tensor:
    """KTO, arXiv 2402.01306 Eq. 8.

    1 - σ(β (logratio - z)) if desirable, else 1 - σ(β (z - logratio)). z: reference point of the
    whole step (`reference_point`), without gradient. The caller multiplies by the weights λ.
    """
    return torch.sigmoid(-beta * torch.where(label > 0, logratios - z, z - logratios))


def reference_point(logratio_sum: Tensor, n: int | Tensor) -> Tensor:
    """KTO's reference point z: the mean log-ratio of n mismatched pairs, at least 0.

    Sum over ALL micro-batches and ranks first: a mean of clamped means would change with every way
    to cut the step.
    """
    return (logratio_sum / n).clamp(min=0)


def apo_zero_unpaired(logratios: Tensor, label: Tensor, beta: float) -> Tensor:
    """APO-zero without pairs, one of the two terms of arXiv 2408.06266 Eq. 7 an example.

    1 - σ(β logratio) if desirable, else σ(β logratio).
    """
    return torch.sigmoid(-beta * torch.where(label > 0, logratios, -logratios))


def bco(logratios: Tensor, label: Tensor, beta: float, delta: float) -> Tensor:
    """BCO, arXiv 2404.04656 Eq. 15.

    -log σ(β logratio - δ) if desirable, else -log σ(δ - β logratio).
    delta: δ, midway between the running means of desirable and undesirable rewards.
    """
    shifted = beta * logratios - delta
    return -F.logsigmoid(torch.where(label > 0, shifted, -shifted))


# ---- SteerLM 2.0 ---------------------------------------------------------------------------------


def group_log_softmax(values: Tensor, group: Tensor) -> Tensor:
    """Compute the log softmax of values (R,) within groups; group (R,) int64 counts from 0."""
    n = int(group.max()) + 1
    top = values.new_full((n,), float("-inf")).scatter_reduce(0, group, values.detach(), "amax")
    shifted = values - top[group]
    return shifted - values.new_zeros(n).index_add(0, group, shifted.exp()).log()[group]


def steerlm2(pi_logps: Tensor, q_logps: Tensor, target: Tensor, group: Tensor) -> Tensor:
    """SteerLM 2.0, arXiv 2406.08673: KL(w ‖ b) within each prompt's responses; its terms, (R,).

    w = softmax(target), target = log P(a|x,y) + log P(y|x) - log Q(y|a,x), and
    b = softmax(log π(y|a,x) - log Q(y|a,x)), where Q drew the responses; all (R,). The gradient by
    log π is -(w - b), as in the paper. Divide the sum by the number of prompts of the whole step.
    """
    log_w = group_log_softmax(target, group).detach()
    log_b = group_log_softmax(pi_logps - q_logps, group)
    return log_w.exp() * (log_w - log_b)


# ---- online algorithms: what a sample is worth -----------------------------------------------------------------------
# M sampled tokens, response by response and in order; R responses; lengths (R,) their tokens, response (M,) whose each
# is; n prompts with G responses each, R = n G. Sampled quantities carry no gradient: these run under no_grad.

KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
ADVANTAGES = ("rloo", "grpo", "dr_grpo", "reinforce++")


def kl_estimate(logps: Tensor, ref_logps: Tensor, kind: str = "k1") -> Tensor:
    """KL(policy ‖ reference) at each token sampled from the policy, (M,); Schulman, joschu.net/blog/kl-approx.html.

    x = log π - log π_ref. k1 = x, unbiased and noisy; k2 = x²/2, biased, but its gradient is the KL's; k3 =
    e^(-x) - 1 + x, unbiased and never negative; abs = |x|, NeMo-Aligner's penalty. As a term of the loss k1 pulls
    nowhere: its expected gradient is zero. ValueError: unknown kind.
    """
    x = logps - ref_logps
    match kind:
        case "k1":
            return x
        case "k2":
            return 0.5 * x.square()
        case "k3":
            return torch.expm1(-x) + x
        case "abs":
            return x.abs()
    raise ValueError(f"unknown KL estimator {kind!r}: take one of {', '.join(KL_ESTIMATORS)}")


def token_rewards(rewards: Tensor, kl: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """-β kl_t at every token, and the response's reward at its last, (M,): InstructGPT, arXiv 2203.02155 Eq. 2.

    rewards (R,), kl (M,), lengths (R,).
    """
    found = -beta * kl
    found[lengths.long().cumsum(0) - 1] += rewards.to(found.dtype)
    return found


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, arXiv 1506.02438 Eq. 16, response by response: (advantages, returns), (M,).

    δ_t = r_t + γ V_{t+1} - V_t, A_t = δ_t + γ λ A_{t+1}, with V = A = 0 beyond the end; returns = A + V.
    values (M,): V of the state that each token was chosen in. With V = 0 and λ = 1 it is the (discounted) reward to go.
    """
    lengths = lengths.long()
    place = torch.arange(len(rewards), device=rewards.device)
    starts = lengths.cumsum(0) - lengths  # (R,)
    response = torch.repeat_interleave(
        torch.arange(len(lengths), device=rewards.device), lengths
    )  # (M,)
    column = place - starts[response]  # (M,) of each token in its response
    shape = (int(lengths.max()) + 1, len(lengths))  # one column more: beyond the end all is zero
    r, v = rewards.new_zeros(shape), rewards.new_zeros(shape)
    r[column, response], v[column, response] = rewards, values
    advantages = torch.zeros_like(r)
    for t in range(shape[0] - 2, -1, -1):
        advantages[t] = r[t] + gamma * v[t + 1] - v[t] + gamma * lam * advantages[t + 1]
    found = advantages[column, response]
    return found, found + values


def moments(values: Tensor) -> Tensor:
    """(count, sum, sum of squares) in fp64, (3,): add them up over micro-batches and ranks, then `whiten`."""
    x = values.double()
    return torch.stack((torch.full_like(x.sum(), x.numel()), x.sum(), x.square().sum()))


def whiten(values: Tensor, totals: Tensor) -> Tensor:
    """(x - mean) / deviation, in x's shape, by the `moments` of ALL that is to be whitened.

    The deviation is that of a sample (n - 1), as NeMo-Aligner's, OpenRLHF's and TRL's are.
    """
    n, total, squares = totals
    mean = total / n
    variance = ((squares - total * mean) / (n - 1).clamp(min=1)).clamp(min=0)
    return ((values - mean) * (variance + 1e-8).rsqrt()).to(values.dtype)


def rloo(rewards: Tensor) -> Tensor:
    """Leave-one-out, arXiv 2402.14740 Eq. 8: r_i minus the mean of the others' rewards; (n, G) -> (n, G). G >= 2."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def dr_grpo(rewards: Tensor) -> Tensor:
    """Dr. GRPO, arXiv 2503.20783 Sec. 3.2: r_i - mean of its group; (n, G) -> (n, G). It is rloo times (G - 1) / G."""
    return rewards - rewards.mean(1, keepdim=True)


def grpo(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """GRPO, arXiv 2402.03300 Sec. 4.1.2: (r_i - mean) / (deviation + ε) of its group; (n, G) -> (n, G). G >= 2.

    Deviation (n - 1) and ε as in TRL. A group whose rewards are all alike teaches nothing: 0.
    """
    return dr_grpo(rewards) / (rewards.std(1, keepdim=True) + eps)


def reinforce_plus_plus(token_rewards: Tensor, lengths: Tensor) -> Tensor:
    """REINFORCE++, arXiv 2501.03262 Eq. 7-8: every token's reward to go, whitened over ALL tokens; (M,) -> (M,)."""
    to_go, _ = gae(token_rewards, torch.zeros_like(token_rewards), lengths, 1.0, 1.0)
    return whiten(to_go, moments(to_go))


def advantages(
    name: str, rewards: Tensor, kl: Tensor, lengths: Tensor, group: int, beta: float = 0.0
) -> Tensor:
    """What each token of a WHOLE step is worth, (M,), by the name of the baseline.

    rewards (R,), groups of `group` side by side; kl (M,) and β make a penalty inside the reward: of the response as a
    whole (its sum), or with reinforce++ token by token. ValueError: unknown name, or a group of one with nothing to
    compare it to.
    """
    if name not in ADVANTAGES:
        raise ValueError(f"unknown advantage {name!r}: take one of {', '.join(ADVANTAGES)}")
    if name == "reinforce++":
        return reinforce_plus_plus(token_rewards(rewards, kl, lengths, beta), lengths)
    if group < 2:
        raise ValueError(
            f"advantage {name} compares the answers to a prompt: it needs a group of 2 or more, not {group}"
        )
    response = torch.repeat_interleave(torch.arange(len(lengths), device=kl.device), lengths.long())
    penalty = kl.new_zeros(len(lengths)).index_add(0, response, kl)
    grouped = (rewards.to(kl.dtype) - beta * penalty).view(-1, group)
    return {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo}[name](grouped).flatten()[response]


# ---- online algorithms: what the policy learns -----------------------------------------------------------------------

POLICY_LOSSES = {  # name: clip_low, clip_high as the papers have them
    "grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (float("inf"), 4.0),
    "reinforce": (float("inf"), float("inf")),
}  # fmt: skip
AGGREGATES = ("token", "sequence", "constant")


def clipped_surrogate(
    ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO, arXiv 1707.06347 Eq. 7: -min(ρ A, clip(ρ, 1 - low, 1 + high) A), (M,); and where the clip held, (M,)."""
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    with torch.no_grad():
        held = torch.where(
            advantage > 0, ratio > 1 + clip_high, (ratio < 1 - clip_low) & (advantage < 0)
        )
    return -torch.minimum(ratio * advantage, clipped * advantage), held.to(ratio.dtype)


def clipped_value(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """½ max((V - R)², (V_old + clip(V - V_old, ±ε) - R)²), as PPO's own code has it, and where it held; (M,) each."""
    moved = values - old_values
    near = old_values + moved.clamp(-clip, clip)
    plain, clipped = (values - returns).square(), (near - returns).square()
    held = (moved.abs() > clip) & (clipped > plain)  # within the clip the two differ by rounding
    return 0.5 * torch.maximum(plain, clipped), held.to(values.dtype)


def sequence_ratio(log_ratio: Tensor, response: Tensor, lengths: Tensor) -> Tensor:
    """GSPO, arXiv 2507.18071 Eq. 7: s_i = exp(mean over the tokens of response i of log ratio), at its tokens, (M,)."""
    total = log_ratio.new_zeros(len(lengths)).index_add(0, response, log_ratio)
    return (total / lengths.to(total.dtype)).exp()[response]


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
    """One policy-gradient loss, by name: per-token losses (M,), to be weighted by `token_weights`; metrics (M,) each.

    grpo: PPO's clipped surrogate with ρ a token's ratio π / π_old. dapo: the same, clipped further up than down
    (arXiv 2503.14476 Eq. 8). gspo: the same with ρ the whole response's, length-normalised (arXiv 2507.18071 Eq. 5).
    cispo: -sg(min(ρ, 1 + high)) A log π, so that no token loses its gradient (MiniMax-M1, arXiv 2506.13585 Eq. 4; no
    lower bound, as there). reinforce: -A log π, for one update a rollout. Clips: None takes the paper's.
    ValueError: unknown loss.
    """
    if loss not in POLICY_LOSSES:
        raise ValueError(f"unknown loss {loss!r}: take one of {', '.join(POLICY_LOSSES)}")
    low, high = (
        own if given is None else given
        for own, given in zip(POLICY_LOSSES[loss], (clip_low, clip_high))
    )
    log_ratio = logps - old_logps
    ratio = sequence_ratio(log_ratio, response, lengths) if loss == "gspo" else log_ratio.exp()
    if loss == "reinforce":
        losses, held = -advantage * logps, torch.zeros_like(ratio)
    elif loss == "cispo":
        losses = -ratio.detach().clamp(max=1 + high) * advantage * logps
        held = (ratio > 1 + high).to(ratio.dtype)
    else:
        losses, held = clipped_surrogate(ratio, advantage, low, high)
    return losses, {"ratio": ratio.detach(), "clip_fraction": held.detach()}


def token_weights(
    lengths: Tensor, step_lengths: Tensor, how: str = "token", constant: int = 1
) -> Tensor:
    """What one token of each response counts in the sum that is the loss, (R,), by the lengths of the WHOLE step.

    token: 1 / tokens of the step (DAPO). sequence: 1 / (responses · own length): the mean of the responses' means
    (GRPO, GSPO). constant: 1 / (responses · constant), the longest answer allowed (Dr. GRPO). ValueError: unknown.
    """
    match how:
        case "token":
            return torch.ones_like(lengths) / step_lengths.sum()
        case "sequence":
            return 1 / (len(step_lengths) * lengths)
        case "constant":
            return torch.ones_like(lengths) / (len(step_lengths) * constant)
    raise ValueError(f"unknown aggregate {how!r}: take one of {', '.join(AGGREGATES)}")
