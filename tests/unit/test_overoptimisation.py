"""Estimates of bench/overoptimisation.py against enumeration, a known KL, and exact fits."""

import itertools
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import overoptimisation as over


@pytest.mark.parametrize("scores", [[0.3, -1.0, 2.0, 0.7], [1.0, 2.0, 1.0, 2.0], [5.0] * 3])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_shares_are_those_of_all_draws(scores: list[float], n: int):
    """Every way to draw n from the pool, the winner being any of the best with equal chance."""
    wanted = [0.0] * len(scores)
    draws = list(itertools.product(range(len(scores)), repeat=n))
    for draw in draws:
        best = max(scores[i] for i in draw)
        winners = [i for i in range(len(scores)) if scores[i] == best]
        for i in winners:  # ties: each sample with that score is as likely as the other
            wanted[i] += 1 / len(winners) / len(draws)
    got = over.shares(np.array(scores), n)
    assert got.tolist() == pytest.approx(wanted, abs=1e-12)
    kl = sum(p * math.log(p * len(scores)) for p in wanted if p)
    assert over.best_of_n_kl(np.array(scores), n) == pytest.approx(kl, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_the_kl_is_the_formulas_without_ties_and_less_with_them(n: int):
    """ln n - (n - 1)/n in the limit of a large pool of different scores; an upper bound else."""
    many = np.random.default_rng(0).normal(size=20000)
    assert over.best_of_n_kl(many, n) == pytest.approx(over.formula_kl(n), abs=2e-3)
    tied = over.best_of_n_kl(np.round(many), n)
    assert tied == pytest.approx(0, abs=1e-12) if n == 1 else tied < over.formula_kl(n) - 0.01


@pytest.mark.parametrize("how", ["bon", "rl"])
def test_a_fit_finds_the_curve_that_made_the_points(how: str):
    """α, β and the maximum of d (α - β d) and d (α - β ln d), arXiv 2210.10760."""
    alpha, beta = 1.3, 0.4

    def gold(d: float) -> float:
        return d * (alpha - beta * (d if how == "bon" else math.log(d)))

    points = [over.Point(d * d, gold(d), 0.0) for d in (0.3, 0.8, 1.5, 2.0, 3.0)]
    got = over.fit([over.Point(0.0, 0.0, 0.0), *points], how)
    assert got == pytest.approx((alpha, beta, 1.0), abs=1e-10)
    kl, best = over.peak(alpha, beta, how)
    grid = [i / 1000 for i in range(1, 30000)]
    assert best == pytest.approx(max(map(gold, grid)), abs=1e-5)
    assert gold(math.sqrt(kl)) == pytest.approx(best, abs=1e-12)
    assert over.peak(1.0, -0.1, how) == (math.inf, math.inf)


def test_curves_count_deviations_of_the_policy_before():
    """n = 1 is the policy: KL, gold and proxy 0. Gold falls where proxy and gold disagree."""
    rng = np.random.default_rng(1)
    proxies = [rng.normal(3.0, 2.0, 200) for _ in range(4)]
    agree = over.best_of_n_curve([(proxy, 5 * proxy - 1) for proxy in proxies])
    oppose = over.best_of_n_curve([(proxy, -proxy) for proxy in proxies])
    assert [point.n for point in agree] == list(over.NS)
    for first in (agree[0], oppose[0]):
        assert first[:3] == pytest.approx((0, 0, 0), abs=1e-9)
    for one, other in zip(agree[1:], oppose[1:]):
        assert one.gold == pytest.approx(one.proxy) and one.gold > 0
        assert other.gold == pytest.approx(-other.proxy)
    mean = over.mean_curves([agree, oppose])
    assert mean[-1].gold == pytest.approx(statistics.fmean((agree[-1].gold, oppose[-1].gold)))
