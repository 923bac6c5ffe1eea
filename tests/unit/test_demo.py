"""demo.py: its commands are valid, its stages run in order, and a failed stage stops it."""

import importlib
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import demo
from config import parse


@pytest.mark.parametrize("quick", [True, False])
def test_every_training_command_parses(quick, tmp_path):
    """The flags of every train script exist and their values fit."""
    lines = [line for stage in demo.commands(tmp_path, 0, quick).values() for line in stage]
    training = [line.split() for line in lines if line.startswith("train_")]
    assert len(training) == 12
    for script, *words in training:
        config = parse(importlib.import_module(script.removesuffix(".py")).Config, "", words)
        assert str(tmp_path) in config.out


def test_stages_run_after_the_stage_they_need(tmp_path, monkeypatch):
    """Every command runs once, none before the last command of the stage that it needs."""
    finished = []
    finished_before = {}  # command -> commands that were finished when it started

    def record(line, log):
        finished_before[line] = list(finished)
        time.sleep(0.005)
        finished.append(line)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(demo, "python", record)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    runner = demo.Runner(tmp_path, [0, 1], quick=True)
    runner.run()
    stages = list(runner.lines.values())
    lines = [line for seed in stages for stage in seed.values() for line in stage]
    assert sorted(finished) == sorted(lines)
    for seed in stages:
        for stage, needed in demo.AFTER.items():
            assert seed[needed][-1] in finished_before[seed[stage][0]]


def test_a_failed_stage_stops_the_demo_and_shows_its_log(tmp_path, monkeypatch):
    """The message has the command and the end of its log; nothing that needs the stage runs."""
    order = []
    lock = threading.Lock()

    def fail_sft(line, log):
        with lock:
            order.append(line)
        Path(log).write_text("the reason")
        return SimpleNamespace(returncode=int("/sft.jsonl --out" in line))

    monkeypatch.setattr(demo, "python", fail_sft)
    with pytest.raises(SystemExit, match=r"(?s)train_sft\.py .*failed \(1\).*the reason"):
        demo.Runner(tmp_path, [0], quick=True).run()
    assert not any("train_dpo" in line or "train_ppo" in line for line in order)


def test_the_report_averages_over_seeds(tmp_path):
    """A cell is the mean over the seeds; a column that no seed has is a dash."""
    columns = dict.fromkeys(demo.COLUMNS, 0.5) | {"rows": 100, "kl": None}
    results = {}
    for seed, good in ((0, 0.2), (1, 0.6)):
        names = [*demo.TABLE, "steerlm short", "steerlm long"]
        results[seed] = {name: columns | {"good": good} for name in names}
        results[seed]["rm"] = {"accuracy": 0.9, "correlation": 0.8}
    seconds = {(seed, stage): 60.0 for seed in results for stage in demo.AFTER}
    lines = demo.report(results, seconds).splitlines()
    cells = lines[1].split()
    assert cells[:3] == ["sft", "0.400", "0.500"]
    assert cells[9:13] == ["-", "60", "0.200", "0.600"]
    # The spread of a share over prompts: sqrt(p (1 - p) / n), averaged over the seeds.
    assert cells[-1] == f"{((0.2 * 0.8 / 100) ** 0.5 + (0.6 * 0.4 / 100) ** 0.5) / 2:.3f}"
