"""Advantages and policy losses of the online algorithms, against plain Python and by hand."""

import math
import statistics

import numpy as np
import pytest
import torch

import losses

LENGTHS = [3, 1, 5, 2, 4, 1]  # scored tokens of six responses, three to each of two prompts
RESPONSE = [i for i, n in enumerate(LENGTHS) for _ in range(n)]


def tensor(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def draw(seed: int, *shape: int, scale: float = 1.0) -> list:
    return np.random.default_rng(seed).normal(0, scale, shape).tolist()


def close(got: torch.Tensor, wanted: list, near: float = 1e-12) -> None:
    assert got.tolist() == pytest.approx(wanted, abs=near, rel=0)


def parts(values: list) -> list[list]:
    """Split values of flat tokens into a list per response."""
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    return [values[start : start + n] for start, n in zip(starts, LENGTHS)]


# ---- rewards, KL, advantages -----------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_gae_is_the_sum_over_all_later_errors(gamma: float, lam: float):
    """A_t = Σ_k (γλ)^k δ_{t+k}: Eq. 16, the definition; nothing crosses into a neighbour."""
    rewards, values = draw(0, sum(LENGTHS)), draw(1, sum(LENGTHS))
    wanted = []
    for r, v in zip(parts(rewards), parts(values)):
        delta = [r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(r))]
        wanted += [
            sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(r))
        ]
    advantages, returns = losses.gae(
        tensor(rewards), tensor(values), torch.tensor(LENGTHS), gamma, lam
    )
    close(advantages, wanted)
    close(returns, [a + v for a, v in zip(wanted, values)])


def test_gae_by_hand():
    """Rewards 0, 0, 1 and values 0.5, 0.4, 0.8, then a response of one token; several γ and λ."""
    rewards, values = tensor([0, 0, 1, 2]), tensor([0.5, 0.4, 0.8, 0.5])
    lengths = tensor([3.0, 1.0])
    close(losses.gae(rewards, values, lengths, 1.0, 0.0)[0], [-0.1, 0.4, 0.2, 1.5])
    close(losses.gae(rewards, values, lengths, 1.0, 1.0)[0], [0.5, 0.6, 0.2, 1.5])
    # 0.2; 0.4 + 0.95 · 0.2 = 0.59; -0.1 + 0.95 · 0.59 = 0.4605
    close(losses.gae(rewards, values, lengths, 1.0, 0.95)[0], [0.4605, 0.59, 0.2, 1.5])
    # γ = 0.5: errors 0 + 0.2 - 0.5, 0.4 - 0.4, 1 - 0.8
    close(losses.gae(rewards, values, lengths, 0.5, 0.0)[0], [-0.3, 0.0, 0.2, 1.5])


def test_kl_estimators_by_hand_and_in_expectation():
    """Over a whole distribution k1 and k3 average to the KL, and k2 has its gradient."""
    at = {
        kind: losses.kl_estimate(tensor([-1.0]), tensor([-1.5]), kind).item()
        for kind in losses.KL_ESTIMATORS
    }
    assert at == pytest.approx(
        {"k1": 0.5, "k2": 0.125, "k3": math.exp(-0.5) - 0.5, "abs": 0.5}, abs=1e-12
    )
    below = tensor([-1.5]), tensor([-1.0])
    assert losses.kl_estimate(*below, "abs").item() == 0.5
    assert losses.kl_estimate(*below, "k1").item() == -0.5
    logits = tensor(draw(2, 7)).requires_grad_()
    ref = tensor(draw(3, 7)).log_softmax(0)
    logp = logits.log_softmax(0)
    kl = (logp.exp() * (logp - ref)).sum()
    p = logp.detach().exp()
    for kind in ("k1", "k3"):
        assert (p * losses.kl_estimate(logp, ref, kind)).sum().item() == pytest.approx(
            kl.item(), abs=1e-12
        )
    (true_slope,) = torch.autograd.grad(kl, logits, retain_graph=True)
    for kind, wanted in (("k2", true_slope), ("k1", torch.zeros(7))):
        (slope,) = torch.autograd.grad(
            (p * losses.kl_estimate(logp, ref, kind)).sum(), logits, retain_graph=True
        )
        close(slope, wanted.tolist())
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'"):
        losses.kl_estimate(logp, ref, "k4")


