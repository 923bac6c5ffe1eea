"""Curves of one or more runs in one PNG: a panel a metric, runs overlaid.

    python plot.py runs/dpo runs/dpo_beta03                  # writes curves.png
    python plot.py runs/dpo --keys loss,rewards/margins --out dpo.png --smooth 0.95
    python plot.py runs/rloo runs/ppo --keys "reward,kl,reward~kl"     # y~x: y over x
    python plot.py runs/demo/seed_0/* --scores runs/demo/scores.json   # and the demo's exact scores

RUN is a run's folder or its metrics.jsonl; the run may still be going on. Training is drawn as
measured (faint) and smoothed (strong), evaluation as dots in the same panel. Needs matplotlib (pip
install matplotlib).
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from disk import lines_of

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
PANEL = (4.4, 2.8)  # width and height of one panel in inches
DPI = 120
TITLE: dict[str, Any] = {"fontsize": 11, "fontweight": "bold"}

Series = dict[str, list[tuple[float, float]]]  # metric -> [(step, value)], steps ascending


# ---- the numbers


def read_run(path: str | Path) -> Series:
    """Return every metric of a run; half-written lines, null and NaN are left out.

    A step that stands twice (logged, lost in a kill, trained again) counts as logged last.
    FileNotFoundError: there is no metrics.jsonl.
    """
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: give the --out folder of a training run, or its metrics.jsonl"
        )
    values: dict[str, dict[float, float]] = {}
    broken = 0
    for line in lines_of(file.read_text(encoding="utf-8", errors="replace")):
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
    """Return the exponential moving average, bias-corrected as in Adam (arXiv 1412.6980)."""
    average = 0.0
    averages = []
    for n, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        averages.append(average / (1 - weight**n))
    return averages


def run_names(paths: list[str]) -> list[str]:
    """Return the shortest names that tell the runs apart.

    ["runs/a/dpo", "runs/b/dpo"] -> ["a/dpo", "b/dpo"]
    """
    folders = []
    for path in (Path(p).resolve() for p in paths):
        folders.append(path.parent.parts if path.name == "metrics.jsonl" else path.parts)
    for depth in range(1, max(map(len, folders)) + 1):
        names = ["/".join(parts[-depth:]) for parts in folders]
        if len(set(names)) == len(names):
            break
    return names


def has(run: Series, key: str) -> bool:
    """Return True if the run has a point to draw for a key."""
    if "~" in key:
        x, _ = against(run, key, 0.0)
        return bool(x)
    return key in run or f"eval/{key}" in run


def against(run: Series, key: str, weight: float) -> tuple[list[float], list[float]]:
    """Return (x values, y values) of a key "y~x": two metrics at the same steps, smoothed."""
    y, x = (dict(run.get(name, [])) for name in key.split("~"))
    steps = [step for step in x if step in y]
    return smoothed([x[s] for s in steps], weight), smoothed([y[s] for s in steps], weight)


# ---- the picture


def draw(
    runs: dict[str, Series],
    keys: list[str],
    out: str | Path,
    weight: float,
    scores: dict[str, dict[str, dict]] | None = None,
) -> None:
    """Write a PNG with a panel for each key and every run in it; scores: draw_scores' two panels.

    Its size is columns · 4.4 by (rows · 2.8 + legend) inches at 120 dpi.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure  # not pyplot: needs no display, has no global state
    except ImportError as error:
        raise ImportError("plot.py needs matplotlib: pip install matplotlib") from error
    panels = len(keys) + (2 if scores else 0)
    columns = min(panels, 2 if panels in (2, 4) else 3)
    rows = math.ceil(panels / columns)
    # A letter of the legend takes about 0.085 inches, the line beside it 0.7.
    entry_inches = 0.085 * max(map(len, [*runs, "evaluation"])) + 0.7
    legend_columns = max(1, int(columns * PANEL[0] / entry_inches))
    legend_inches = 0.15 + 0.21 * math.ceil((len(runs) + 1) / legend_columns)
    height = rows * PANEL[1] + legend_inches
    figure = Figure(figsize=(columns * PANEL[0], height))
    below_legend = (0, 0, 1, 1 - legend_inches / height)
    figure.set_layout_engine("constrained", rect=below_legend, w_pad=0.08, h_pad=0.08)
    if len(runs) <= 10:
        colors = {name: colormaps["tab10"](i) for i, name in enumerate(runs)}
    else:
        colors = {name: colormaps["turbo"](i / len(runs)) for i, name in enumerate(runs)}

    for i, key in enumerate(keys):
        axes = figure.add_subplot(rows, columns, i + 1)
        for name, run in runs.items():
            draw_run(axes, run, key, weight, colors[name])
        axes.set_title(key.replace("~", " against "), **TITLE)
        axes.tick_params(labelsize=9, color="0.6")
        axes.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=True)
        if "~" not in key:
            axes.locator_params("x", integer=True, nbins=6)
            if i + columns >= len(keys):
                axes.set_xlabel("step", fontsize=10)
    if scores:
        bars = figure.add_subplot(rows, columns, panels - 1)
        scatter = figure.add_subplot(rows, columns, panels)
        draw_scores(bars, scatter, scores, colors)
    for axes in figure.axes:
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("0.6")

    evaluated = any(f"eval/{key}" in run for run in runs.values() for key in keys)
    figure.legend(
        handles=legend_handles(colors, evaluated),
        loc="upper center",
        ncols=legend_columns,
        frameon=False,
        fontsize=10,
    )
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=DPI)


