"""Losses as pure functions: log-probs, values and rewards in, losses and metrics out.

There is no model, no process group and no reduction here. A script sums the losses and divides by
the count of the whole optimizer step, so that packing, micro-batches and ranks cannot change them.

A log-ratio is log(policy / reference) of a response, summed over its scored tokens, in nats.
Letters: B pairs or examples, R responses.
"""

import math
from typing import NamedTuple

import numpy as np
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
NORMALISED_LOSSES = ("simpo", "sigmoid_norm")  # divide log-probs by the lengths themselves
REWARD_LOSSES = ("rpo_sq", "rpo_fwd_kl", "rpo_bwd_kl")  # need the data's rewards of both responses
# For pairs that are new in every step: no loss that sorts a whole step or keeps a running mean.
FRESH_PAIR_LOSSES = tuple(
    name for name in DPO_LOSSES if name not in (*WHOLE_STEP_LOSSES, "bco_pair")
)


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


F_DIVERGENCES = ("reverse_kl", "forward_kl", "js")
DIFFERENCE_LOSSES = ("sigmoid", "robust", "hinge", "exo_pair", "discopop")  # read chosen - rejected


def f_reward(logratios: Tensor, divergence: str = "reverse_kl") -> Tensor:
    """Return the implicit reward without β under an f-divergence, arXiv 2309.16240 Table 2, (B,).

    f'(u) of u = e^logratio up to a constant, which a difference of rewards does not see:
    reverse_kl log u (DPO), forward_kl -1/u, js (Jensen-Shannon) log(2u / (1 + u)). ValueError:
    another name.
    """
    match divergence:
        case "reverse_kl":
            return logratios
        case "forward_kl":
            return -safe_exp(-logratios)
        case "js":
            return math.log(2) + F.logsigmoid(logratios)
    raise ValueError(f"unknown divergence {divergence!r}: take one of {', '.join(F_DIVERGENCES)}")


def read_mixture(loss: str, terms: list[str]) -> dict[str, float]:
    """Return {name: weight} of the losses that are added: `loss` counts 1 unless a term weighs it.

    "sigmoid", ["sigmoid:0.8", "bco_pair:0.2"] -> {"sigmoid": 0.8, "bco_pair": 0.2}
    ValueError: a term that is not NAME:WEIGHT with a loss of pairs and a weight above 0.
    """
    mixture = {loss: 1.0}
    for term in terms:
        name, _, weight = term.partition(":")
        if name == "sft":
            raise ValueError(f"--mix {term}: the NLL of the chosen answers is --sft-weight")
        if name not in DPO_LOSSES:
            raise ValueError(
                f"--mix {term}: {name} is no loss of pairs: take one of {', '.join(DPO_LOSSES)}"
            )
        try:
            mixture[name] = float(weight)
        except ValueError:
            mixture[name] = math.nan
        if not 0 < mixture[name] < math.inf:
            raise ValueError(f"--mix {term} is not NAME:WEIGHT, such as {name}:0.2")
    if len(mixture) > 1 and "simpo" in mixture:
        raise ValueError("--mix with simpo: its rewards have no reference and mix with no other")
    return mixture