def test_token_rewards_put_the_reward_at_the_last_token():
    """-β kl everywhere, and the reward where each response ends."""
    kl = draw(4, sum(LENGTHS))
    rewards = draw(5, len(LENGTHS))
    wanted = [[-0.3 * k for k in part] for part in parts(kl)]
    for part, reward in zip(wanted, rewards):
        part[-1] += reward
    close(
        losses.token_rewards(tensor(rewards), tensor(kl), torch.tensor(LENGTHS), 0.3),
        sum(wanted, []),
    )


def test_whitening_over_parts_is_whitening_of_the_whole():
    """Moments of three parts add up to those of the whole: mean 0 and sample deviation 1."""
    x = draw(6, 40, scale=3.0)
    mean, deviation = statistics.fmean(x), math.sqrt(statistics.variance(x) + 1e-8)
    totals = sum(losses.moments(tensor(x[a:b])) for a, b in ((0, 1), (1, 25), (25, 40)))
    close(losses.whiten(tensor(x), totals), [(v - mean) / deviation for v in x])
    close(
        losses.whiten(tensor([2.0]), losses.moments(tensor([2.0]))), [0.0]
    )  # one value: no deviation, no NaN


def test_group_baselines():
    """rloo, dr_grpo and grpo in plain numbers, and by hand; a group of equal rewards gets 0."""
    rewards = draw(7, 5, 4)
    mean = statistics.fmean
    wanted = {
        "rloo": [[r - mean(g[:i] + g[i + 1 :]) for i, r in enumerate(g)] for g in rewards],
        "dr_grpo": [[r - mean(g) for r in g] for g in rewards],
        "grpo": [[(r - mean(g)) / (statistics.stdev(g) + 1e-4) for r in g] for g in rewards],
    }
    for name, values in wanted.items():
        baseline = getattr(losses, name)
        close(baseline(tensor(rewards)).flatten(), sum(values, []))
        assert baseline(torch.full((2, 3), 0.7, dtype=torch.float64)).abs().max() <= 1e-9
    close(losses.rloo(tensor([[1.0, 2.0, 6.0]]))[0], [-3.0, -1.5, 4.5])
    close(losses.dr_grpo(tensor([[1.0, 2.0, 6.0]]))[0], [-2.0, -1.0, 3.0])
    close(
        losses.grpo(tensor([[0.0, 0.0, 3.0]]))[0],
        [-1 / (math.sqrt(3) + 1e-4)] * 2 + [2 / (math.sqrt(3) + 1e-4)],
    )


@pytest.mark.parametrize("name", losses.ADVANTAGES)
def test_advantages_of_a_step_with_a_penalty_in_the_reward(name: str):
    """Group baselines of reward - β Σ kl; reinforce++ whitens the reward to go over all tokens."""
    rewards, kl, beta = draw(8, len(LENGTHS)), draw(9, sum(LENGTHS)), 0.4
    whole = [r - beta * sum(part) for r, part in zip(rewards, parts(kl))]
    groups = [whole[:3], whole[3:]]
    mean = statistics.fmean
    match name:
        case "reinforce++":
            to_go = [
                r - beta * sum(part[t:])
                for r, part in zip(rewards, parts(kl))
                for t in range(len(part))
            ]
            deviation = math.sqrt(statistics.variance(to_go) + 1e-8)
            wanted = [(x - mean(to_go)) / deviation for x in to_go]
        case "rloo":
            per = [x - mean(g[:i] + g[i + 1 :]) for g in groups for i, x in enumerate(g)]
            wanted = [per[i] for i in RESPONSE]
        case _:
            scale = [statistics.stdev(g) + 1e-4 if name == "grpo" else 1.0 for g in groups]
            per = [(x - mean(g)) / s for g, s in zip(groups, scale) for x in g]
            wanted = [per[i] for i in RESPONSE]
    close(
        losses.advantages(name, tensor(rewards), tensor(kl), torch.tensor(LENGTHS), 3, beta), wanted
    )


