"""data/prepare.py on the command line: rows in the public sets' form in, rows for training out."""

import builtins
import gzip
import json
import sys
import types
from pathlib import Path

import pytest

from data import prepare
from data.formats import preference_row, sft_row


def save(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(folder: Path) -> dict[str, list]:
    """Return the rows of every file written, temporary ones included."""
    return {
        p.name: [json.loads(line) for line in p.read_text().splitlines()]
        for p in sorted(folder.iterdir())
    }


def run(tmp_path: Path, name: str, *files: Path, limit: int = 0) -> dict[str, list]:
    """Run the command on files; check that the train scripts take every row written."""
    out = tmp_path / "out"
    prepare.main([name, "--out", str(out), "--files", *map(str, files), "--limit", str(limit)])
    written = load(out)
    for file, rows in written.items():
        for row in rows:
            preference_row(row) if file.endswith("_prefs.jsonl") else sft_row(row)
    return written


def chat(*turns: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def ultrafeedback_row(prompt: str, chosen: str, rejected: str, scores: tuple[float, float]) -> dict:
    sides = chat(prompt, chosen), chat(prompt, rejected)
    return {
        "prompt": prompt,
        "prompt_id": "f00",
        "chosen": sides[0],
        "rejected": sides[1],
        "messages": sides[0],
        "score_chosen": scores[0],
        "score_rejected": scores[1],
    }


ULTRAFEEDBACK = [
    ultrafeedback_row("Name a colour.", "Blue.", "Dog.", (8.5, 2.0)),
    ultrafeedback_row("Name a fruit.", "Fig.", "Fig.", (7.0, 7.0)),
    ultrafeedback_row("Name a tree.", "Oak.", " ", (9.0, 1.0)),
    ultrafeedback_row("Name a bird.", "Owl.", "Crow.", (7.0, 7.0)),
]
ULTRAFEEDBACK_PREFS = [
    {
        "prompt": "Name a colour.",
        "chosen": chat("Name a colour.", "Blue."),
        "rejected": chat("Name a colour.", "Dog."),
        "chosen_reward": 8.5,
        "rejected_reward": 2.0,
    },
    {
        "prompt": "Name a bird.",
        "chosen": chat("Name a bird.", "Owl."),
        "rejected": chat("Name a bird.", "Crow."),
        "chosen_reward": 7.0,
        "rejected_reward": 7.0,
    },
]
ULTRAFEEDBACK_SFT = [
    {"messages": chat(f"Name a {what}.", answer)}
    for what, answer in [("colour", "Blue."), ("fruit", "Fig."), ("tree", "Oak."), ("bird", "Owl.")]
]


def test_ultrafeedback(tmp_path, capsys):
    """Preferences keep messages, scores and ties; sft is the chosen side; skips are counted."""
    splits = "test_prefs", "train_sft"
    files = [save(tmp_path / f"{split}-00000-of-00001.jsonl", ULTRAFEEDBACK) for split in splits]
    assert run(tmp_path, "ultrafeedback", *files) == {
        "test_prefs.jsonl": ULTRAFEEDBACK_PREFS,
        "train_sft.jsonl": ULTRAFEEDBACK_SFT,
    }
    prefs, sft = capsys.readouterr().out.splitlines()
    skipped = "skipped 1 x chosen equals rejected, 1 x an answer is empty"
    assert prefs.endswith(f"test_prefs.jsonl: 2 written; {skipped}")
    assert sft.endswith("train_sft.jsonl: 4 written")


def test_ultrachat(tmp_path, capsys):
    """Conversations keep all their turns; one with an empty turn is counted."""
    talk = chat("Hi.", "Hello.", "Tea?", "Please.")
    rows = [{"prompt": "Hi.", "messages": talk}, {"prompt": "Hi.", "messages": chat("Hi.", " ")}]
    files = [save(tmp_path / "train_sft-00000-of-00001.jsonl", rows)]
    assert run(tmp_path, "ultrachat", *files) == {"train_sft.jsonl": [{"messages": talk}]}
    assert "1 written; skipped 1 x a turn is empty" in capsys.readouterr().out


def test_hh(tmp_path, capsys):
    """Transcripts that differ only in the last answer pass unchanged; others are skipped."""
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Tea or coffee?\n\nAssistant:"
    other = start.replace("Tea", "Milk")
    rows = [
        {"chosen": start + " Tea.", "rejected": start + " The latter."},
        {"chosen": start + " Tea.", "rejected": start + " Tea."},
        {"chosen": start + " Tea.", "rejected": start},
        {"chosen": start + " Tea.", "rejected": other + " Milk."},
        {"chosen": start + " Tea.", "rejected": start + " No.\n\nHuman: Why?"},
        {"chosen": "Tea.", "rejected": "Coffee."},
    ]
    packed = tmp_path / "helpful-base" / "train.jsonl.gz"
    packed.parent.mkdir()
    with gzip.open(packed, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    more = save(
        tmp_path / "harmless-base" / "train.jsonl",
        [{"chosen": start + " A", "rejected": start + " B"}],
    )
    assert run(tmp_path, "hh", packed, more) == {
        "train_prefs.jsonl": [
            {"chosen": start + " Tea.", "rejected": start + " The latter."},
            {"chosen": start + " A", "rejected": start + " B"},
        ]
    }
    printed = capsys.readouterr().out
    skipped = "skipped 1 x chosen equals rejected, 1 x an answer is empty"
    assert f"train_prefs.jsonl: 2 written; {skipped}" in printed
    for reason in (
        "differ before the last answer",
        "the last turn is the Human's",
        "not a transcript",
    ):
        assert printed.count(reason) == 1


def test_tldr_of_trl(tmp_path):
    """TRL's rows are preferences and pass unchanged."""
    row = {
        "prompt": "SUBREDDIT: r/tea\n\nTITLE: T\n\nPOST: P\n\nTL;DR:",
        "chosen": " short",
        "rejected": " long",
    }
    file = save(tmp_path / "validation-00000-of-00001.jsonl", [row])
    assert run(tmp_path, "tldr", file) == {"validation_prefs.jsonl": [row]}


def test_tldr_of_openai(tmp_path, capsys):
    """Comparisons get the usual prompt; a row's split names its file; news are skipped."""
    info = {"id": "t3_1", "post": "I spilt my tea.", "title": "Tea [22F]", "subreddit": "tifu"}
    summaries = [
        {"text": "Spilt it.", "policy": "sup1", "note": ""},
        {"text": " Tea is nice.", "policy": "ref"},
    ]
    row = {
        "info": info,
        "summaries": summaries,
        "choice": 1,
        "worker": "w",
        "batch": "batch3",
        "split": "train",
    }
    news = {
        **row,
        "info": {"id": "x", "article": "News.", "post": None, "title": None, "subreddit": None},
    }
    file = save(tmp_path / "batch3.json", [row, {**row, "choice": 0, "split": "valid1"}, news])
    prompt = "SUBREDDIT: r/tifu\n\nTITLE: Tea [22F]\n\nPOST: I spilt my tea.\n\nTL;DR:"
    assert run(tmp_path, "tldr", file) == {
        "train_prefs.jsonl": [
            {"prompt": prompt, "chosen": " Tea is nice.", "rejected": " Spilt it."}
        ],
        "valid1_prefs.jsonl": [
            {"prompt": prompt, "chosen": " Spilt it.", "rejected": " Tea is nice."}
        ],
    }
    assert "1 x not a Reddit post" in capsys.readouterr().out
    save(file, [{**row, "choice": 2}])
    message = r"batch3\.json:1: not a row of tldr .*choice 2 among 2 summaries"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "tldr", file)


def test_gsm8k(tmp_path, capsys):
    """Marks <<...>> are removed, the last line is "A: answer" without commas; arrays are read."""
    steps = (
        "Half of 2,400 is <<2400/2=1200>>1,200.\n"
        "That is $<<600*2=1200.00>>1,200, or 2 x <<1200/2=600>>600."
    )
    rows = [
        {"question": "How much?", "answer": steps + "\n#### 1,200"},
        {"question": "Why?", "answer": "Because."},
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows, indent=2))
    response = "Half of 2,400 is 1,200.\nThat is $1,200, or 2 x 600.\nA: 1200"
    expected = [{"prompt": "How much?", "response": response, "answer": "1200"}]
    assert run(tmp_path, "gsm8k", tmp_path / "test.json") == {"test_sft.jsonl": expected}
    assert "1 written; skipped 1 x no question, no solution or no '####'" in capsys.readouterr().out


def test_gsm8k_agrees_with_real_rows(tmp_path):
    """Converted rows, put back into the original form, convert to the same rows."""
    real = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "sft_test.jsonl"
    if not real.exists():
        pytest.skip("no real data here")
    expected = [json.loads(line) for line in real.read_text().splitlines()]
    solutions = [r["response"].rpartition("A: ")[0] for r in expected]
    rows = [
        {"question": r["prompt"], "answer": s + "#### " + r["answer"]}
        for r, s in zip(expected, solutions)
    ]
    file = save(tmp_path / "test.jsonl", rows)
    assert run(tmp_path, "gsm8k", file) == {"test_sft.jsonl": expected}


def test_helpsteer2(tmp_path, capsys):
    """Attributes for every answer; a pair for neighbours of one prompt unless they tie."""

    def rated(prompt, response, helpfulness):
        row = {"prompt": prompt, "response": response, "helpfulness": helpfulness}
        return row | others

    others = {"correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 2}

    long = "Hi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nTea?"
    rows = [
        rated("c#", "A language.", 1),
        rated("c#", "A note.", 3),
        rated("x", "1", 2),
        rated("x", "2", 2),
        rated(long, "Yes.", 4),
        rated(long, "No.", 0),
        rated("c#", "", 4),
    ]
    written = run(tmp_path, "helpsteer2", save(tmp_path / "train.jsonl", rows))
    assert written["train_prefs.jsonl"] == [
        {
            "prompt": "c#",
            "chosen": "A note.",
            "rejected": "A language.",
            "chosen_reward": 3,
            "rejected_reward": 1,
        },
        {
            "prompt": chat("Hi", "Hello.", "Tea?"),
            "chosen": "Yes.",
            "rejected": "No.",
            "chosen_reward": 4,
            "rejected_reward": 0,
        },
    ]
    assert written["train_attributes.jsonl"] == [
        {
            "prompt": chat("Hi", "Hello.", "Tea?") if r["prompt"] == long else r["prompt"],
            "response": r["response"],
            "attributes": {"helpfulness": r["helpfulness"], **others},
        }
        for r in rows[:6]
    ]
    printed = capsys.readouterr().out
    assert "train_attributes.jsonl: 6 written; skipped 1 x the answer is empty" in printed
    assert "train_prefs.jsonl: 2 written; skipped 1 x a tie" in printed


def test_parquet(tmp_path):
    """Parquet gives the same as JSON, lists of structs included; shards are joined."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    files = [tmp_path / f"train_prefs-0000{i}-of-00002.parquet" for i in range(2)]
    for file, rows in zip(files, (ULTRAFEEDBACK[:1], ULTRAFEEDBACK[1:])):
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert run(tmp_path, "ultrafeedback", *files) == {"train_prefs.jsonl": ULTRAFEEDBACK_PREFS}


def test_hub(tmp_path, monkeypatch):
    """Without --files every split is read from the hub; --limit holds for each."""
    asked = []

    def load_dataset(hub, configuration, split):
        asked.append((hub, configuration, split))
        return [{"question": f"{split} {i}", "answer": f"So {i}.\n#### {i}"} for i in range(5)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    prepare.main(["gsm8k", "--out", str(tmp_path / "out"), "--limit", "2"])
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    expected = {
        f"{split}_sft.jsonl": [
            {"prompt": f"{split} {i}", "response": f"So {i}.\nA: {i}", "answer": str(i)}
            for i in range(2)
        ]
        for split in ("test", "train")
    }
    assert load(tmp_path / "out") == expected


def test_all_or_nothing(tmp_path):
    """After a bad row, the files of an earlier run are unchanged and no temporary file stays."""
    good = save(tmp_path / "test.jsonl", [{"question": "1+1?", "answer": "It is 2.\n#### 2"}])
    before = run(tmp_path, "gsm8k", good)
    save(good, [{"question": "2+2?", "answer": "It is 4.\n#### 4"}])
    bad = save(tmp_path / "train.jsonl", [{"question": "3+3?", "solution": "6"}])
    with pytest.raises(ValueError):
        run(tmp_path, "gsm8k", good, bad)
    assert load(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "train.jsonl",
            '{"question": "a", "reply": "b"}',
            r"train\.jsonl:1: not a row of gsm8k .*no column 'answer'; the row has question, reply",
        ),
        (
            "train.jsonl",
            '\n{"question": 3, "answer": "b #### 1"}',
            r"train\.jsonl:2: not a row of gsm8k",
        ),
        (
            "train.jsonl",
            '["question", "answer"]',
            r"train\.jsonl:1: not a row of gsm8k .*the row has str: check that",
        ),
        ("train.jsonl", '{"question": "a",', r"train\.jsonl:1: not JSON"),
        ("train.csv", "question,answer", r"train\.csv: unknown kind of file: give \.jsonl"),
        ("train.jsonl", "", r"nothing to write to .* \(the input is empty\)"),
        (
            "train.jsonl",
            '{"question": "a", "answer": "b"}',
            r"nothing to write to .* \(1 x no question, no solution",
        ),
    ],
)
def test_errors_name_place_and_fix(tmp_path, name, text, message):
    """Wrong columns, types, JSON or endings, or no rows: the error names the file and the fix."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "gsm8k", tmp_path / name)
    assert not list(tmp_path.glob("out/*")), "nothing is left behind"


def test_errors_name_what_to_install(tmp_path, monkeypatch):
    """A missing file is named, and a missing package with the command that installs it."""
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist: give --files"):
        run(tmp_path, "gsm8k", tmp_path / "none.jsonl")
    real = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.split(".")[0] in ("datasets", "pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match="pip install pyarrow"):
        run(tmp_path, "gsm8k", tmp_path / "train.parquet")
    with pytest.raises(ImportError, match="pip install datasets"):
        prepare.main(["gsm8k", "--out", str(tmp_path / "out")])
