"""Curves of one or more runs in one picture, their numbers in a table, or both on a page.

    python plot.py runs/dpo runs/dpo_beta03                  # writes curves.png
    python plot.py runs/dpo --keys loss,rewards/margins --out dpo.png --smooth 0.95
    python plot.py runs/rloo runs/ppo --keys "reward,kl,reward~kl"     # y~x: y over x
    python plot.py runs/dpo runs/dpo_beta03 --table          # prints their numbers, no picture
    python plot.py runs/rloo --html run.html                 # curves, samples, flags, packages
    python plot.py runs/demo/seed_0/dpo --scores runs/demo/scores.json    # and exact scores

RUN is a run's folder or its metrics.jsonl; the run may still be going on. Training is drawn as
measured (faint) and smoothed (strong), evaluation as dots in the same panel, histograms of samples
as the first logged step (filled) and the last (outlined). The panel of KTO's kl says that it is the
reference point. Pictures need matplotlib (pip install matplotlib).
"""

import argparse
import json
import os
import sys
from pathlib import Path

from plots.figure import DPI, draw
from plots.page import page
from plots.series import (
    REFERENCE_POINT,
    Series,
    distributions,
    has,
    markdown,
    read_run,
    read_samples,
    run_names,
    table,
)

KEYS = (
    "loss",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "kl",
    REFERENCE_POINT,
    "reward",
    "grad_norm",
    "lr",
    "tokens_per_second",
)
HISTOGRAMS = ("reward", "tokens")  # of samples


def drawable(runs: dict[str, Series], samples: dict[str, list[dict]], keys: str) -> list[str]:
    """Return the keys to draw: those asked for that a run has, or all that are worth a look.

    keys: separated by commas; "" for the default ones. ValueError: no run has any.
    """
    asked = [key.strip() for key in keys.split(",") if key.strip()]
    if not asked:
        rewards = {key for run in runs.values() for key in run if key.startswith("reward/")}
        asked = [*KEYS, *sorted(rewards), *(f"histogram:{name}" for name in HISTOGRAMS)]
    drawn = []
    for key in asked:
        kind, _, name = key.partition(":")
        if kind == "histogram":
            if any(any(distributions(rows, name)) for rows in samples.values()):
                drawn.append(key)
        elif any(has(run, key) for run in runs.values()):
            drawn.append(key)
    if not drawn:
        available = sorted(set().union(*runs.values()) - {"step"})
        raise ValueError(
            f"no metric to draw in {', '.join(runs)}: asked for {', '.join(asked)}; "
            f"available: {', '.join(available) or 'none'}: name some of these in --keys"
        )
    if keys and len(drawn) < len(asked):
        print(f"in no run: {', '.join(key for key in asked if key not in drawn)}", file=sys.stderr)
    return drawn


def main(argv: list[str] | None = None) -> None:
    """Run the command. FileNotFoundError: no metrics.jsonl. ValueError: no metric to draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a run, or its metrics.jsonl"
    )
    parser.add_argument(
        "--keys", default="", help=f"metrics, separated by commas; default: {', '.join(KEYS)}"
    )
    parser.add_argument(
        "--out", default="curves.png", help="picture to write; default: %(default)s"
    )
    parser.add_argument("--table", action="store_true", help="print a table instead of a picture")
    parser.add_argument("--html", default="", metavar="FILE", help="write a page instead")
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
    names = run_names(paths)
    runs = dict(zip(names, map(read_run, paths)))
    samples = dict(zip(names, map(read_samples, paths)))
    keys = drawable(runs, samples, args.keys)
    rows = table(runs, keys)
    if args.table:
        print(markdown(rows))
        return
    scores = json.loads(Path(args.scores).read_text()) if args.scores else None
    figure = draw(runs, keys, args.smooth, samples, scores)
    out = Path(args.html or args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if args.html:
        folders = [Path(p) if Path(p).is_dir() else Path(p).parent for p in paths]
        text = page(dict(zip(names, folders)), rows, figure, samples)
        out.write_text(text, encoding="utf-8")
    else:
        figure.savefig(out, dpi=DPI)
    print(f"{out}: {', '.join(keys)} of {', '.join(runs)}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"plot.py: {error}")
