"""Curves of one or more runs, side by side in one PNG: a panel a metric, runs overlaid.

    python plot.py runs/dpo runs/dpo_beta03                  # writes curves.png
    python plot.py runs/dpo --keys loss,rewards/margins --out dpo.png --smooth 0.95

RUN is a run's folder or its metrics.jsonl, also one that is still being written. Training is drawn as measured (faint)
and smoothed (strong), evaluation as dots in the same panel. Needs matplotlib (pip install matplotlib).
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

KEYS = ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected", "logps/chosen",
        "logps/rejected", "kl", "reward", "grad_norm", "lr", "tokens_per_second")
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
        raise FileNotFoundError(f"{file} does not exist: give the --out folder of a training run, or its metrics.jsonl")
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


def smoothed(values: list[float], weight: float) -> list[float]:
    """Exponential moving average, bias-corrected as in Adam (arXiv 1412.6980) so that it does not start near 0."""
    average, out = 0.0, []
    for n, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**n))
    return out


def run_names(paths: list[str]) -> list[str]:
    """The shortest folder names, as many levels as it takes to tell the runs apart."""
    parts = [p.parent.parts if p.name == "metrics.jsonl" else p.parts for p in (Path(p).resolve() for p in paths)]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return names


def draw(runs: dict[str, Series], keys: list[str], out: str | Path, weight: float) -> None:
    """One panel a key with every run in it, to a PNG of (columns · 4.4) by (rows · 2.8 + legend) inches at 120 dpi."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure  # without pyplot: PNGs come from Agg, no display and no global state
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ImportError("plot.py needs matplotlib: pip install matplotlib") from error
    columns = min(len(keys), 2 if len(keys) in (2, 4) else 3)
    rows = math.ceil(len(keys) / columns)
    legend_columns = max(1, int(columns * PANEL[0] / (0.085 * max(map(len, [*runs, "evaluation"])) + 0.7)))
    legend_inches = 0.15 + 0.21 * math.ceil((len(runs) + 1) / legend_columns)
    height = rows * PANEL[1] + legend_inches
    figure = Figure(figsize=(columns * PANEL[0], height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - legend_inches / height), w_pad=0.08, h_pad=0.08)
    colors = [colormaps["tab10"](i) if len(runs) <= 10 else colormaps["turbo"](i / len(runs)) for i in range(len(runs))]
    evaluated = False
    for i, key in enumerate(keys):
        axes = figure.add_subplot(rows, columns, i + 1)
        for run, color in zip(runs.values(), colors):
            if key in run:
                steps, values = zip(*run[key])
                w = 0 if key == "lr" else weight  # the schedule has no noise, and an average would draw it too late
                dot = "." if len(steps) == 1 else None  # a line through one point shows nothing
                axes.plot(steps, values, color=color, alpha=0.22 if w else 1, linewidth=1 if w else 1.8, marker=dot)
                if w:
                    axes.plot(steps, smoothed(values, w), color=color, linewidth=1.8, marker=dot)
            if f"eval/{key}" in run:
                evaluated = True
                axes.plot(*zip(*run[f"eval/{key}"]), "o:", color=color, linewidth=1, ms=5, mec="white", zorder=3)
        axes.set_title(key, fontsize=11, fontweight="bold")
        axes.tick_params(labelsize=9, color="0.6")
        axes.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=True)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("0.6")
        if i + columns >= len(keys):
            axes.set_xlabel("step", fontsize=10)
    handles = [Line2D([], [], color=color, linewidth=2.2, label=name) for name, color in zip(runs, colors)]
    if evaluated:
        handles.append(Line2D([], [], color="0.35", linestyle=":", marker="o", markersize=5, label="evaluation"))
    figure.legend(handles=handles, loc="upper center", ncols=legend_columns, frameon=False, fontsize=10)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=DPI)


def main(argv: list[str] | None = None) -> None:
    """The command. FileNotFoundError without metrics.jsonl, ValueError when no run has a metric that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its metrics.jsonl")
    parser.add_argument("--keys", default=",".join(KEYS), help="metrics to draw, with commas between")
    parser.add_argument("--out", default="curves.png", help="the picture to write; default: %(default)s")
    parser.add_argument("--smooth", type=float, default=0.9, help="0 none, towards 1 more; default: %(default)s")
    args = parser.parse_args(argv)
    if not 0 <= args.smooth < 1:
        raise ValueError(f"--smooth {args.smooth} must be at least 0 and below 1: 0.9 averages over about 10 steps")
    paths = list(dict.fromkeys(os.path.normpath(run) for run in args.runs))
    runs = dict(zip(run_names(paths), map(read_run, paths)))
    asked = [key.strip() for key in args.keys.split(",") if key.strip()]
    keys = [key for key in asked if any(key in run or f"eval/{key}" in run for run in runs.values())]
    if not keys:
        found = sorted(set().union(*runs.values()) - {"step"})
        raise ValueError(f"no metric to draw in {', '.join(paths)}: looked for {', '.join(asked)}; "
                         f"found {', '.join(found) or 'none at all'}: name some of these in --keys")
    draw(runs, keys, args.out, args.smooth)
    print(f"{args.out}: {', '.join(keys)} of {', '.join(runs)}")
    if args.keys != ",".join(KEYS) and len(keys) < len(asked):
        print(f"in no run: {', '.join(key for key in asked if key not in keys)}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"plot.py: {error}")
