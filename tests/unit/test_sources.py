"""Weighted training files and named evaluation sets: what a word means, and which rows are read."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import read_metrics

import hub
import sources
import train_distill
import train_dpo
import train_kto
import train_nash
import train_online_dpo
import train_ppo
import train_reinforce
import train_rm
import train_sft
import train_steerlm
import training
from data.blend import Blend, make_blend

BLENDS = [  # (rows of each file, share of each)
    ((10, 20), (0.7, 0.3)),
    ((1, 99), (0.5, 0.5)),
    ((7, 7, 7), (0.2, 0.2, 0.6)),
    ((5, 3, 90, 2), (0.9, 0.02, 0.05, 0.03)),
    ((4,), (1.0,)),
]


def blend_of(sizes: tuple[int, ...], shares: tuple[float, ...], folder: Path) -> Blend:
    """Return the blend of files with that many rows."""
    words = []
    for i, share in enumerate(shares):
        (folder / f"{i}.jsonl").touch()
        words.append(f"{folder / str(i)}.jsonl:{share}")
    return make_blend(words, np.cumsum([0, *sizes]))


@pytest.mark.parametrize(("sizes", "shares"), BLENDS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_blend_gives_every_file_its_share_everywhere(sizes, shares, shuffle, tmp_path: Path):
    """Within one example in an epoch, and within one for each file in any stretch of it.

    Across epochs no row of a file is read k + 1 times before all of them were read k times.
    """
    blend, n = blend_of(sizes, shares, tmp_path), sum(sizes)
    counts = Counter()
    for epoch in range(4):
        examples = blend.epoch(epoch, 5, shuffle)
        assert len(examples) == n
        file = np.searchsorted(blend.start, examples, side="right") - 1
        for i, share in enumerate(shares):
            of_file = np.cumsum(file == i)
            assert abs(of_file[-1] - share * n) < 1
            for first in range(0, n, max(1, n // 7)):
                inside = of_file[-1] - (of_file[first - 1] if first else 0)
                assert abs(inside - share * (n - first)) <= len(sizes) + 1
        for example in examples.tolist():
            counts[example] += 1
            i = int(np.searchsorted(blend.start, example, side="right")) - 1
            first, end = blend.start[i], blend.start[i + 1]
            assert counts[example] - min(counts[row] for row in range(first, end)) <= 1


def test_a_blend_is_a_function_of_seed_and_step(tmp_path: Path):
    """Steps asked for alone are those of the whole run; another seed has another order."""

    def steps(seed: int, total: int = 9) -> training.Steps:
        blend = blend_of((10, 20), (0.7, 0.3), tmp_path)
        return training.Steps(30, 8, seed, True, 4, total, blend)

    whole = [steps(3).examples(step).tolist() for step in range(9)]
    assert [len(part) for part in whole] == [8, 8, 8, 6, 8, 8, 8, 6, 8]
    assert steps(3).examples(7).tolist() == whole[7]
    assert steps(4).examples(0).tolist() != whole[0]
    assert whole[0] != whole[4]
    alone = blend_of((9,), (1.0,), tmp_path)  # a pass has an order of its own
    assert alone.epoch(0, 3, True).tolist() != alone.epoch(1, 3, True).tolist()
    assert steps(3).visited().tolist() == sorted({row for part in whole for row in part})
    plain = training.Steps(30, 8, 3, False, 4, 9, blend_of((10, 20), (0.7, 0.3), tmp_path))
    rows = np.concatenate([plain.examples(step) for step in range(4)])
    assert rows[rows < 10].tolist() == [k % 10 for k in range(21)]
    assert rows[rows >= 10].tolist() == list(range(10, 19))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["a.jsonl:0.5", "b.jsonl"], "b.jsonl has no weight"),
        (["a.jsonl:0", "b.jsonl:1"], "must be above 0"),
        (["a.jsonl:-1"], "must be above 0"),
        (["a.jsonl:nan"], "must be above 0"),
        (["a.jsonl:inf"], "must be above 0"),
        (["a.jsonl:1.2.3"], "must be above 0"),
        (["a.jsonl:1e9", "b.jsonl:1"], "less than one"),
    ],
)
def test_weights_that_cannot_be_are_refused(words, complaint, tmp_path: Path, monkeypatch):
    """The message names the file and what to do."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(f"{name}.jsonl").touch()
    with pytest.raises(ValueError, match=complaint):
        make_blend(words, np.array([0, 10, 20]))
    with pytest.raises(ValueError, match="no row of it is left"):
        make_blend(["a.jsonl:1", "b.jsonl:1"], np.array([0, 10, 10]))


