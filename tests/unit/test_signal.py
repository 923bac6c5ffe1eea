"""The signal test: the mean gradient over many seeds is the exact one, for every estimator.

The policy has one parameter a token: π(y) = softmax(θ)_y over six symbols, whatever came before. A
response is two tokens, so all 36 can be enumerated, and a group of two is one of 1296. Gradients by
hand: the slope at a token times d log π(y) / dθ = onehot(y) - π.
"""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch

import losses

pytestmark = pytest.mark.slow  # together more than ten seconds

SYMBOLS, LENGTH, GROUP = 6, 2, 2
BETA = 0.3
RNG = np.random.default_rng(7)
THETA = RNG.normal(0, 0.7, SYMBOLS)
PI = np.exp(THETA) / np.exp(THETA).sum()
REF = RNG.dirichlet(np.full(SYMBOLS, 3.0))
X = np.log(PI) - np.log(REF)  # log-ratio of each symbol
RESPONSES = np.array(list(itertools.product(range(SYMBOLS), repeat=LENGTH)))  # (36, 2)
CHANCE = PI[RESPONSES].prod(1)  # (36,)
REWARD = RNG.normal(0, 1, len(RESPONSES))  # (36,) any function of the response
SCORE = np.eye(SYMBOLS) - PI  # (symbol, θ): d log π(symbol) / dθ
RESPONSE_SCORE = SCORE[RESPONSES].sum(1)  # (36, θ)
SEEDS = 20_000

KINDS = {  # the estimators, a second time
    "k1": lambda x: x,
    "k2": lambda x: x**2 / 2,
    "k3": lambda x: np.exp(-x) - 1 + x,
    "abs": np.abs,
}
EXACT_REWARD = (CHANCE * REWARD) @ RESPONSE_SCORE  # ∇ E[R]
EXACT_KL = LENGTH * (PI * X) @ SCORE  # ∇ KL(π ‖ ref) of a response
FORWARD_KL = -LENGTH * REF @ SCORE  # ∇ KL(ref ‖ π) of a response


def implemented(
    advantage: str, kind: str, place: str, drawn: np.ndarray, loss: str = "grpo"
) -> np.ndarray:
    """Return the gradient ascended by each step of one group, (steps, θ), through losses.py.

    drawn: (steps, G) numbers of responses. All groups go through one call, except for reinforce++,
    whose whitening goes over the step.
    """
    if advantage == "reinforce++" and len(drawn) > 1:
        return np.concatenate([implemented(advantage, kind, place, one[None]) for one in drawn])
    tokens = RESPONSES[drawn].reshape(-1)  # (M,)
    logps = torch.tensor(np.log(PI)[tokens], requires_grad=True)
    ref_logps = torch.tensor(np.log(REF)[tokens])
    rewards = torch.tensor(REWARD[drawn.reshape(-1)])
    lengths = torch.full((drawn.size,), LENGTH)
    kl = losses.kl_estimate(logps.detach(), ref_logps, kind)
    beta = BETA if place == "reward" else 0.0
    advantages = losses.advantages(advantage, rewards, kl, lengths, GROUP, beta)
    response = torch.repeat_interleave(torch.arange(drawn.size), lengths)
    per_token, _ = losses.policy_gradient(
        logps, logps.detach(), advantages, response, lengths, loss
    )
    if place == "loss":
        per_token = per_token + BETA * losses.kl_estimate(logps, ref_logps, kind)
    # Mean over a group's responses of the sum over tokens: each group is a step of its own.
    (per_token.sum() / GROUP).backward()
    slopes = -logps.grad.numpy().reshape(len(drawn), GROUP * LENGTH, 1)
    return (slopes * SCORE[tokens].reshape(len(drawn), GROUP * LENGTH, SYMBOLS)).sum(1)


def advantages_by_hand(name: str, kind: str, beta: float, pair: tuple[int, int]) -> list[float]:
    """Return the advantage of each of the four tokens of a group, in plain Python."""
    kl = KINDS[kind](X)
    whole = [REWARD[i] - beta * kl[RESPONSES[i]].sum() for i in pair]
    if name == "reinforce++":
        to_go = [REWARD[i] - beta * kl[RESPONSES[i][t:]].sum() for i in pair for t in range(LENGTH)]
        deviation = math.sqrt(statistics.variance(to_go) + 1e-8)
        return [(x - statistics.fmean(to_go)) / deviation for x in to_go]
    mean = statistics.fmean(whole)
    values = {
        "rloo": [whole[0] - whole[1], whole[1] - whole[0]],
        "dr_grpo": [x - mean for x in whole],
        "grpo": [(x - mean) / (statistics.stdev(whole) + 1e-4) for x in whole],
    }[name]
    return [x for x in values for _ in range(LENGTH)]