def test_impossible_settings_are_refused():
    """A group of one has nothing to compare with, unless the baseline is the whole step's."""
    flat, lengths = tensor(draw(0, sum(LENGTHS))), torch.tensor(LENGTHS)
    rewards = tensor(draw(1, len(LENGTHS)))
    for name in ("rloo", "grpo", "dr_grpo"):
        with pytest.raises(ValueError, match="group of 2 or more"):
            losses.advantages(name, rewards, flat, lengths, 1)
    assert losses.advantages("reinforce++", rewards, flat, lengths, 1).isfinite().all()
    with pytest.raises(ValueError, match="unknown advantage"):
        losses.advantages("gae", rewards, flat, lengths, 3)
    with pytest.raises(ValueError, match="unknown loss"):
        losses.policy_gradient(flat, flat, flat, torch.tensor(RESPONSE), lengths, "ppo")
    with pytest.raises(ValueError, match="unknown aggregate"):
        losses.token_weights(lengths, lengths, "batch")


# ---- policy and value losses -----------------------------------------------------------------


def plain_gmpo(logps, old, advantage, low, high) -> tuple[list, list, list]:
    """GMPO, arXiv 2507.20673: -A (Π min(ρ^sgn, clip(ρ^sgn))^(1/n))^sgn, sgn the advantage's sign.

    As in the authors' listing: the minimum is taken of sgn log ρ, which is then turned back.
    """
    values, slopes, clipped = [], [], []
    for new, before, adv in zip(parts(logps), parts(old), parts(advantage)):
        bounded, stopped = [], []
        for a, b, c in zip(new, before, adv):
            sign = 1.0 if c > 0 else -1.0
            bound = high if sign > 0 else low
            signed = sign * (a - b)
            stopped.append(float(signed > bound) if sign > 0 else float(a - b < -low))
            bounded.append(sign * min(signed, bound))
        ratio = math.exp(statistics.fmean(bounded))
        pull = sum(adv) * ratio / len(adv)  # every token moves the ratio that all of them share
        values += [-c * ratio for c in adv]
        slopes += [0.0 if stop else -pull for stop in stopped]
        clipped += stopped
    return values, slopes, clipped


def plain_policy_loss(
    loss: str, logps, old, advantage, low, high
) -> tuple[list[float], list[float], list[float]]:
    """Return (losses, d Σ losses / d logps, clipped) of each token; derivatives by hand."""
    values, slopes, clipped = [], [], []
    ratios = [math.exp(a - b) for a, b in zip(logps, old)]
    if loss == "gspo":
        means = [
            statistics.fmean(a - b for a, b in zip(*pair)) for pair in zip(parts(logps), parts(old))
        ]
        ratios = [math.exp(means[i]) for i in RESPONSE]
    if loss == "gmpo":
        return plain_gmpo(logps, old, advantage, low, high)
    for rho, lp, a in zip(ratios, logps, advantage):
        if loss == "reinforce":
            values.append(-a * lp)
            slopes.append(-a)
            clipped.append(0.0)
        elif loss == "sapo":
            tau = 1.0 if a > 0 else 1.05
            gate = 1 / (1 + math.exp(-tau * (rho - 1)))
            values.append(-4 / tau * gate * a)
            slopes.append(-4 * gate * (1 - gate) * rho * a)
            clipped.append(0.0)
        elif loss == "kl_cov":  # without marks: no bound
            values.append(-rho * a)
            slopes.append(-rho * a)
            clipped.append(0.0)
        elif loss == "cispo":
            weight = min(rho, 1 + high)
            values.append(-weight * a * lp)
            slopes.append(-weight * a)
            clipped.append(float(rho > 1 + high))
        else:
            stopped = rho > 1 + high if a > 0 else rho < 1 - low
            bound = min(max(rho, 1 - low), 1 + high)
            values.append(-min(rho * a, bound * a))
            slopes.append(0.0 if stopped else -rho * a)
            clipped.append(float(stopped))
    if loss == "gspo":  # every token of a response moves the ratio that all of them share
        slopes = [statistics.fmean(part) for part in parts(slopes)]
        slopes = [slopes[i] for i in RESPONSE]
    return values, slopes, clipped