def length_weights(response: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """Return LD-DPO's weight of every scored token of B pairs, arXiv 2409.06411, (M,).

    The two responses of a pair share their first min(length) tokens, which count 1; what the longer
    one has beyond them counts `alpha`. response (M,): the number of a token's response, chosen and
    rejected of each pair side by side; lengths (2B,): scored tokens of each.
    """
    whole = lengths.long()
    public = whole.view(-1, 2).amin(1).repeat_interleave(2)  # (2B,)
    starts = whole.cumsum(0) - whole  # (2B,)
    tokens = torch.arange(len(response), device=response.device)
    place = tokens - starts[response]  # (M,) in its response, from 0
    weights = torch.ones(len(response), dtype=torch.float64, device=response.device)
    return weights.masked_fill(place >= public[response], alpha)


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
    f_divergence: str = "reverse_kl",
    wpo: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute one loss of the DPO family, chosen by name.

    Return the losses (B,) and metrics under TRL's names, each detached (B,). `average_logps`
    divides every log-prob by its length first; `running_mean` is bco_pair's δ. `f_divergence`: see
    `f_reward`. `wpo` weighs each pair by the policy's mean probability of a token, of both
    responses, at most 1 and without gradient: WPO, arXiv 2406.11827, without its alignment.
    ValueError: unknown loss, or a setting that it cannot take.
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
    if f_divergence != "reverse_kl":
        if loss not in DIFFERENCE_LOSSES:
            raise ValueError(
                f"--f-divergence {f_divergence} needs a loss of a difference of rewards: "
                f"{', '.join(DIFFERENCE_LOSSES)}, not {loss}"
            )
        chosen_logratios = f_reward(chosen_logratios, f_divergence)
        rejected_logratios = f_reward(rejected_logratios, f_divergence)
    if wpo and loss in WHOLE_STEP_LOSSES:
        raise ValueError(f"--wpo weighs pairs, and --loss {loss} sorts them: take another loss")
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

    if wpo:
        certainty = pairs.chosen / len_chosen + pairs.rejected / len_rejected
        losses = losses * certainty.detach().clamp(max=0).exp()
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


def nash_md(logps: Tensor, ref_logps: Tensor, preference: Tensor, beta: float) -> Tensor:
    """Compute Nash-MD's policy gradient as a loss, (B,); arXiv 2312.00886 Sec. 7.

    -(P - 1/2 - β (log π(y) - log ref(y))) log π(y), whose factor has no gradient. logps, ref_logps:
    summed log-probs of the policy's samples y, (B,). preference: P(y ≻ y') over the mixture's
    samples y', (B,). The KL is that of whole responses, as in the paper; TRL multiplies token by
    token, which leaves out what a token does to the log-ratios of later ones.
    """
    factor = preference - 0.5 - beta * (logps - ref_logps).detach()
    return -factor * logps


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
    """Losses of all n pairs of an optimizer step, for those that sort them (WHOLE_STEP_LOSSES).

    No micro-batch can compute such a loss alone, so a first pass without gradients collects the
    log-probs of the whole step. Here they become losses and derivatives by both log-probs, (n,)
    each, in the order of `examples`. `of` picks those of a micro-batch, so that a second pass can
    backpropagate.
    """

    def __init__(self, examples: list[int], chosen: Tensor, rejected: Tensor, losses: Tensor):
        """Differentiate `losses` (n,) by the log-probs that they were computed from, (n,) each."""
        slopes = torch.autograd.grad(losses.sum(), (chosen, rejected))
        self.losses, self.slopes = losses.detach(), torch.stack(slopes, 1)  # (n,), (n, 2)
        self.row = {example: i for i, example in enumerate(examples)}

    def of(self, examples: list[int], chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the losses of some pairs, (B,), with gradients to this pass's log-probs, (B,)."""
        rows = [self.row[example] for example in examples]
        return _WithGradient.apply(self.losses[rows], self.slopes[rows], chosen, rejected)


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
    """Compute the log softmax of values (R,) within groups; group (R,) int64 from 0 to R - 1."""
    n = len(group)  # at least as many as there are groups, and the host knows it
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


# ---- online algorithms: rewards, KL, advantages -----------------------------------------------
# A scored token is one that the policy sampled; tokens that it only read (tool output) are absent.
# M scored tokens, response by response and in order; R responses; n prompts with G responses each,
# R = n G. lengths (R,): scored tokens of each response; response (M,): each token's response.
# Nothing in this part carries a gradient, but for kl_estimate as a term of the loss.

KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
ADVANTAGES = ("rloo", "grpo", "dr_grpo", "reinforce++")
SCALED_ADVANTAGES = ("grpo", "reinforce++")  # divided by a deviation, and β with it


def safe_exp(x: Tensor) -> Tensor:
    """Return e^x, bounded so that it, its slope and ordinary multiples of them are finite.

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


def gdpo(rewards: Tensor, weights: Tensor, group: int) -> Tensor:
    """Normalise several rewards one by one, GDPO, arXiv 2601.05242: (R, k) -> (R,).

    Each is normalised within its groups as in `grpo`; their weighted sum, weights (k,), is whitened
    over the WHOLE step. A reward with a large scale cannot hide another. Centred in every group, so
    that dr_grpo leaves it as it is.
    """
    columns = [grpo(column.view(-1, group)).flatten() for column in rewards.unbind(1)]
    combined = torch.stack(columns, 1) @ weights
    return whiten(combined, moments(combined))


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
    "gmpo": (0.4, 0.4),  # of the log-ratio
    "cispo": (float("inf"), 4.0),
    "sapo": (float("inf"), float("inf")),
    "kl_cov": (float("inf"), float("inf")),
    "clip_cov": (0.2, 0.2),
    "reinforce": (float("inf"), float("inf")),
}
AGGREGATES = ("token", "sequence", "sum", "constant")


def clipped_surrogate(
    ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float, dual_clip: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute PPO's clipped surrogate, arXiv 1707.06347 Eq. 7: (losses, clipped), (M,) each.

    losses = -min(ρ A, clip(ρ, 1 - low, 1 + high) A); clipped is 1 where the clip removed the
    gradient, else 0. With dual_clip c > 1 also losses <= -c A where A < 0 (arXiv 1912.09729):
    a ratio far above 1 cannot push without bound.
    """
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantage, bounded * advantage)
    with torch.no_grad():
        above = ratio > 1 + clip_high
        below = (ratio < 1 - clip_low) & (advantage < 0)
        clipped = torch.where(advantage > 0, above, below)
    if dual_clip:
        floor = (advantage < 0) & (ratio > dual_clip)
        surrogate = torch.where(floor, dual_clip * advantage, surrogate)
        clipped = clipped | floor
    return -surrogate, clipped.to(ratio.dtype)


def sapo(ratio: Tensor, advantage: Tensor, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Tensor:
    """Compute SAPO's losses, arXiv 2511.20347: -4/τ σ(τ (ρ - 1)) A, (M,).

    τ = tau_pos where A > 0, else tau_neg: a soft gate in place of the clip, whose slope is 1 at
    ρ = 1 and falls to 0 on both sides.
    """
    tau = torch.full_like(ratio, tau_neg).masked_fill(advantage > 0, tau_pos)
    return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage


def gmpo_ratio(
    log_ratio: Tensor,
    advantage: Tensor,
    response: Tensor,
    lengths: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """Compute GMPO's ratio, arXiv 2507.20673: the geometric mean of clipped ratios, (M,).

    A token's log-ratio is at most clip_high where A > 0 and at least -clip_low where A < 0: the
    pessimistic clip, in log space. Returns (ratio of its response for each token, clipped).
    """
    above = (advantage > 0) & (log_ratio > clip_high)
    below = (advantage < 0) & (log_ratio < -clip_low)
    bounded = torch.where(above, clip_high, torch.where(below, -clip_low, log_ratio))
    return sequence_ratio(bounded, response, lengths), (above | below).to(log_ratio.dtype)


def high_covariance(old_logps: Tensor, advantage: Tensor, share: float) -> Tensor:
    """Mark the share of a WHOLE step's tokens with the largest covariance, (M,) 1 or 0.

    Covariance of a token, arXiv 2505.22617: (log π - mean log π) (A - mean A). These few
    tokens make entropy collapse. At least one is marked; of equal ones the first.
    """
    covariance = (old_logps - old_logps.mean()) * (advantage - advantage.mean())
    count = min(len(covariance), max(1, round(share * len(covariance))))
    marks = torch.zeros_like(covariance)
    marks[covariance.argsort(descending=True, stable=True)[:count]] = 1
    return marks


def drawn_covariance(
    old_logps: Tensor, advantage: Tensor, share: float, low: float, high: float, seed: list[int]
) -> Tensor:
    """Mark a share of a WHOLE step's tokens, drawn from those of large covariance, (M,) 1 or 0.

    Clip-Cov, arXiv 2505.22617: as many as `share` of all tokens, at least one, drawn without
    preference among those whose covariance (see `high_covariance`) is in [low, high]; all of these
    if there are fewer. seed: of the draw, so that every rank marks the same ones.
    """
    covariance = (old_logps - old_logps.mean()) * (advantage - advantage.mean())
    candidates = ((covariance >= low) & (covariance <= high)).nonzero()[:, 0].cpu().numpy()
    count = max(1, int(share * len(covariance)))
    drawn = np.random.default_rng(seed).permutation(candidates)[:count]
    marks = torch.zeros_like(covariance)
    marks[torch.from_numpy(drawn)] = 1
    return marks


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
    dual_clip: float = 0.0,
    marked: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a policy-gradient loss by name: per-token losses (M,) and metrics, (M,) each.

    Weight the losses with `token_weights`. ρ = π / π_old is the ratio of a token.
    grpo       PPO's clipped surrogate.
    dapo       grpo with a higher upper clip, arXiv 2503.14476 Eq. 8.
    gspo       grpo with the ratio of the whole response, length-normalised, arXiv 2507.18071 Eq. 5.
    gmpo       -A times the geometric mean of the response's clipped ratios, `gmpo_ratio`.
    sapo       a soft gate in place of the clip, `sapo`.
    kl_cov     -ρ A, plus |log ρ| for the tokens of `marked`, arXiv 2505.22617.
    clip_cov   grpo without loss on the tokens of `marked`, arXiv 2505.22617.
    cispo      -sg(min(ρ, 1 + high)) A log π: every token keeps a gradient. MiniMax-M1, arXiv
               2506.13585 Eq. 4; without a lower bound, as in the paper.
    reinforce  -A log π, for one update per rollout.
    logps, old_logps, advantage, response (M,); lengths (R,). A clip of None is the paper's.
    dual_clip: of `clipped_surrogate`, for grpo and dapo. marked (M,): 1 or 0, of `high_covariance`
    or `drawn_covariance`.
    ValueError: unknown loss.
    """
    if loss not in POLICY_LOSSES:
        raise ValueError(f"unknown loss {loss!r}: choose one of {', '.join(POLICY_LOSSES)}")
    default_low, default_high = POLICY_LOSSES[loss]
    low = default_low if clip_low is None else clip_low
    high = default_high if clip_high is None else clip_high
    log_ratio = logps - old_logps
    ratio = safe_exp(log_ratio)
    clipped = torch.zeros_like(ratio)
    if loss == "gspo":
        ratio = sequence_ratio(log_ratio, response, lengths)
    if loss == "reinforce":
        losses = -advantage * logps
    elif loss == "sapo":
        losses = sapo(ratio, advantage)
    elif loss == "gmpo":
        ratio, clipped = gmpo_ratio(log_ratio, advantage, response, lengths, low, high)
        losses = -ratio * advantage
    elif loss == "kl_cov":
        losses = -ratio * advantage
        if marked is not None:
            losses = losses + marked * log_ratio.abs()
    elif loss == "cispo":
        losses = -ratio.detach().clamp(max=1 + high) * advantage * logps
        clipped = (ratio > 1 + high).to(ratio.dtype)
    else:
        losses, clipped = clipped_surrogate(ratio, advantage, low, high, dual_clip)
        if loss == "clip_cov" and marked is not None:
            losses = losses * (1 - marked)
            clipped = torch.maximum(clipped, marked.to(clipped.dtype))
    return losses, {"ratio": ratio.detach(), "clip_fraction": clipped.detach()}


def engine_weights(
    log_ratio: Tensor, lengths: Tensor, how: str, by: str = "token", cap: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Return weights that correct for a sampler that is not the policy, and which were cut, (M,).

    w = π_old / μ, where μ sampled and π_old is the policy in training's own arithmetic. Truncated
    importance sampling takes min(w, cap), which bounds the variance and leaves a bias where w is
    larger (Ionides, Journal of Computational and Graphical Statistics 17, 2008, Eq. 2); masking
    takes w where 1 / cap <= w <= cap, else 0: what is too far off teaches nothing.
    log_ratio: log π_old - log μ, (M,), 0 where μ is not known. lengths: of the responses, (R,).
    how: truncate or mask. by: "token", or "sequence" with the product over a response for each of
    its tokens, which is unbiased for the whole response. Multiply the per-token losses with it.
    """
    if by == "sequence":
        response = torch.repeat_interleave(torch.arange(len(lengths)), lengths.long())
        sums = torch.zeros(len(lengths), dtype=log_ratio.dtype)
        log_ratio = sums.index_add(0, response, log_ratio)[response]
    weights = safe_exp(log_ratio)
    if how == "truncate":
        return weights.clamp(max=cap), weights > cap
    cut = (weights > cap) | (weights < 1 / cap)
    return weights.masked_fill(cut, 0.0), cut


def token_weights(
    lengths: Tensor, step_lengths: Tensor, how: str = "token", constant: int = 1
) -> Tensor:
    """Return the weight of one token of each response in the loss, (R,).

    lengths (R,): scored tokens of the responses at hand; step_lengths: those of all responses of
    the WHOLE update, so that the loss does not depend on how it is cut into micro-batches.
    token     1 / tokens of the update (DAPO)
    sequence  1 / (responses · own length): the mean of per-response means (GRPO, GSPO)
    sum       1 / responses: the mean of per-response sums; with gspo LUSPO, arXiv 2602.05261
    constant  1 / (responses · constant), constant the longest response allowed (Dr. GRPO)
    ValueError: unknown how.
    """
    match how:
        case "token":
            return torch.ones_like(lengths) / step_lengths.sum().clamp(min=1)  # all may be masked
        case "sequence":
            return 1 / (len(step_lengths) * lengths)
        case "sum":
            return torch.ones_like(lengths) / len(step_lengths)
        case "constant":
            return torch.ones_like(lengths) / (len(step_lengths) * constant)
    raise ValueError(f"unknown aggregate {how!r}: choose one of {', '.join(AGGREGATES)}")
