"""plot.py: curves of runs that are complete, interrupted or missing."""

import builtins
import json
import math
import random
import struct
from pathlib import Path

import pytest

import plot


def write_run(folder: Path, steps: int = 60, **extra: float) -> Path:
    """Write a folder like a train script's: a row a step, an evaluation every 20."""
    folder.mkdir(parents=True)
    noise = random.Random(0)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            row = {
                "step": step,
                "loss": 0.69 * math.exp(-step / 40) + noise.gauss(0, 0.02),
                "lr": 5e-7,
                **extra,
            }
            file.write(json.dumps(row) + "\n")
            if step % 20 == 0:
                row = {"step": step, "eval/loss": 0.7 * math.exp(-step / 50)}
                file.write(json.dumps(row) + "\n")
    return folder


def png_size(path: Path) -> tuple[int, int]:
    """Return width and height from the header of a PNG."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def without_import(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Make imports of `package` fail, as if it were not installed."""
    real = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)


@pytest.mark.parametrize(
    ("keys", "columns", "rows"),
    [
        ("loss", 1, 1),
        ("loss,lr", 2, 1),
        ("loss,lr,kl,reward", 2, 2),
        ("loss,lr,kl,reward,grad_norm", 3, 2),
    ],
)
def test_size_follows_the_panels(tmp_path, keys, columns, rows):
    """The picture is `columns` panels wide, `rows` panels and a short legend high."""
    pytest.importorskip("matplotlib")
    runs = [str(write_run(tmp_path / name, kl=0.1, reward=1.0, grad_norm=2.0)) for name in "ab"]
    plot.main([*runs, "--keys", keys, "--out", str(tmp_path / "new" / "curves.png")])
    width, height = png_size(tmp_path / "new" / "curves.png")
    assert width == round(columns * plot.PANEL[0] * plot.DPI)
    panels = rows * plot.PANEL[1] * plot.DPI
    assert panels < height < panels + plot.DPI


def test_every_run_is_in_the_picture(tmp_path, monkeypatch):
    """Each run has a raw line, a smoothed line and its evaluation, in one colour and one name."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    runs = [write_run(tmp_path / "x" / "dpo"), write_run(tmp_path / "y" / "dpo", steps=40)]
    plot.main([str(runs[0]), str(runs[1] / "metrics.jsonl"), "--out", str(tmp_path / "c.png")])
    loss, lr = drawn[0].axes
    assert [loss.get_title(), lr.get_title()] == ["loss", "lr"]
    assert [len(line.get_xdata()) for line in loss.lines] == [60, 60, 3, 40, 40, 2]
    colors = [line.get_color() for line in loss.lines]
    assert len(set(colors[:3])) == len(set(colors[3:])) == 1 and colors[0] != colors[3]
    assert [len(line.get_xdata()) for line in lr.lines] == [60, 40]  # no noise to smooth
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["x/dpo", "y/dpo", "evaluation"]


def test_scores_of_a_demo_get_two_panels(tmp_path, monkeypatch):
    """Bars are means over the seeds, a dot a seed; methods without KL are in the bars alone."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    run = write_run(tmp_path / "dpo")
    scores = {
        "0": {"dpo": {"good": 0.4, "kl": 2.0}, "steerlm best": {"good": 0.5, "kl": None}},
        "1": {"dpo": {"good": 0.6, "kl": 3.0}, "steerlm best": {"good": 0.7, "kl": None}},
    }
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    flags = ["--keys", "loss", "--scores", str(tmp_path / "scores.json")]
    plot.main([str(run), *flags, "--out", str(tmp_path / "c.png")])
    loss, bars, scatter = drawn[0].axes
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([0.5, 0.6])
    assert [list(line.get_xdata()) for line in bars.lines] == [[0.4, 0.6], [0.5, 0.7]]
    assert [list(line.get_xydata()[0]) for line in scatter.lines] == [[2.0, 0.4]]
    assert scatter.lines[0].get_color() == loss.lines[0].get_color()
    assert [text.get_text() for text in scatter.texts] == ["dpo"]


def test_broken_lines_and_values_are_left_out(tmp_path, capsys):
    """A half-written line, NaN, null or a missing key costs one point and no other."""
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 1, "loss": 0.7, "kl": null}\n\n{"step": 2, "loss": NaN, "kl": 0.2}\n[]\n'
        '{"step": 3, "loss": 0.6, "note": "text"}\n{"step": 4, "lo'
    )
    expected = {"step": [(1, 1), (2, 2), (3, 3)], "loss": [(1, 0.7), (3, 0.6)], "kl": [(2, 0.2)]}
    assert plot.read_run(tmp_path) == plot.read_run(file) == expected
    assert "2 unreadable lines" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    plot.main([str(tmp_path), "--out", str(tmp_path / "c.png")])
    assert png_size(tmp_path / "c.png")


def test_a_resumed_step_counts_as_logged_last(tmp_path):
    """A step that was logged, lost in a kill and trained again is one point of the curve."""
    rows = [(1, 0.7), (2, 0.6), (3, 9.0), (3, 0.5), (4, 0.4)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {s}, "loss": {v}}}\n' for s, v in rows)
    )
    assert plot.read_run(tmp_path)["loss"] == [(1, 0.7), (2, 0.6), (3, 0.5), (4, 0.4)]


def test_smoothing_is_a_weighted_mean():
    """A smoothed value is the mean so far, each step back weighted by another factor `weight`."""
    values = [3.0, -1.0, 4.0, 1.0]
    for n, got in enumerate(plot.smoothed(values, 0.8), 1):
        weights = [0.8 ** (n - 1 - i) for i in range(n)]
        assert got == pytest.approx(sum(w * v for w, v in zip(weights, values)) / sum(weights))


def test_errors_say_what_was_looked_for(tmp_path, monkeypatch):
    """No file, no such metric, a bad --smooth, no matplotlib: the error names it and the fix."""
    run = str(write_run(tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match=r"nowhere.*does not exist: give the --out folder"):
        plot.main([str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty/metrics\.jsonl"):
        plot.main([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match=r"asked for bananas; available: eval/loss, loss, lr"):
        plot.main([run, "--keys", "bananas"])
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"asked for loss, .*available: none"):
        plot.main([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match=r"--smooth 1\.0 must be"):
        plot.main([run, "--smooth", "1"])
    without_import(monkeypatch, "matplotlib")
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot.main([run, "--out", str(tmp_path / "c.png")])


def test_named_rewards_are_drawn_without_asking(tmp_path, capsys):
    """The default picture has a panel for each reward/NAME of a run."""
    run = write_run(tmp_path / "run", **{"reward/brief": 0.5, "reward/right": 1.0})
    plot.main([str(run), "--out", str(tmp_path / "c.png")])
    assert "reward/brief, reward/right of run" in capsys.readouterr().out