def draw_run(axes: Any, run: Series, key: str, weight: float, color: Any) -> None:
    """Draw one metric of a run: measured and smoothed, evaluation as dots; "y~x": y over x."""
    if "~" in key:
        x, y = against(run, key, weight)
        axes.plot(x, y, color=color, linewidth=1.5)
        axes.plot(x[-1:], y[-1:], "o", color=color, ms=5)
        return
    if key in run:
        steps, values = zip(*run[key])
        marker = "." if len(steps) == 1 else None  # a line through one point is invisible
        if key == "lr" or not weight:  # a schedule has no noise, and smoothing would delay it
            axes.plot(steps, values, color=color, linewidth=1.8, marker=marker)
        else:
            averages = smoothed(values, weight)
            axes.plot(steps, values, color=color, alpha=0.22, linewidth=1, marker=marker)
            axes.plot(steps, averages, color=color, linewidth=1.8, marker=marker)
    if f"eval/{key}" in run:
        steps, values = zip(*run[f"eval/{key}"])
        axes.plot(steps, values, "o:", color=color, linewidth=1, ms=5, mec="white", zorder=3)


def draw_scores(
    bars: Any, scatter: Any, scores: dict[str, dict[str, dict]], colors: dict[str, Any]
) -> None:
    """Draw the share of good answers of every method, a dot a seed; and the same against KL.

    scores: seed -> method -> {good, kl, ...}, from demo.py. colors: of the runs drawn beside.
    """
    methods = [name for name, row in next(iter(scores.values())).items() if "good" in row]
    for i, name in enumerate(methods):
        good = [rows[name]["good"] for rows in scores.values()]
        kl = [rows[name].get("kl") for rows in scores.values()]
        color = colors.get(name.replace(" ", "_"), "0.45")
        mean = sum(good) / len(good)
        bars.barh(i, mean, color=color, alpha=0.35)
        bars.plot(good, [i] * len(good), "o", color=color, ms=4)
        if None not in kl:
            scatter.plot(kl, good, "o", color=color, ms=4)
            scatter.annotate(
                name,
                (sum(kl) / len(kl), mean),
                (4, 4),
                textcoords="offset points",
                fontsize=7,
                color=color,
            )
            scatter.margins(x=0.2)
    bars.set_yticks(range(len(methods)), methods, fontsize=8)
    bars.invert_yaxis()
    bars.set_title("share of good answers", **TITLE)
    scatter.set_title("good answers against KL to SFT", **TITLE)
    scatter.set_xlabel("nats an answer", fontsize=10)


def legend_handles(colors: dict[str, Any], evaluated: bool) -> list:
    """Return a line for each run, and one for evaluation if there is any."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, linewidth=2.2, label=name) for name, color in colors.items()
    ]
    if evaluated:
        style: dict[str, Any] = {"color": "0.35", "linestyle": ":", "marker": "o", "markersize": 5}
        handles.append(Line2D([], [], label="evaluation", **style))
    return handles


def main(argv: list[str] | None = None) -> None:
    """Run the command. FileNotFoundError: no metrics.jsonl. ValueError: no metric to draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a run, or its metrics.jsonl"
    )
    parser.add_argument(
        "--keys", default=",".join(KEYS), help="metrics to draw, separated by commas"
    )
    parser.add_argument(
        "--out", default="curves.png", help="picture to write; default: %(default)s"
    )
    parser.add_argument("--scores", help="scores.json of a demo: two more panels, exact scores")
    parser.add_argument(
        "--smooth", type=float, default=0.9, help="from 0, none, to below 1; default: %(default)s"
    )
    args = parser.parse_args(argv)
    if not 0 <= args.smooth < 1:
        raise ValueError(
            f"--smooth {args.smooth} must be at least 0 and below 1: 0.9 averages about 10 steps"
        )
    paths = list(dict.fromkeys(os.path.normpath(run) for run in args.runs))
    runs = dict(zip(run_names(paths), map(read_run, paths)))
    asked = [key.strip() for key in args.keys.split(",") if key.strip()]
    if args.keys == ",".join(KEYS):  # and every named reward
        asked += sorted({key for run in runs.values() for key in run if key.startswith("reward/")})
    keys = [key for key in asked if any(has(run, key) for run in runs.values())]
    if not keys:
        available = sorted(set().union(*runs.values()) - {"step"})
        raise ValueError(
            f"no metric to draw in {', '.join(paths)}: asked for {', '.join(asked)}; "
            f"available: {', '.join(available) or 'none'}: name some of these in --keys"
        )
    scores = json.loads(Path(args.scores).read_text()) if args.scores else None
    draw(runs, keys, args.out, args.smooth, scores)
    print(f"{args.out}: {', '.join(keys)} of {', '.join(runs)}")
    if args.keys != ",".join(KEYS) and len(keys) < len(asked):
        print(f"in no run: {', '.join(key for key in asked if key not in keys)}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"plot.py: {error}")