@pytest.mark.parametrize("loss", losses.POLICY_LOSSES)
@pytest.mark.parametrize("clips", [(None, None), (0.1, 0.3)])
def test_policy_losses_and_slopes_in_plain_numbers(loss: str, clips: tuple):
    """Values, derivatives and clip fractions, with ratios on both sides of every bound."""
    scale = {"cispo": 1.5}.get(loss, 0.5)  # of the log-ratios, to reach past the clips
    if loss == "gspo" and clips[0] is None:
        scale = 0.001
    logps, advantage = draw(10, sum(LENGTHS)), draw(11, sum(LENGTHS))
    if loss in ("gspo", "gmpo"):
        advantage = [advantage[i] for i in RESPONSE]
    old = [a - b for a, b in zip(logps, draw(12, sum(LENGTHS), scale=scale))]
    low, high = (
        own if given is None else given for own, given in zip(losses.POLICY_LOSSES[loss], clips)
    )
    wanted, slopes, clipped = plain_policy_loss(loss, logps, old, advantage, low, high)
    assert loss in ("reinforce", "sapo", "kl_cov") or 0 < sum(clipped) < len(clipped)
    new = tensor(logps).requires_grad_()
    got, metrics = losses.policy_gradient(
        new,
        tensor(old),
        tensor(advantage),
        torch.tensor(RESPONSE),
        torch.tensor(LENGTHS),
        loss,
        *clips,
    )
    close(got, wanted)
    close(metrics["clip_fraction"], clipped)
    close(torch.autograd.grad(got.sum(), new)[0], slopes)
    assert not metrics["ratio"].requires_grad


@pytest.mark.parametrize("loss", losses.POLICY_LOSSES)
def test_before_the_first_update_every_loss_has_the_policy_gradient(loss: str):
    """π = π_old: the ratio is 1, nothing is clipped, and the derivative is -A."""
    new, advantage = tensor(draw(13, sum(LENGTHS))).requires_grad_(), draw(14, len(LENGTHS))
    at = tensor([advantage[i] for i in RESPONSE])
    got, metrics = losses.policy_gradient(
        new, new.detach(), at, torch.tensor(RESPONSE), torch.tensor(LENGTHS), loss
    )
    assert (metrics["ratio"] == 1).all() and (metrics["clip_fraction"] == 0).all()
    close(torch.autograd.grad(got.sum(), new)[0], (-at).tolist())


