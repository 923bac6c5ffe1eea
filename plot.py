"""Curves of one or more runs, side by side in one PNG: a panel a metric, runs overlaid.

    python plot.py runs/dpo runs/dpo_beta03                  # writes curves.png
    python plot.py runs/dpo --keys loss,rewards/margins --out dpo.png --smooth 0.95
    python plot.py runs/rloo runs/ppo --keys "reward,kl,reward~kl"     # y~x: one metric against another
    python plot.py runs/demo/seed_0/* --scores runs/demo/scores.json   # and the truth about every method

RUN is a run's folder or its metrics.jsonl, also one that is still being written. Training is drawn as measured (faint)
and smoothed (strong), evaluation as dots in the same panel. Needs matplotlib (pip install matplotlib).
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KEYS = (
    "loss",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "kl",
    "reward",
    "grad_norm",
    "lr",
    "tokens_per_second",
)
PANEL = (4.4, 2.8)  # inches, width and height of one panel
DPI = 120

Series = dict[str, list[tuple[float, float]]]  # metric -> [(step, value)], steps ascending


def read_run(path: str | Path) -> Series:
    """Every metric of a run; half-written lines, null and NaN are left out. FileNotFoundError when there is no file.

    A step that stands twice (killed after logging it, then resumed from before it) counts as logged last.
    """
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: give the --out folder of a training run, or its metrics.jsonl"
        )
    values, broken = {}, 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            step = float(row["step"])
        except (ValueError, KeyError, TypeError):
            broken += bool(line.strip())
            continue
        for key, value in row.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                values.setdefault(key, {})[step] = value
    if broken:
        print(f"{file}: {broken} unreadable line{'s' * (broken > 1)} left out", file=sys.stderr)
    return {key: sorted(points.items()) for key, points in values.items()}


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average, bias-corrected as in Adam (arXiv 1412.6980) so that it does not start near 0."""
    average, out = 0.0, []
    for n, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**n))
    return out


def run_names(paths: list[str]) -> list[str]:
    """The shortest folder names, as many levels as it takes to tell the runs apart."""
    parts = [
        p.parent.parts if p.name == "metrics.jsonl" else p.parts
        for p in (Path(p).resolve() for p in paths)
    ]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return names


def has(run: Series, key: str) -> bool:
    """Whether a run has something to draw for a key."""
    y, _, x = key.partition("~")
    return (y in run or f"eval/{y}" in run) if not x else bool(against(run, key, 0.0)[0])


def against(run: Series, key: str, weight: float) -> tuple[list[float], list[float]]:
    """Two metrics of the same steps, smoothed: (x values, y values) of a key "y~x"."""
    y, x = (dict(run.get(name, [])) for name in key.split("~"))
    steps = [step for step in x if step in y]
    return smoothed([x[s] for s in steps], weight), smoothed([y[s] for s in steps], weight)


def draw_scores(scores: dict[str, dict[str, dict]], bars, scatter, colors: dict[str, Any]) -> None:
    """Two panels: the share of good answers of every method, a dot a seed; and the same against KL, where it is known.

    scores: seed -> method -> {good, kl, ...}, as demo.py writes it. colors: of methods whose runs are drawn too.
    """
    methods = [name for name, row in next(iter(scores.values())).items() if "good" in row]
    for i, name in enumerate(methods):
        good = [rows[name]["good"] for rows in scores.values()]
        kl = [rows[name].get("kl") for rows in scores.values()]
        color = colors.get(name.replace(" ", "_"), "0.45")
        bars.barh(i, sum(good) / len(good), color=color, alpha=0.35)
        bars.plot(good, [i] * len(good), "o", color=color, ms=4)
        if None not in kl:
            scatter.plot(kl, good, "o", color=color, ms=4)
            middle = (sum(kl) / len(kl), sum(good) / len(good))
            scatter.annotate(
                name, middle, (4, 4), textcoords="offset points", fontsize=7, color=color
            )
            scatter.margins(x=0.2)
    bars.set_yticks(range(len(methods)), methods, fontsize=8)
    bars.invert_yaxis()
    bars.set_title("share of good answers", fontsize=11, fontweight="bold")
    scatter.set_title("good answers against KL to SFT", fontsize=11, fontweight="bold")
    scatter.set_xlabel("nats an answer", fontsize=10)


