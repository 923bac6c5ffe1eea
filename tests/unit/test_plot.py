"""plot.py: curves of runs that are complete, interrupted or missing."""

import builtins
import json
import math
import random
import re
import struct
from pathlib import Path

import pytest

import plot
from plots import figure, page, series


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


@pytest.mark.slow
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
    assert width == round(columns * figure.PANEL[0] * figure.DPI)
    panels = rows * figure.PANEL[1] * figure.DPI
    assert panels < height < panels + figure.DPI


def test_every_run_is_in_the_picture(tmp_path, monkeypatch):
    """Each run has a raw line, a smoothed line and its evaluation, in one colour and one name."""
    pictures = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(pictures.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
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


def test_evaluation_sets_are_told_apart(tmp_path, monkeypatch, capsys):
    """Each has a marker, a name in the legend and a row of the table; `eval/x/loss` is set x."""
    pictures = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(pictures.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    run = write_run(tmp_path / "a")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 60, "eval/gsm/loss": 0.4, "eval/loss/sigmoid": 0.1}\n')
    plot.main([str(run), "--keys", "loss", "--out", str(tmp_path / "c.png")])
    (loss,) = drawn[0].axes
    assert [line.get_marker() for line in loss.lines[2:]] == ["o", "s"]
    assert list(loss.lines[3].get_ydata()) == [0.4]
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["a", "evaluation", "evaluation gsm"]
    capsys.readouterr()
    plot.main([str(run), "--table", "--keys", "loss"])
    names = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()]
    assert names[3:] == ["loss", "eval/loss", "eval/gsm/loss"]


def test_scores_of_a_demo_get_two_panels(tmp_path, monkeypatch):
    """Bars are means over the seeds, a dot a seed; methods without KL are in the bars alone."""
    pictures = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(pictures.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
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
    assert series.read_run(tmp_path) == plot.read_run(file) == expected
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
    assert series.read_run(tmp_path)["loss"] == [(1, 0.7), (2, 0.6), (3, 0.5), (4, 0.4)]


def test_smoothing_is_a_weighted_mean():
    """A smoothed value is the mean so far, each step back weighted by another factor `weight`."""
    values = [3.0, -1.0, 4.0, 1.0]
    for n, got in enumerate(series.smoothed(values, 0.8), 1):
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


def test_ktos_reference_point_is_not_the_kl_of_others(tmp_path, monkeypatch):
    """KTO's kl, of mismatched pairs, has a panel of its own beside that of the policy's kl."""
    pictures = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(pictures.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    kto = write_run(tmp_path / "kto", kl=2.0, **{"rewards/chosen": 1.0})
    ppo = write_run(tmp_path / "ppo", kl=1.0, reward=1.0)
    plot.main([str(kto), str(ppo), "--out", str(tmp_path / "c.png")])
    panels = {axes.get_title(): axes for axes in drawn[0].axes}
    assert {line.get_ydata()[0] for line in panels["kl"].lines} == {1.0}
    assert {line.get_ydata()[0] for line in panels[series.REFERENCE_POINT].lines} == {2.0}


def test_every_panel_has_names_on_its_axes(tmp_path, monkeypatch):
    """Metrics say step, y~x both metrics, histograms the number and the share."""
    pictures = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(pictures.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    run = write_run(tmp_path / "run", kl=2.0, reward=1.0)
    write_samples(run)
    plot.main(
        [str(run), "--keys", "loss,reward~kl,histogram:tokens", "--out", str(tmp_path / "c.png")]
    )
    names = [(axes.get_xlabel(), axes.get_ylabel()) for axes in drawn[0].axes]
    assert names == [("step", ""), ("kl", "reward"), ("tokens", "share of samples")]
    plot.main([str(run), "--out", str(tmp_path / "c.png")])
    assert all(axes.get_xlabel() for axes in drawn[1].axes)
    assert {"histogram:reward", "histogram:tokens"} <= set(
        plot.drawable({"run": series.read_run(run)}, {"run": series.read_samples(run)}, "")
    )


def write_samples(run: Path) -> None:
    """Write a samples.jsonl with three logged steps, a broken line, text to escape."""
    with open(run / "samples.jsonl", "w") as file:
        for step in (1, 10, 20):
            for i in range(4):
                row = {
                    "step": step,
                    "prompt": "a <b>?",
                    "response": f"r{step} & {i}",
                    "reward": i + step,
                }
                file.write(json.dumps(row | {"tokens": step * i}) + "\n")
        file.write('{"step": 20, "rew')


def test_histograms_are_of_the_first_and_the_last_step(tmp_path):
    """Numbers of the steps between, and values that are not finite, are left out."""
    run = write_run(tmp_path / "run")
    write_samples(run)
    rows = series.read_samples(run)
    assert series.distributions(rows, "tokens") == ([0, 1, 2, 3], [0, 20, 40, 60])
    rows[0]["tokens"], rows[1]["tokens"] = math.nan, None
    assert series.distributions(rows, "tokens")[0] == [2, 3]
    assert series.distributions(rows, "nothing") == ([], [])


def test_the_table_compares_the_ends_of_runs(tmp_path, capsys):
    """Training: the mean of the last ten logged steps. Evaluation: the last, and the best."""
    a, b = write_run(tmp_path / "a", steps=60), write_run(tmp_path / "b", steps=5)
    with open(a / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "eval/loss": 0.9}\n')
    plot.main([str(a), str(b), "--table", "--keys", "loss"])
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    cells = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}
    losses = [value for _, value in series.read_run(a)["loss"]][-10:]
    assert cells[""] == ["a", "b"] and cells["steps"] == ["61", "5"]
    assert cells["loss"][0] == f"{sum(losses) / 10:.4g}"
    assert cells["eval/loss"] == [f"0.9 ({0.7 * math.exp(-60 / 50):.4g})", "-"]


def test_the_page_needs_nothing_else(tmp_path, capsys):
    """It holds numbers, curves, samples, flags and packages, escaped, and needs no file."""
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", reward=1.0)
    write_samples(run)
    (run / "config.json").write_text('{"lr": 0.125, "template": "<i>"}')
    (run / "environment.json").write_text('{"device": "CPU", "packages": {"torch": "9.9"}}')
    plot.main([str(run), "--html", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    assert "<svg" in text and "0.125" in text and "&lt;i&gt;" in text and "9.9" in text
    assert "a &lt;b&gt;?" in text and "r20 &amp; 3" in text and "r10" not in text
    assert not re.search(r"(src|href)=\"(?!#)", text.replace("xlink:href", "href"))
    (run / "config.json").write_text("[")  # a run that died early: the page says what is left
    plot.main([str(run), "--html", str(tmp_path / "page.html")])
    assert page.read_object(run / "config.json") == {}