def expected(advantage: str, kind: str, place: str) -> np.ndarray:
    """Return the exact mean gradient, (θ,), by enumeration of all groups."""
    total = np.zeros(SYMBOLS)
    beta = BETA if place == "reward" else 0.0
    for pair in itertools.product(range(len(RESPONSES)), repeat=GROUP):
        chance = CHANCE[list(pair)].prod()
        tokens = RESPONSES[list(pair)].reshape(-1)
        weights = np.array(advantages_by_hand(advantage, kind, beta, pair))
        total += chance * (weights @ SCORE[tokens]) / GROUP
    if place == "loss":
        slope = {  # d k(x) / d log π
            "k2": X,
            "k3": 1 - np.exp(-X),
            "abs": np.sign(X),
        }[kind]
        total -= BETA * LENGTH * (PI * slope) @ SCORE
    return total


PLACES = [("reward", kind) for kind in KINDS] + [("loss", kind) for kind in ("k2", "k3", "abs")]


@pytest.mark.parametrize("advantage", losses.ADVANTAGES)
@pytest.mark.parametrize(("place", "kind"), PLACES)
def test_the_mean_gradient_is_the_enumerated_one(advantage: str, place: str, kind: str):
    """Within three standard errors in every direction.

    The bias, the distance from ∇ (E[R] - β KL), is printed and equals its formula.
    """
    seeds = SEEDS if advantage != "reinforce++" else 1500
    rng = np.random.default_rng(11)
    drawn = rng.choice(len(RESPONSES), (seeds, GROUP), p=CHANCE)
    gradients = implemented(advantage, kind, place, drawn)
    error = gradients.std(0, ddof=1) / math.sqrt(seeds)
    exact = expected(advantage, kind, place)
    distance = np.abs(gradients.mean(0) - exact) / error
    assert distance.max() < 3
    bias = exact - (EXACT_REWARD - BETA * EXACT_KL)
    print(f"{advantage} {kind} in the {place}: bias {np.round(bias, 4).tolist()}")
    if advantage in ("rloo", "dr_grpo"):
        scale = 1.0 if advantage == "rloo" else (GROUP - 1) / GROUP
        own = KINDS[kind](X)[RESPONSES].sum(1)  # (36,) what the reward pays for
        formula = {
            # E[k ∇ log π] by enumeration; of k1 it is ∇ KL, of k3 ∇ KL(π ‖ ref) - ∇ KL(ref ‖ π).
            "reward": scale * (EXACT_REWARD - BETA * (CHANCE * own) @ RESPONSE_SCORE),
            "loss": scale * EXACT_REWARD
            - BETA
            * {
                "k2": EXACT_KL,
                "k3": FORWARD_KL,
                "abs": LENGTH * (np.sign(X) * PI) @ SCORE,
            }.get(kind, EXACT_KL),
        }[place]
        assert exact == pytest.approx(formula, abs=1e-12)
        unbiased = advantage == "rloo" and (place, kind) in (("reward", "k1"), ("loss", "k2"))
        assert (np.abs(bias).max() < 1e-12) == unbiased


def test_what_the_estimators_differentiate_to():
    """In the reward k1 is the KL's gradient, k3 that less the forward KL's; k1 in the loss is 0."""
    in_reward = {
        kind: (CHANCE * k(X)[RESPONSES].sum(1)) @ RESPONSE_SCORE for kind, k in KINDS.items()
    }
    assert in_reward["k1"] == pytest.approx(EXACT_KL, abs=1e-12)
    assert in_reward["k3"] == pytest.approx(EXACT_KL - FORWARD_KL, abs=1e-12)
    theta = torch.tensor(THETA, requires_grad=True)
    logp, ref = theta.log_softmax(0), torch.tensor(np.log(REF))
    wanted = {
        "k1": torch.zeros(SYMBOLS, dtype=torch.float64),
        "k2": (logp.exp() * (logp - ref)).sum(),
        "k3": (ref.exp() * (ref - logp)).sum(),
        "abs": (logp.exp() - ref.exp()).abs().sum(),
    }
    for kind, value in wanted.items():
        term = (logp.detach().exp() * losses.kl_estimate(logp, ref, kind)).sum()
        (slope,) = torch.autograd.grad(term, theta, retain_graph=True)
        if kind != "k1":
            (value,) = torch.autograd.grad(value, theta, retain_graph=True)
        assert slope.tolist() == pytest.approx(value.tolist(), abs=1e-12), kind


@pytest.mark.parametrize("loss", losses.POLICY_LOSSES)
def test_every_loss_begins_with_the_same_gradient(loss: str):
    """At the first update all losses ascend the same gradient; gspo spreads it over the tokens."""
    drawn = np.random.default_rng(3).choice(len(RESPONSES), (200, GROUP), p=CHANCE)
    wanted = implemented("rloo", "k1", "reward", drawn)
    got = implemented("rloo", "k1", "reward", drawn, loss)
    assert got == pytest.approx(wanted, abs=1e-12)