def draw(
    runs: dict[str, Series],
    keys: list[str],
    out: str | Path,
    weight: float,
    scores: dict | None = None,
) -> None:
    """One panel a key with every run in it, to a PNG of (columns · 4.4) by (rows · 2.8 + legend) inches at 120 dpi."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import (
            Figure,
        )  # without pyplot: PNGs come from Agg, no display and no global state
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ImportError("plot.py needs matplotlib: pip install matplotlib") from error
    panels = [*keys, *(("good", "good~kl") if scores else ())]
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = math.ceil(len(panels) / columns)
    legend_columns = max(
        1, int(columns * PANEL[0] / (0.085 * max(map(len, [*runs, "evaluation"])) + 0.7))
    )
    legend_inches = 0.15 + 0.21 * math.ceil((len(runs) + 1) / legend_columns)
    height = rows * PANEL[1] + legend_inches
    layout = ConstrainedLayoutEngine(
        rect=(0, 0, 1, 1 - legend_inches / height), w_pad=0.08, h_pad=0.08
    )
    figure = Figure(figsize=(columns * PANEL[0], height), layout=layout)
    colors = [
        colormaps["tab10"](i) if len(runs) <= 10 else colormaps["turbo"](i / len(runs))
        for i in range(len(runs))
    ]
    evaluated = False
    for i, key in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        for run, color in zip(runs.values() if i < len(keys) else (), colors):
            if "~" in key and has(run, key):
                x, y = against(run, key, weight)
                axes.plot(x, y, color=color, linewidth=1.5)
                axes.plot(x[-1:], y[-1:], "o", color=color, ms=5)
            if key in run:
                steps, values = zip(*run[key])
                w = (
                    0 if key == "lr" else weight
                )  # the schedule has no noise, and an average would draw it too late
                dot = "." if len(steps) == 1 else None  # a line through one point shows nothing
                axes.plot(
                    steps,
                    values,
                    color=color,
                    alpha=0.22 if w else 1,
                    linewidth=1 if w else 1.8,
                    marker=dot,
                )
                if w:
                    axes.plot(steps, smoothed(values, w), color=color, linewidth=1.8, marker=dot)
            if f"eval/{key}" in run:
                evaluated = True
                axes.plot(
                    *zip(*run[f"eval/{key}"]),
                    "o:",
                    color=color,
                    linewidth=1,
                    ms=5,
                    mec="white",
                    zorder=3,
                )
        axes.set_title(key, fontsize=11, fontweight="bold")
        axes.tick_params(labelsize=9, color="0.6")
        axes.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=True)
        if "~" not in key:
            axes.locator_params("x", integer=True, nbins=6)
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("0.6")
        if "~" in key:
            axes.set_title(key.replace("~", " against "), fontsize=11, fontweight="bold")
        elif i + columns >= len(keys):
            axes.set_xlabel("step", fontsize=10)
    if scores:
        for axes in figure.axes[-2:]:
            axes.clear()
            axes.grid(color="0.92")
            axes.spines[["top", "right"]].set_visible(False)
        draw_scores(scores, figure.axes[-2], figure.axes[-1], dict(zip(runs, colors)))
    handles = [
        Line2D([], [], color=color, linewidth=2.2, label=name) for name, color in zip(runs, colors)
    ]
    if evaluated:
        handles.append(
            Line2D(
                [], [], color="0.35", linestyle=":", marker="o", markersize=5, label="evaluation"
            )
        )
    figure.legend(
        handles=handles, loc="upper center", ncols=legend_columns, frameon=False, fontsize=10
    )
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=DPI)


def main(argv: list[str] | None = None) -> None:
    """The command. FileNotFoundError without metrics.jsonl, ValueError when no run has a metric that was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder, or its metrics.jsonl"
    )
    parser.add_argument(
        "--keys", default=",".join(KEYS), help="metrics to draw, with commas between"
    )
    parser.add_argument(
        "--out", default="curves.png", help="the picture to write; default: %(default)s"
    )
    parser.add_argument(
        "--scores", help="scores.json of a demo: two more panels, the truth about every method"
    )
    parser.add_argument(
        "--smooth", type=float, default=0.9, help="0 none, towards 1 more; default: %(default)s"
    )
    args = parser.parse_args(argv)
    if not 0 <= args.smooth < 1:
        raise ValueError(
            f"--smooth {args.smooth} must be at least 0 and below 1: 0.9 averages over about 10 steps"
        )
    paths = list(dict.fromkeys(os.path.normpath(run) for run in args.runs))
    runs = dict(zip(run_names(paths), map(read_run, paths)))
    asked = [key.strip() for key in args.keys.split(",") if key.strip()]
    keys = [key for key in asked if any(has(run, key) for run in runs.values())]
    if not keys:
        found = sorted(set().union(*runs.values()) - {"step"})
        raise ValueError(
            f"no metric to draw in {', '.join(paths)}: looked for {', '.join(asked)}; "
            f"found {', '.join(found) or 'none at all'}: name some of these in --keys"
        )
    draw(
        runs,
        keys,
        args.out,
        args.smooth,
        json.loads(Path(args.scores).read_text()) if args.scores else None,
    )
    print(f"{args.out}: {', '.join(keys)} of {', '.join(runs)}")
    if args.keys != ",".join(KEYS) and len(keys) < len(asked):
        print(f"in no run: {', '.join(key for key in asked if key not in keys)}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"plot.py: {error}")