def test_the_surrogate_and_the_value_loss_by_hand():
    """PPO's four corners at ε = 0.2, and a value that moved further than its clip allows."""
    ratio = tensor([1.5, 1.5, 0.5, 0.5, 1.1, 0.5])
    advantage = tensor([1.0, -1.0, 1.0, -1.0, 2.0, 0.0])
    surrogate, clipped = losses.clipped_surrogate(ratio, advantage, 0.2, 0.2)
    close(surrogate, [-1.2, 1.5, -0.5, 0.8, -2.2, 0.0])
    close(clipped, [1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    # V = 1, V_old = 0, R = 0: the clipped value 0.2 has the smaller error, so ½ · 1² counts.
    # V = 0, V_old = -1, R = 1: the clipped value -0.8 has the larger error, ½ · 1.8².
    # V = 0.1, V_old = 0, R = 0.6: within the clip both are ½ · 0.5².
    values, old_values = tensor([1.0, 0.0, 0.1]), tensor([0.0, -1.0, 0.0])
    loss, clipped = losses.clipped_value(values, old_values, tensor([0.0, 1.0, 0.6]), 0.2)
    close(loss, [0.5, 1.62, 0.125])
    close(clipped, [0.0, 1.0, 0.0])


def test_a_dual_clip_bounds_what_a_bad_token_can_push():
    """A < 0: the loss is at most -c A, without gradient above; A > 0 and small ratios as before."""
    ratios, advantages = [1.5, 2.9, 3.1, 50.0, 3.1, 0.5], [-1.0, -2.0, -2.0, -0.5, 1.0, -1.0]
    wanted = [1.5, 5.8, 6.0, 1.5, -1.2, 0.8]
    zero = torch.zeros(6, dtype=torch.float64)
    new = tensor([math.log(r) for r in ratios]).requires_grad_()
    args = (zero, tensor(advantages), torch.arange(6), torch.ones(6))
    got, metrics = losses.policy_gradient(new, *args, "grpo", dual_clip=3.0)
    close(got, wanted)
    close(metrics["clip_fraction"], [0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    (slope,) = torch.autograd.grad(got.sum(), new)
    close(slope, [1.5, 5.8, 0.0, 0.0, 0.0, 0.0])


def test_luspo_is_gspo_summed_over_tokens():
    """LUSPO, arXiv 2602.05261: mean over responses of length times the sequence's clipped term."""
    logps, old = draw(20, sum(LENGTHS)), draw(21, sum(LENGTHS))
    advantage = draw(22, len(LENGTHS))
    wanted = []
    for new, before, a in zip(parts(logps), parts(old), advantage):
        s = math.exp(statistics.fmean(x - y for x, y in zip(new, before)))
        wanted.append(-len(new) * min(s * a, min(max(s, 0.9), 1.2) * a))
    response, lengths = torch.tensor(RESPONSE), tensor(LENGTHS)
    each = tensor([advantage[i] for i in RESPONSE])
    args = (tensor(logps), tensor(old), each, response, lengths, "gspo", 0.1, 0.2)
    weights = losses.token_weights(lengths, lengths, "sum")
    got = (losses.policy_gradient(*args)[0] * weights[response]).sum().item()
    assert got == pytest.approx(statistics.fmean(wanted), abs=1e-12)


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 1.0])
def test_kl_cov_penalises_the_tokens_of_the_largest_covariance(share: float):
    """arXiv 2505.22617: top share of (log π - mean)(A - mean); they pay |log ρ|, others nothing."""
    old, advantage = draw(23, sum(LENGTHS)), draw(24, sum(LENGTHS))
    means = statistics.fmean(old), statistics.fmean(advantage)
    covariance = [(x - means[0]) * (a - means[1]) for x, a in zip(old, advantage)]
    n = max(1, round(share * len(old)))
    chosen = sorted(range(len(old)), key=lambda i: -covariance[i])[:n]
    marks = losses.high_covariance(tensor(old), tensor(advantage), share)
    assert marks.nonzero().flatten().tolist() == sorted(chosen)
    logps = [x + d for x, d in zip(old, draw(25, len(old)))]
    wanted = [
        -math.exp(x - y) * a + (abs(x - y) if i in chosen else 0.0)
        for i, (x, y, a) in enumerate(zip(logps, old, advantage))
    ]
    args = (tensor(logps), tensor(old), tensor(advantage), torch.tensor(RESPONSE), tensor(LENGTHS))
    close(losses.policy_gradient(*args, "kl_cov", marked=marks)[0], wanted)


@pytest.mark.parametrize(("share", "n"), [(0.001, 1), (0.26, 4), (1.0, None)])
def test_clip_cov_leaves_out_drawn_tokens_of_large_covariance(share: float, n: int | None):
    """arXiv 2505.22617: r · N tokens, at least 1, of those with covariance in [low, high]."""
    old, advantage = draw(23, sum(LENGTHS)), draw(24, sum(LENGTHS))
    means = statistics.fmean(old), statistics.fmean(advantage)
    covariance = [(x - means[0]) * (a - means[1]) for x, a in zip(old, advantage)]
    low, high = sorted(covariance)[4], sorted(covariance)[-3]
    inside = {i for i, c in enumerate(covariance) if low <= c <= high}

    def drawn(seed: int) -> list[int]:
        marks = losses.drawn_covariance(
            tensor(old), tensor(advantage), share, low - 1e-12, high + 1e-12, [seed, 1]
        )
        assert set(marks.tolist()) <= {0.0, 1.0}
        return marks.nonzero().flatten().tolist()

    first = drawn(0)
    assert set(first) <= inside and len(first) == (n or len(inside)) and first == drawn(0)
    assert n is None or any(drawn(seed) != first for seed in range(1, 9))  # drawn, not the top
    none = losses.drawn_covariance(tensor(old), tensor(advantage), share, 1e3, 1e4, [0, 1])
    assert not none.any()

    logps = [x + d for x, d in zip(old, draw(25, len(old)))]
    marks = tensor([float(i in first) for i in range(len(old))])
    values, slopes, clipped = plain_policy_loss("grpo", logps, old, advantage, 0.2, 0.2)
    new = tensor(logps).requires_grad_()
    args = (tensor(old), tensor(advantage), torch.tensor(RESPONSE), tensor(LENGTHS))
    got, metrics = losses.policy_gradient(new, *args, "clip_cov", marked=marks)
    close(got, [0.0 if i in first else v for i, v in enumerate(values)])
    (grad,) = torch.autograd.grad(got.sum(), new)
    close(grad, [0.0 if i in first else v for i, v in enumerate(slopes)])
    close(metrics["clip_fraction"], [max(c, float(i in first)) for i, c in enumerate(clipped)])


@pytest.mark.parametrize("how", losses.AGGREGATES)
def test_aggregation_of_a_step_does_not_depend_on_its_parts(how: str):
    """Mean over tokens, mean of means, sum over a constant; whole or in two micro-batches."""
    values = draw(15, sum(LENGTHS))
    n, tokens = len(LENGTHS), sum(LENGTHS)
    wanted = {
        "token": sum(values) / tokens,
        "sequence": statistics.fmean(statistics.fmean(part) for part in parts(values)),
        "sum": statistics.fmean(sum(part) for part in parts(values)),
        "constant": sum(values) / (n * 50),
    }[how]
    step = tensor(LENGTHS)
    for cut in (0, 2, 6):
        total = 0.0
        for rows in (range(cut), range(cut, n)):
            weights = losses.token_weights(step[list(rows)], step, how, 50)
            total += sum(w.item() * sum(parts(values)[i]) for w, i in zip(weights, rows))
        assert total == pytest.approx(wanted, abs=1e-12)


# ---- exact zeros, large offsets, extreme ratios ----------------------------------------------


@pytest.mark.parametrize("reward", [0.7, 0.1, 1e8 + 0.3, -1 / 3])
@pytest.mark.parametrize("name", losses.ADVANTAGES)
def test_equal_rewards_have_advantages_of_exactly_zero(name: str, reward: float):
    """Not 1e-17, which Adam would scale to a whole step."""
    rewards = torch.full((len(LENGTHS),), reward, dtype=torch.float64)
    kl = torch.zeros(sum(LENGTHS), dtype=torch.float64)
    got = losses.advantages(name, rewards, kl, torch.tensor(LENGTHS), 3, 0.1)
    assert (got == 0).all()


def test_whitening_is_exact_at_large_offsets():
    """An offset of 1e8 changes nothing, in one part or in three; equal values give exactly 0."""
    x = tensor([float(v) for v in np.random.default_rng(1).integers(-4, 5, 40)])
    wanted = losses.whiten(x, losses.moments(x))
    far = x + 1e8
    parts = sum(losses.moments(far[a:b]) for a, b in ((0, 1), (1, 25), (25, 40)))
    for totals in (losses.moments(far), parts):
        close(losses.whiten(far, totals), wanted.tolist(), near=1e-6)
    equal = torch.full((7,), 0.1, dtype=torch.float64)
    assert (losses.whiten(equal, losses.moments(equal)) == 0).all()
    assert (losses.whiten(equal, sum(map(losses.moments, equal.split(3)))) == 0).all()


@pytest.mark.parametrize("loss", losses.POLICY_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_ratio", [99.0, 800.0, -99.0, -800.0])
def test_extreme_ratios_have_finite_losses_and_slopes(
    loss: str, dtype: torch.dtype, log_ratio: float
):
    """A clipped gradient is 0 and not 0 · inf; advantages of 0 are harmless."""
    old = torch.zeros(3, dtype=dtype)
    new = torch.full((3,), log_ratio, dtype=dtype, requires_grad=True)
    advantage = torch.tensor([2.0, 0.0, 1.0], dtype=dtype)
    if log_ratio < 0:
        advantage = -advantage
    args = (old, advantage, torch.arange(3), torch.ones(3), loss)
    values, metrics = losses.policy_gradient(new, *args)
    (slope,) = torch.autograd.grad(values.sum(), new)
    assert values.isfinite().all() and slope.isfinite().all()
    assert all(value.isfinite().all() for value in metrics.values())
    assert slope[1] == 0
    if loss in ("grpo", "dapo", "gspo"):
        assert (slope == 0).all()


@pytest.mark.parametrize("kind", losses.KL_ESTIMATORS)
@pytest.mark.parametrize("x", [99.0, -99.0])
def test_extreme_log_ratios_have_finite_kl_estimates(kind: str, x: float):
    """In fp32 as well, value and slope."""
    logp = torch.tensor([x], requires_grad=True)
    value = losses.kl_estimate(logp, torch.zeros(1), kind)
    (slope,) = torch.autograd.grad(value.sum(), logp)
    assert value.isfinite().all() and slope.isfinite().all()


def test_the_bound_of_the_ratio_changes_no_ordinary_number():
    """Below the bound it is exp to the bit; above it the slope is as large as the value."""
    for dtype, limit in ((torch.float32, 79.0), (torch.float64, 638.0)):
        x = torch.linspace(-limit, limit, 101, dtype=dtype)
        assert (losses.safe_exp(x) == x.exp()).all()
        far = torch.tensor([2 * limit], dtype=dtype, requires_grad=True)
        value = losses.safe_exp(far)
        (slope,) = torch.autograd.grad(value.sum(), far)
        assert slope == value > torch.tensor(limit, dtype=dtype).exp() / 2


@pytest.mark.parametrize("by", ["token", "sequence"])
@pytest.mark.parametrize("how", ["truncate", "mask"])
def test_weights_of_an_engine_by_hand(how: str, by: str):
    """π / μ of a token or of a response, cut at the cap, or 0 beyond the cap and its inverse."""
    log_ratio = [0.1, -0.2, 0.9, 0.0, -1.2, 0.3, 0.4]
    lengths, cap = [3, 1, 3], 1.8
    wanted, cut = [], []
    at = 0
    for n in lengths:
        own = log_ratio[at : at + n]
        for value in own:
            w = math.exp(sum(own) if by == "sequence" else value)
            beyond = w > cap or (how == "mask" and w < 1 / cap)
            if beyond:
                w = cap if how == "truncate" else 0.0
            wanted.append(w)
            cut.append(beyond)
        at += n
    weights, beyond = losses.engine_weights(
        torch.tensor(log_ratio, dtype=torch.float64), torch.tensor(lengths), how, by, cap
    )
    assert weights.tolist() == pytest.approx(wanted, abs=1e-12) and any(cut) and not all(cut)
    assert beyond.tolist() == cut


def test_corrected_samples_of_another_policy_are_unbiased():
    """Exactly: Σ over tokens of μ w f = Σ π f where no weight is cut; without weights it is not."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    policy, engine = logits[0].log_softmax(-1), (logits[0] / 1.3).log_softmax(-1)
    values = torch.randn(7, generator=generator, dtype=torch.float64)
    weights, _ = losses.engine_weights(policy - engine, torch.ones(7), "truncate", cap=50.0)
    right = (policy.exp() * values).sum().item()
    assert (engine.exp() * weights * values).sum().item() == pytest.approx(right, abs=1e-12)
    assert (engine.exp() * values).sum().item() != pytest.approx(right, abs=1e-2)