def test_paths_come_first_and_shards_share_a_weight(tmp_path: Path, monkeypatch):
    """Signs of a path that is there belong to it; one weight counts for all files of a pattern."""
    monkeypatch.chdir(tmp_path)
    for name in ("a:0.5", "x=y.jsonl", "s1.jsonl", "s2.jsonl", "t.jsonl"):
        Path(name).touch()
    assert sources.read("a:0.5", "data") == sources.Source("a:0.5")
    assert sources.read("a:0.5:2", "data") == sources.Source("a:0.5", weight="2")
    assert sources.read("x=y.jsonl", "eval_data") == sources.Source("x=y.jsonl")
    assert sources.read("z=t.jsonl", "eval_data") == sources.Source("t.jsonl", "z")
    assert sources.read("org/name:test:0.3", "data") == sources.Source(
        "org/name:test", weight="0.3"
    )
    assert sources.read("org/name:test", "data") == sources.Source("org/name:test")
    assert sources.shares(["a:0.5", "t.jsonl"]) == []
    assert sources.shares(["s*.jsonl:3", "t.jsonl:1"]) == [0.75, 0.25]
    blend = make_blend(["s*.jsonl:3", "t.jsonl:1"], np.array([0, 2, 6, 12]))
    assert blend.start == (0, 6, 12) and blend.quota == (9, 3)
    assert "s*.jsonl 9 (75.0%) of 6 rows, each 1.50 times" in blend.describe()


def test_the_hubs_files_keep_name_and_weight(monkeypatch):
    """A data set of the hub may be a set of --eval-data; of a blend, if it is one file."""
    files = {"o/one": ["/c/1.parquet"], "o/two": ["/c/1.parquet", "/c/2.parquet"]}
    monkeypatch.setattr(hub, "row_files", lambda name: files[name])
    config = train_sft.Config(data=["o/one:0.5"], eval_data=["x=o/two", "o/one"])
    hub.resolve(config, (), ("data", "eval_data"))
    assert config.data == ["/c/1.parquet:0.5"]
    assert config.eval_data == ["x=/c/1.parquet", "x=/c/2.parquet", "/c/1.parquet"]
    with pytest.raises(ValueError, match="2 files and one weight"):
        hub.resolve(train_sft.Config(data=["o/two:0.5"]), (), ("data",))


def test_named_sets():
    """Files of one name are one set; --best-by puts its set first."""
    words = ["a=1", "2", "b=3", "a=4"]
    assert sources.named_sets(words) == {"a": ["1", "4"], "": ["2"], "b": ["3"]}
    assert list(sources.named_sets(words, "b")) == ["b", "a", ""]
    with pytest.raises(ValueError, match=r"--best-by c is not the name .* \(a, b\)"):
        sources.named_sets(words, "c")


SAMPLING = {"max_new_tokens": 4, "reward": "length:3"}
SCRIPTS = {  # script -> module, rows, flags of its own
    "sft": (train_sft, "sft", {}),
    "dpo": (train_dpo, "preferences", {}),
    "kto": (train_kto, "labels", {}),
    "rm": (train_rm, "preferences", {}),
    "distill": (train_distill, "sft", {"teacher": "MODEL"}),
    "ppo": (train_ppo, "sft", SAMPLING),
    "reinforce": (train_reinforce, "sft", SAMPLING),
    "online_dpo": (train_online_dpo, "sft", SAMPLING),
    "nash": (train_nash, "sft", SAMPLING),
}


