"""The picture of some runs: a panel a metric, runs overlaid. Needs matplotlib."""

import math
from typing import Any

from plots.series import Series, against, distributions, evaluation_of, evaluations, smoothed

PANEL = (4.4, 2.8)  # width and height of one panel in inches
DPI = 120
BINS = 20  # of a histogram
MARKERS = "osD^v*"  # of evaluation sets
HISTOGRAM = "histogram:"  # opens a key
TITLE: dict[str, Any] = {"fontsize": 11, "fontweight": "bold"}


def draw(
    runs: dict[str, Series],
    keys: list[str],
    weight: float,
    samples: dict[str, list[dict]],
    scores: dict[str, dict[str, dict]] | None = None,
) -> Any:
    """Return a matplotlib figure with a panel for each key and every run in it.

    keys: metrics; "y~x", y over x; "histogram:NAME", a number of the samples.
    samples: of every run, as read_samples returns them. scores: two more panels, see draw_scores.
    The size is columns · 4.4 by (rows · 2.8 + legend) inches.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure  # not pyplot: needs no display, has no global state
    except ImportError as error:
        raise ImportError("plot.py needs matplotlib: pip install matplotlib") from error
    panels = len(keys) + (2 if scores else 0)
    sets = {name for run in runs.values() for key in keys for name in evaluations(run, key)}
    markers = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(sorted(sets))}
    columns = min(panels, 2 if panels in (2, 4) else 3)
    rows = math.ceil(panels / columns)
    # A letter of the legend takes about 0.085 inches, the line beside it 0.7.
    entry_inches = 0.085 * max(map(len, [*runs, "evaluation"])) + 0.7
    legend_columns = max(1, int(columns * PANEL[0] / entry_inches))
    legend_inches = 0.15 + 0.21 * math.ceil((len(runs) + max(1, len(sets))) / legend_columns)
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
            if key.startswith(HISTOGRAM):
                draw_histogram(axes, samples[name], key.removeprefix(HISTOGRAM), colors[name])
            else:
                draw_run(axes, run, key, weight, colors[name], markers)
        label_axes(axes, key)
    if scores:
        bars = figure.add_subplot(rows, columns, panels - 1)
        scatter = figure.add_subplot(rows, columns, panels)
        draw_scores(bars, scatter, scores, colors)
    for axes in figure.axes:
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("0.6")

    figure.legend(
        handles=legend_handles(colors, markers),
        loc="upper center",
        ncols=legend_columns,
        frameon=False,
        fontsize=10,
    )
    return figure


def label_axes(axes: Any, key: str) -> None:
    """Write title and units on the panel of a key."""
    y, _, x = key.partition("~")
    axes.tick_params(labelsize=9, color="0.6")
    if key.startswith(HISTOGRAM):
        x = key.removeprefix(HISTOGRAM)
        axes.set_title(f"{x} of samples: first step, last step", **TITLE)
        axes.set_ylabel("share of samples", fontsize=10)
    else:
        axes.set_title(key.replace("~", " against "), **TITLE)
        axes.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=True)
        if x:
            axes.set_ylabel(y, fontsize=10)
        else:
            axes.locator_params("x", integer=True, nbins=6)
    axes.set_xlabel(x or "step", fontsize=10)


def draw_histogram(axes: Any, samples: list[dict], name: str, color: Any) -> None:
    """Draw how a number of a run's samples was spread in the first logged step and in the last."""
    first, last = distributions(samples, name)
    if not first + last:
        return
    low, high = min(first + last), max(first + last)
    edges = [low + (high - low or 1) * i / BINS for i in range(BINS + 1)]
    for values, style in ((first, {"alpha": 0.25}), (last, {"histtype": "step", "linewidth": 1.8})):
        share = [1 / len(values)] * len(values)
        axes.hist(values, edges, weights=share, color=color, **style)


def draw_run(
    axes: Any, run: Series, key: str, weight: float, color: Any, markers: dict[str, str]
) -> None:
    """Draw one metric of a run: measured and smoothed, evaluation as dots; "y~x": y over x.

    markers: of every evaluation set, by its name.
    """
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
    for name in evaluations(run, key):
        steps, values = zip(*run[evaluation_of(key, name)])
        axes.plot(
            steps,
            values,
            markers[name] + ":",
            color=color,
            linewidth=1,
            ms=5,
            mec="white",
            zorder=3,
        )


def draw_scores(
    bars: Any, scatter: Any, scores: dict[str, dict[str, dict]], colors: dict[str, Any]
) -> None:
    """Draw the share of good answers of every method, a dot a seed; and the same against KL.

    scores: seed -> method -> {good, kl, ...}, from demo.py. colors: of the runs drawn beside.
    """
    labels: list[tuple[float, float, str, Any]] = []
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
            labels.append((sum(kl) / len(kl), mean, name, color))
    farthest = max((x for x, *_ in labels), default=0.0)
    for x, y, name, color in labels:  # towards the middle, so that no label leaves the panel
        left = x > farthest / 2
        scatter.annotate(
            name,
            (x, y),
            (-4 if left else 4, 4),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=7,
            color=color,
        )
    scatter.margins(0.08, 0.15)  # room for the names
    bars.set_yticks(range(len(methods)), methods, fontsize=8)
    bars.invert_yaxis()
    bars.set_title("share of good answers", **TITLE)
    bars.set_xlabel("share; a dot a seed", fontsize=10)
    scatter.set_title("good answers against KL to the start", **TITLE)
    scatter.set_xlabel("nats an answer", fontsize=10)
    scatter.set_ylabel("share of good answers", fontsize=10)


def legend_handles(colors: dict[str, Any], markers: dict[str, str]) -> list:
    """Return a line for each run, and one for each evaluation set by its name."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, linewidth=2.2, label=name) for name, color in colors.items()
    ]
    for name, marker in markers.items():
        style: dict[str, Any] = {"color": "0.35", "linestyle": ":", "marker": marker}
        style["markersize"] = 5
        handles.append(Line2D([], [], label=f"evaluation {name}".strip(), **style))
    return handles
