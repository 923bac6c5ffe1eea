"""demo.py: its commands are valid, its stages run in order, and a failed stage stops it."""

import importlib
import time

import pytest

import demo
from commandline import parse
from stages import Running, Stage, run_stages, status


@pytest.mark.parametrize("quick", [True, False])
def test_every_training_command_parses(quick, tmp_path):
    """The flags of every train script exist and their values fit."""
    lines = [line for stage in demo.commands(tmp_path, 0, quick).values() for line in stage]
    training = [line.split() for line in lines if line.startswith("train_")]
    assert len(training) == 12
    for script, *words in training:
        config = parse(importlib.import_module(script.removesuffix(".py")).Config, "", words)
        assert str(tmp_path) in config.out


def write_stages(tmp_path, lines, needs):
    """Return stages of commands that are files. lines: name -> its commands."""
    stages = []
    for name, texts in lines.items():
        files = []
        for i, text in enumerate(texts):
            file = tmp_path / f"{name}_{i}.py"
            file.write_text(
                f"with open({str(tmp_path / 'order')!r}, 'a') as f:\n f.write('{name}{i} ')\n{text}"
            )
            files.append(str(file))
        stages.append(Stage(name, needs.get(name, ""), files, tmp_path / f"logs/{name}.log"))
    return stages


def test_a_stage_that_waits_for_nothing_is_refused(tmp_path):
    """Its need is no stage: the others would run, and it would wait for ever."""
    stages = [Stage("a", "", ["-c pass"], tmp_path / "a"), Stage("b", "x", [], tmp_path / "b")]
    with pytest.raises(ValueError, match="stage b needs x, which is none of the stages"):
        list(run_stages(stages))


def test_stages_run_after_the_stage_they_need(tmp_path):
    """Every command runs once, none before the last command of the stage that it needs."""
    lines = {"c": [""], "b": ["", ""], "a": ["", "import time; time.sleep(0.3)"], "d": [""]}
    stages = write_stages(tmp_path, lines, {"b": "a", "c": "b"})
    done = list(run_stages(stages, workers=2))
    order = (tmp_path / "order").read_text().split()
    assert sorted(order) == ["a0", "a1", "b0", "b1", "c0", "d0"]
    assert [word for word in order if word != "d0"] == ["a0", "a1", "b0", "b1", "c0"]
    assert {item.stage.name for item in done} == set(lines)
    assert [item.number for item in done] == [1, 2, 3, 4]
    assert next(item for item in done if item.stage.name == "a").seconds >= 0.3


def test_finished_stages_are_not_run_again(tmp_path):
    """A second call runs only the stages whose commands changed, or that failed."""
    stages = write_stages(
        tmp_path, {"a": [""], "b": [""], "c": ["raise SystemExit(3)"]}, {"b": "a"}
    )
    with pytest.raises(SystemExit):
        list(run_stages(stages, workers=1))
    (tmp_path / "c_0.py").write_text("")
    (tmp_path / "order").write_text("")
    stages[1] = stages[1]._replace(lines=[*stages[1].lines, str(tmp_path / "c_0.py")])
    assert len(list(run_stages(stages))) == 3
    assert (tmp_path / "order").read_text().split() == ["b0"]


def test_a_failed_stage_stops_the_demo_and_shows_its_log(tmp_path):
    """The message has the command and the end of its log; what else runs is stopped."""
    slow = "import time; time.sleep(60)"
    lines = {"a": ["import time; time.sleep(0.3); print('the reason'); raise SystemExit(3)"]}
    lines |= {"b": [slow], "c": [""]}
    stages = write_stages(tmp_path, lines, {"c": "a"})
    start = time.monotonic()
    with pytest.raises(SystemExit, match=r"(?s)a_0\.py\nfailed \(3\).*a\.log:\nthe reason"):
        list(run_stages(stages, workers=2))
    assert time.monotonic() - start < 20
    assert "c0" not in (tmp_path / "order").read_text()


def test_the_screen_shows_the_last_step_of_the_running_command(tmp_path):
    """The bar is that of the command's own output, not of one before it in the same log."""
    log = tmp_path / "dpo.log"
    log.write_text("step 9/10: loss 0.1\n")
    stage = Stage("dpo, seed 0", "", ["train_dpo.py --lr 1", "-m data.toyworld"], log)
    run = Running(stage, None, log.stat().st_size)
    assert "9/10" not in status(run)
    with log.open("a") as file:
        file.write("step 1/4: loss 0.5\nstep 2/4: loss 0.4, reward 1\nstep 2: eval/loss 1\n")
    line = status(run)
    assert "train_dpo.py" in line
    assert line.count("█") == line.count("░") > 0
    assert line.endswith("2/4  loss 0.4, reward 1")
    assert "data.toyworld" in status(Running(stage, None, 0, at=1))


def test_the_report_averages_over_seeds(tmp_path):
    """A cell is the mean over the seeds; a column that no seed has is a dash."""
    columns = dict.fromkeys(demo.COLUMNS, 0.5) | {"rows": 100, "kl": None}
    results = {}
    for seed, good in ((0, 0.2), (1, 0.6)):
        names = [*demo.TABLE, "steerlm short", "steerlm long"]
        results[seed] = {name: columns | {"good": good} for name in names}
        results[seed]["rm"] = {"accuracy": 0.9, "correlation": 0.8}
    seconds = {demo.stage_name(seed, stage): 60.0 for seed in results for stage in demo.AFTER}
    lines = demo.report(results, seconds).splitlines()
    cells = lines[1].split()
    assert cells[:3] == ["sft", "0.400", "0.500"]
    assert cells[9:13] == ["-", "60", "0.200", "0.600"]
    # The spread of a share over prompts: sqrt(p (1 - p) / n), averaged over the seeds.
    assert cells[-1] == f"{((0.2 * 0.8 / 100) ** 0.5 + (0.6 * 0.4 / 100) ** 0.5) / 2:.3f}"


def test_gains_within_the_noise_are_marked():
    """A gain is marked unless it is at least twice its standard error over prompts."""
    columns = dict.fromkeys(demo.COLUMNS, 0.5) | {"rows": 100, "good": 0.5}
    scores = {name: dict(columns) for name in [*demo.TABLE, "steerlm short", "steerlm long"]}
    scores["rm"] = {"accuracy": 0.9, "correlation": 0.8}
    scores["dpo"]["good"] = 0.7  # se: sqrt((0.21 + 0.25) / 100) = 0.068
    scores["kto"]["good"] = 0.6
    seconds = {demo.stage_name(0, stage): 60.0 for stage in demo.AFTER}
    lines = demo.report({0: scores}, seconds).splitlines()
    assert "noise" not in next(line for line in lines if line.startswith("dpo over"))
    assert "noise" in next(line for line in lines if line.startswith("kto over"))
    assert demo.noise("dpo", {0: scores, 1: scores}) == pytest.approx((0.0092 / 4) ** 0.5)