@pytest.fixture
def halves(toy: Path, tmp_path: Path):
    """Return a function that writes the halves of a file of the toy world, of 12 rows each."""

    def write(name: str) -> tuple[Path, Path]:
        lines = (toy / "world" / f"{name}.jsonl").read_text().splitlines(True)
        files = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
        for i, file in enumerate(files):
            file.write_text("".join(lines[12 * i : 12 * i + 12]))
        return files

    return write


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_blends_and_evaluates_sets_apart(name, halves, toy, tmp_path, train, capsys):
    """Examples come in the shares asked for; a named set has the metrics that it has alone."""
    module, rows, own = SCRIPTS[name]
    one, two = halves(rows)
    own = {key: toy / "model" if value == "MODEL" else value for key, value in own.items()}
    flags = {"model": toy / "model", "batch_size": 8, "max_steps": 1, "lr": 0.0, **own}
    got = train(
        module,
        tmp_path / "blend",
        data=[f"{one}:3", f"{two}:1"],
        eval_data=[f"a={one}", f"b={two}"],
        best_by="b",
        **flags,
    )[-1]
    said = capsys.readouterr().out
    assert "one.jsonl 18 (75.0%) of 12 rows" in said and "two.jsonl 6 (25.0%)" in said
    for set_name, file in (("a", one), ("b", two)):
        alone = train(module, tmp_path / set_name, data=[one, two], eval_data=[file], **flags)[-1]
        assert alone.keys() == {"step"} | {
            key.replace(f"/{set_name}/", "/") for key in got if f"eval/{set_name}/" in key
        }
        for key, value in alone.items():
            if key != "step":
                assert got[key.replace("eval/", f"eval/{set_name}/")] == pytest.approx(value)


def test_the_chosen_set_decides_what_is_best(halves, toy: Path, tmp_path: Path, train):
    """A set that gets worse beside one that gets better: best/ is of another step for each."""
    one, two = halves("sft")
    rows = [json.loads(line) for line in two.read_text().splitlines()]
    two.write_text("".join(json.dumps({**row, "response": "zzz zz"}) + "\n" for row in rows))
    flags = {"model": toy / "model", "data": one, "batch_size": 4, "lr": 1e-2, "epochs": 4}
    flags |= {"eval_every": 1, "save_every": 12, "eval_data": [f"good={one}", f"bad={two}"]}
    best = {}
    for name in ("", "bad"):
        out = tmp_path / f"best{name}"
        train(train_sft, out, **flags, **({"best_by": name} if name else {}))
        state = json.loads((out / "step_12" / "state.json").read_text())
        losses = {
            row["step"]: row[f"eval/{name or 'good'}/loss"]
            for row in read_metrics(out)
            if "eval/good/loss" in row
        }
        best[name] = state["best_step"]
        assert best[name] == min(losses, key=losses.get)
    assert best[""] != best["bad"]


def test_a_blend_resumes_exactly(halves, toy: Path, tmp_path: Path, train):
    """Stopped after three steps and resumed: the losses of a whole run, to the last digit."""
    one, two = halves("sft")
    flags = {"model": toy / "model", "data": [f"{one}:0.8", f"{two}:0.2"], "batch_size": 5}
    flags |= {"epochs": 2, "lr": 1e-3, "schedule": "constant", "warmup": 0.0, "save_every": 3}
    whole = train(train_sft, tmp_path / "whole", **flags)
    train(train_sft, tmp_path / "parts", **flags, max_steps=3)
    assert train(train_sft, tmp_path / "parts", **flags, resume="auto") == whole
    assert len(whole) == 10


def test_scripts_that_write_new_rows_refuse_weights(halves, toy: Path, tmp_path: Path):
    """Their files of rows are others than those of --data: the weights would have no effect."""
    one, two = halves("attributes")
    words = ["--model", str(toy / "model"), "--out", str(tmp_path / "out")]
    words += ["--data", f"{one}:1", f"{two}:2"]
    for module, more in ((train_steerlm, []), (train_sft, ["--attributes"])):
        with pytest.raises(ValueError, match="with weights, FILE:WEIGHT, is not supported"):
            module.main([*words, *more])
