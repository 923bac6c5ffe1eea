"""Measure over-optimisation on the toy world, after Gao et al., arXiv 2210.10760.

    python bench/overoptimisation.py --out runs/over       three sizes of reward model: minutes
    python bench/overoptimisation.py --out runs/over --seeds 3

A policy is optimised against a learned reward, the proxy; the toy world's scorer tells the true
quality, the gold reward. For reward models of three sizes, all trained on the same noisy pairs:

    best of n    the policy answers each prompt --pool times; the estimates for every n are unbiased
    REINFORCE    against the proxy without a KL penalty; samples and KL are those of the run's log

KL is in nats per response, from the policy before; d = √KL. Gold and proxy count deviations of the
policy's own answers from their mean. The fits are the paper's: best of n d (α - β d), REINFORCE
d (α - β ln d). docs/overoptimisation.md reads the result.
"""

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before the folder of this file

from safetensors import safe_open

from data.toy.scoring import score
from disk import lines_of, write_text
from stages import Stage, run_stages

SIZES = {  # name of a reward model: flags of its random start; the last is the policy's size
    "small": "--width 16 --layers 1 --heads 2 --kv-heads 1 --ffn 48",
    "medium": "--width 32 --layers 2 --heads 2 --kv-heads 1 --ffn 96",
    "large": "--width 96 --layers 2 --heads 4 --kv-heads 2 --ffn 256",
}
POLICY = "large"
WORLD = "--base 8000 --sft 3000 --preferences 2000 --labels 1 --attributes 1 --attributes-test 1"
SCRATCH = "--lr 2e-3 --batch-size 8 --warmup 0.05 --weight-decay 0.05"
RL = "--batch-size 8 --group-size 8 --max-new-tokens 64 --schedule constant --kl 0 --log-samples 1"
NS = (1, 2, 4, 8, 16, 32, 64)
STEPS = 10  # of REINFORCE in a point of its curve
COLOURS = {"small": "tab:red", "medium": "tab:orange", "large": "tab:blue"}


class Point(NamedTuple):
    """A point of a curve; rewards in deviations of the policy before."""

    kl: float  # nats per response
    gold: float
    proxy: float
    n: int = 0  # of best of n


# ---- estimates -----------------------------------------------------------------------------------


def shares(scores: np.ndarray, n: int) -> np.ndarray:
    """Return the chance of every sample of a pool to be the best of n, (N,), summing to 1.

    n samples are drawn from the pool with replacement; equal scores share their chance. With F the
    pool's distribution of scores, that of a score s is F(s)^n - F(s-)^n.
    """
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    upto = np.cumsum(counts) / len(scores)  # F at each distinct score
    below = upto - counts / len(scores)
    return ((upto**n - below**n) / counts)[place]


def best_of_n_kl(scores: np.ndarray, n: int) -> float:
    """Return KL(best of n ‖ policy) in nats for a pool of scores, (N,).

    ln n - (n - 1) / n for scores that all differ, in a pool much larger than n; less where samples
    tie, as best of n cannot tell them apart (arXiv 2401.01879).
    """
    chance = shares(scores, n)
    chance = chance[chance > 0]
    return float((chance * np.log(chance * len(scores))).sum())


def formula_kl(n: int) -> float:
    """Return ln n - (n - 1) / n, the KL of best of n in the literature."""
    return math.log(n) - (n - 1) / n


def fit(points: Iterable[Point], how: str) -> tuple[float, float, float]:
    """Return (α, β, R²) of the gold rewards over d = √KL, by least squares.

    how: "bon" d (α - β d), "rl" d (α - β ln d). Points with a KL of 0 or less say nothing.
    """
    used = [point for point in points if point.kl > 0]
    d = np.sqrt([point.kl for point in used])
    gold = np.array([point.gold for point in used])
    slope = d if how == "bon" else np.log(d)
    columns = np.stack([d, -d * slope], 1)
    (alpha, beta), *_ = np.linalg.lstsq(columns, gold, rcond=None)
    rest = gold - columns @ [alpha, beta]
    spread = ((gold - gold.mean()) ** 2).sum()
    return float(alpha), float(beta), float(1 - (rest**2).sum() / spread) if spread else math.nan


def peak(alpha: float, beta: float, how: str) -> tuple[float, float]:
    """Return (KL, gold) of a fit's maximum; infinite KL if it never falls."""
    if beta <= 0:
        return math.inf, math.inf
    d = alpha / (2 * beta) if how == "bon" else math.exp(alpha / beta - 1)
    gold = d * (alpha - beta * (d if how == "bon" else math.log(d)))
    return d * d, gold


# ---- the runs ------------------------------------------------------------------------------------


