"""real.py: its stages run in order on a tiny model, and its numbers are those of the files."""

import importlib
import math
from pathlib import Path

import pytest

import real
from data.rows import read_rows, write_rows

SHORTER = {  # to make the commands of --quick quicker
    "--max-new-tokens 64": "--max-new-tokens 6",
    "--test 40": "--test 4",
    "--max-steps 2": "--max-steps 1",
}


def run_line(line: str) -> None:
    """Run a command line of a stage in this process."""
    name, *words = line.removeprefix("-m ").split()
    importlib.import_module(name.removesuffix(".py")).main(words)


@pytest.mark.slow
def test_the_stages_run_and_are_measured(toy: Path, tmp_path: Path):
    """All commands of --quick work on a tiny model; the table reads what they wrote."""
    home = tmp_path / "seed_0"
    real.write_plain_rows(home)
    finished = {""}
    for stage in real.all_stages(tmp_path, [0], True, str(toy / "model")):
        assert stage.needs in finished
        finished.add(stage.name)
        for line in stage.lines:
            for long, short in SHORTER.items():
                if "best_of_n" not in line:  # needs time for some answers to end
                    line = line.replace(long, short)
            if "verifiable make" not in line and "--template" not in line:
                line += " --template zephyr"  # the tiny model has no chat template
            run_line(line)
        if "pairs" in stage.name:  # hardly any answer of a random model ends
            rows = read_rows(home / "data/train.jsonl")
            pairs = [{"prompt": row["prompt"], "chosen": "yes.", "rejected": "no"} for row in rows]
            write_rows(home / "pairs/pairs.jsonl", pairs[:8])
        assert real.result_of(home, stage.log.stem)
    scores = {name: real.scores_of(home, name) for name in real.TABLE}
    assert scores["start"]["kl"] == 0 and scores["reinforce"]["rows"] == 4
    assert len({scores[name]["perplexity"] for name in ("start", "dpo", "dpo lora", "kto")}) == 4
    text = real.report({0: scores, 1: scores})
    assert f"{scores['dpo']['perplexity']:.2f}" in text


def test_perplexity_is_that_of_the_rest_of_each_paragraph(tmp_path: Path):
    """Each paragraph is a prompt, its first sentence, and a response, all others."""
    real.write_plain_rows(tmp_path)
    rows = list(read_rows(tmp_path / "data/plain.jsonl"))
    text = real.PLAIN_TEXT.read_text()
    assert "".join(row["prompt"] + row["response"] + "\n" for row in rows) == text
    assert all(len(row["response"].split()) > 20 for row in rows)


def test_the_report_says_what_was_gained_and_forgotten():
    """Gains are over the start of the same seed; perplexity is relative to it."""
    start = dict.fromkeys(real.COLUMNS, 1.0) | {"all": 0.25, "rows": 100.0, "perplexity": 20.0}
    scores = {name: dict(start) for name in real.TABLE}
    other = {name: dict(start) | {"all": 0.35} for name in real.TABLE}
    scores["dpo"] |= {"all": 0.5, "perplexity": 21.0}
    other["dpo"] |= {"all": 0.4, "perplexity": 22.0}
    lines = real.report({0: scores, 3: other}).splitlines()
    assert "dpo: all held +0.150 (+0.250, +0.050), perplexity of plain text +7.5%" in lines
    spread = (math.sqrt(0.5 * 0.5 / 100) + math.sqrt(0.4 * 0.6 / 100)) / 2
    assert next(line for line in lines if line.startswith("dpo ")).endswith(
        f"0.500, 0.400 ± {spread:.3f}"
    )
