"""The numbers of runs: metrics and samples read back, smoothed, compared in a table."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from disk import lines_of

Series = dict[str, list[tuple[float, float]]]  # metric -> [(step, value)], steps ascending

REFERENCE_POINT = "kl (reference point)"  # KTO's `kl` is of other pairs, and not the policy's
TABLE_STEPS = 10  # logged steps at the end of a run whose mean stands in the table


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
    if "rewards/chosen" in values and "reward" not in values:  # a run of KTO
        for key in ("kl", "eval/kl"):
            if key in values:
                values[key.replace("kl", REFERENCE_POINT)] = values.pop(key)
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


def last_row(folder: Path) -> dict[str, float]:
    """Return the last row of a finished run's metrics.jsonl."""
    return json.loads(lines_of((folder / "metrics.jsonl").read_text(encoding="utf-8"))[-1])


def read_samples(path: str | Path) -> list[dict]:
    """Return the rows of a run's samples.jsonl that can be read; none without that file."""
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / "samples.jsonl"
    rows = []
    if file.is_file():
        for line in lines_of(file.read_text(encoding="utf-8", errors="replace")):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def distributions(samples: list[dict], name: str) -> tuple[list[float], list[float]]:
    """Return a number of the samples of a run's first and last logged steps.

    name: "reward" or "tokens". Rows without the number, or with one that is not finite, are left
    out.
    """
    steps = sorted({row["step"] for row in samples})
    values = []
    for step in (steps[:1], steps[-1:]):
        column = [row.get(name) for row in samples if row["step"] in step]
        values.append([v for v in column if isinstance(v, (int, float)) and math.isfinite(v)])
    return values[0], values[1]


def table(runs: dict[str, Series], keys: list[str]) -> list[list[str]]:
    """Return a comparison of runs: a header, then a row a metric with a cell a run.

    A cell is the mean over the last logged steps; for evaluation the last value, and in brackets
    the lowest for a loss, the highest for others, if that is another.
    """
    steps = [max((points[-1][0] for points in run.values()), default=0) for run in runs.values()]
    rows = [["", *runs], ["steps", *(f"{step:.0f}" for step in steps)]]
    for key in keys:
        if "~" in key or key.startswith("histogram:"):
            continue
        sets = sorted({name for run in runs.values() for name in evaluations(run, key)})
        for name in (key, *(evaluation_of(key, name) for name in sets)):
            if any(name in run for run in runs.values()):
                rows.append([name, *(_cell(run.get(name, []), name) for run in runs.values())])
    return rows


def _cell(points: list[tuple[float, float]], name: str) -> str:
    """Return the text of a cell of `table`; a dash without points."""
    values = [value for _, value in points]
    if not values:
        return "-"
    if not name.startswith("eval/"):
        end = values[-TABLE_STEPS:]
        return f"{sum(end) / len(end):.4g}"
    best = min(values) if "loss" in name else max(values)
    return f"{values[-1]:.4g}" + (f" ({best:.4g})" if best != values[-1] else "")


def markdown(rows: list[list[str]]) -> str:
    """Return a table as Markdown, its columns aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def has(run: Series, key: str) -> bool:
    """Return True if the run has a point to draw for a key."""
    if "~" in key:
        x, _ = against(run, key, 0.0)
        return bool(x)
    return key in run or bool(evaluations(run, key))


def evaluation_of(key: str, name: str) -> str:
    """Return the name of a metric on an evaluation set; name "": the one without a name."""
    return f"eval/{name}/{key}" if name else f"eval/{key}"


def evaluations(run: Series, key: str) -> list[str]:
    """Return the names of the evaluation sets on which a run has a metric, "" before others."""
    names = []
    for metric in run:
        if metric == f"eval/{key}":
            names.append("")
        elif metric.startswith("eval/") and metric.endswith(f"/{key}"):
            name = metric.removeprefix("eval/").removesuffix(f"/{key}")
            if "/" not in name:
                names.append(name)
    return sorted(names)


def against(run: Series, key: str, weight: float) -> tuple[list[float], list[float]]:
    """Return (x values, y values) of a key "y~x": two metrics at the same steps, smoothed."""
    y, x = (dict(run.get(name, [])) for name in key.split("~"))
    steps = [step for step in x if step in y]
    return smoothed([x[s] for s in steps], weight), smoothed([y[s] for s in steps], weight)