def plan(out: Path, seed: int, flags: argparse.Namespace) -> list[Stage]:
    """Return the stages of one seed; every command is one that a user could type."""
    world, pool = out / "world", out / "pool.jsonl"
    policy = out / "sft/final"
    make = f"-m data.toyworld make --out {world} --seed {seed} {WORLD}"
    stages = [Stage(f"{seed} world", "", [make], out / "world.log")]

    def base(size: str) -> list[str]:
        return [
            f"hf.py new --out {out}/new_{size} --family llama {SIZES[size]} --std 0.1 --tokenizer "
            f"{world}/tokenizer --seed {seed}",
            f"train_sft.py --model {out}/new_{size} --data {world}/base.jsonl --out "
            f"{out}/base_{size} --template plain {SCRATCH} --seed {seed}",
        ]

    sft = base(POLICY)
    sft += [
        f"train_sft.py --model {out}/base_{POLICY}/final --data {world}/sft.jsonl --out {out}/sft "
        f"{SCRATCH} --seed {seed}",
        f"generate.py --model {policy} --data {world}/sft.jsonl --out {pool} --limit "
        f"{flags.prompts} --n {flags.pool} --temperature 1 --max-new-tokens 64 --batch-size 256 "
        f"--seed {seed}",
    ]
    stages.append(Stage(f"{seed} policy", f"{seed} world", sft, out / "policy.log"))
    for size in SIZES:
        start = [] if size == POLICY else base(size)
        lines = [
            *start,
            f"train_rm.py --model {out}/base_{size}/final --data {world}/preferences.jsonl "
            f"--eval-data {world}/preferences_test.jsonl --out {out}/rm_{size} --lr 1e-3 "
            f"--batch-size 8 --epochs 2 --warmup 0.05 --weight-decay 0.01 --seed {seed}",
            f"score.py --model {out}/rm_{size}/final --data {pool} --out {out}/pool_{size}.jsonl",
            f"train_reinforce.py --model {policy} --ref {policy} --data {world}/sft.jsonl --reward "
            f"{out}/rm_{size}/final --out {out}/rl_{size} {RL} --lr {flags.lr} --max-steps "
            f"{flags.steps} --epochs 9 --seed {seed}",
        ]
        stages.append(Stage(f"{seed} {size}", f"{seed} policy", lines, out / f"{size}.log"))
    return stages


def read_rows(file: Path) -> list[dict]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in lines_of(file.read_text(encoding="utf-8"))]


def read_pool(file: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (proxy, gold) scores of the responses to each prompt of a scored file, (N,) each."""
    groups = []
    for row in read_rows(file):
        gold = [score(row["prompt"], text).utility for text in row["responses"]]
        groups.append((np.array(row["scores"]), np.array(gold)))
    return groups


def scales(groups: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[float, float]]:
    """Return (mean, deviation) of proxy and of gold over all responses of the policy before."""
    both = [np.concatenate([group[k] for group in groups]) for k in (0, 1)]
    return [(float(values.mean()), float(values.std())) for values in both]


def best_of_n_curve(groups: list[tuple[np.ndarray, np.ndarray]]) -> list[Point]:
    """Return a point for every n of NS, means over the prompts."""
    (proxy_mean, proxy_std), (gold_mean, gold_std) = scales(groups)
    points = []
    for n in NS:
        chances = [shares(proxy, n) for proxy, _ in groups]
        kl = statistics.fmean(best_of_n_kl(proxy, n) for proxy, _ in groups)
        proxy = statistics.fmean(float(c @ group[0]) for c, group in zip(chances, groups))
        gold = statistics.fmean(float(c @ group[1]) for c, group in zip(chances, groups))
        points.append(Point(kl, (gold - gold_mean) / gold_std, (proxy - proxy_mean) / proxy_std, n))
    return points


def rl_curve(folder: Path, groups: list[tuple[np.ndarray, np.ndarray]]) -> list[Point]:
    """Return a point for every STEPS steps of a run: its KL, and gold and proxy of its samples."""
    (proxy_mean, proxy_std), (gold_mean, gold_std) = scales(groups)
    kls = defaultdict(list)
    for row in read_rows(folder / "metrics.jsonl"):
        if "kl" in row:
            kls[(row["step"] - 1) // STEPS].append(row["kl"])
    samples = defaultdict(list)
    for row in read_rows(folder / "samples.jsonl"):
        gold = score(row["prompt"], row["response"].strip()).utility
        samples[(row["step"] - 1) // STEPS].append((row["reward"], gold))
    points = []
    for part, values in sorted(samples.items()):
        proxy, gold = (statistics.fmean(column) for column in zip(*values))
        points.append(
            Point(
                statistics.fmean(kls[part]),
                (gold - gold_mean) / gold_std,
                (proxy - proxy_mean) / proxy_std,
            )
        )
    return points


def mean_curves(curves: list[list[Point]]) -> list[Point]:
    """Return the mean of the curves of several seeds, point by point."""
    return [
        Point(*(statistics.fmean(column) for column in list(zip(*points))[:3]), points[0].n)
        for points in zip(*curves)
    ]


def parameters(folder: Path) -> int:
    """Return the number of weights in a model folder."""
    with safe_open(folder / "model.safetensors", framework="np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


# ---- the result ----------------------------------------------------------------------------------


def report(results: dict) -> str:
    """Return the tables of a result."""
    lines = [
        "best of n, means over sizes of reward model: measured KL and ln n - (n - 1) / n",
        "  n " + "".join(f"{n:>8}" for n in NS),
        " KL " + "".join(f"{kl:8.3f}" for kl in results["kl measured"]),
        "    " + "".join(f"{formula_kl(n):8.3f}" for n in NS),
    ]
    for how, title in (("bon", "best of n"), ("rl", "REINFORCE")):
        lines += [
            "",
            f"{title}: gold and proxy in deviations of the policy's answers",
            f"{'reward model':<14}{'weights':>9}{'accuracy':>9}{'alpha':>8}{'beta':>8}{'R2':>7}"
            f"{'best gold':>11}{'at KL':>8}{'last gold':>11}{'proxy':>7}{'at KL':>8}",
        ]
        for size, row in results["sizes"].items():
            alpha, beta, r2 = row[how]["fit"]
            points = [Point(*point) for point in row[how]["points"]]
            best, last = max(points, key=lambda point: point.gold), points[-1]
            lines.append(
                f"{size:<14}{row['parameters']:>9,}{row['accuracy']:>9.3f}{alpha:>8.3f}{beta:>8.3f}"
                f"{r2:>7.3f}{best.gold:>11.3f}{best.kl:>8.2f}{last.gold:>11.3f}{last.proxy:>7.2f}"
                f"{last.kl:>8.2f}"
            )
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """Write the figure: gold (solid), proxy (dashed) and fit (dotted) over the KL, as a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the figure needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(11, 4.2), dpi=90, layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, (how, title) in zip(axes, (("bon", "best of n"), ("rl", "REINFORCE"))):
        for size, row in results["sizes"].items():
            points = [Point(*point) for point in row[how]["points"]]
            kl = [max(point.kl, 0) for point in points]
            label = f"{size}, {row['parameters']:,} weights"
            colour = COLOURS[size]
            axis.plot(kl, [p.proxy for p in points], "--", color=colour, alpha=0.6)
            axis.plot(kl, [p.gold for p in points], "o-", color=colour, markersize=3, label=label)
            alpha, beta, _ = row[how]["fit"]
            d = np.linspace(1e-3, math.sqrt(max(kl)), 200)
            slope = d if how == "bon" else np.log(d)
            axis.plot(d * d, d * (alpha - beta * slope), ":", color=colour)
        axis.set_title(title)
        axis.set_xlabel("KL from the policy before, nats per response")
        axis.axhline(0, color="grey", linewidth=0.5)
    axes[0].set_ylabel("reward, deviations (solid gold, dashed proxy)")
    axes[0].legend()
    figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder, without spaces")
    parser.add_argument("--seeds", type=int, default=1, help="whole repetitions; default 1")
    parser.add_argument("--steps", type=int, default=120, help="of REINFORCE; default 120")
    parser.add_argument("--lr", default="2e-4", help="of REINFORCE; default 2e-4")
    parser.add_argument("--prompts", type=int, default=64, help="of best of n; default 64")
    parser.add_argument("--pool", type=int, default=256, help="answers to each; default 256")
    parser.add_argument("--workers", type=int, default=0, help="commands at a time; 0: one a core")
    flags = parser.parse_args(argv)
    folders = [flags.out / f"seed_{seed}" for seed in range(flags.seeds)]
    stages = [stage for s, out in enumerate(folders) for stage in plan(out, s, flags)]
    for done in run_stages(stages, flags.workers):
        print(done.line(""), flush=True)

    curves: dict[str, dict[str, list]] = {size: {"bon": [], "rl": []} for size in SIZES}
    for out in folders:
        for size in SIZES:
            groups = read_pool(out / f"pool_{size}.jsonl")
            curves[size]["bon"].append(best_of_n_curve(groups))
            curves[size]["rl"].append(rl_curve(out / f"rl_{size}", groups))
    results: dict = {"flags": {k: str(v) for k, v in vars(flags).items()}, "sizes": {}}
    for size, by_method in curves.items():
        logs = [read_rows(out / f"rm_{size}/metrics.jsonl")[-1] for out in folders]
        row: dict = {
            "parameters": parameters(folders[0] / f"rm_{size}/final"),
            "accuracy": statistics.fmean(log["eval/rewards/accuracies"] for log in logs),
        }
        for how, by_seed in by_method.items():
            points = mean_curves(by_seed)
            row[how] = {"points": points, "fit": fit(points, how)}
            row[how]["fits"] = [fit(curve, how) for curve in by_seed]
        results["sizes"][size] = row
    by_size = [[point[0] for point in row["bon"]["points"]] for row in results["sizes"].values()]
    results["kl measured"] = [statistics.fmean(column) for column in zip(*by_size)]
    write_text(flags.out / "results.json", json.dumps(results, indent=1) + "\n")
    print(report(results))
    draw(results, flags.out / "overoptimisation.png")
    print(f"\nthe figure is {flags.out}/overoptimisation.png, all numbers are in results.json")


if __name__ == "__main__":
    main()
