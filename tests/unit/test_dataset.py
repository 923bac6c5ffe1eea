"""Rows to trees: every format, every kind of bad row, the length limit, the cache, the workers."""

import contextlib
import doctest
import gzip
import json
import math
import os
import re
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data.encode
import data.trees
from data.cache import read_meta
from data.dataset import from_trees, load_dataset
from data.formats import answers_of, preference_row, sft_row
from data.keys import canonical
from data.rows import read_rows
from data.trees import make_batch

BOS, EOS = 1, 2
FIELDS = ("tokens", "scored", "tree_start", "prompt_len", "response_start", "response_len")


def message(role, text):
    return {"role": role, "content": text}


USER, ASSISTANT, SYSTEM = (partial(message, role) for role in ("user", "assistant", "system"))


class Bytes:
    """Byte tokenizer: id = byte + 3."""

    bos = BOS
    eos = EOS
    hash = "bytes"

    def encode(self, text):
        return [byte + 3 for byte in text.encode()]


class Plain:
    """Template bos, prompt, response, eos; of messages, the contents with | between."""

    plain = True
    hash = "plain"

    def __init__(self):
        self.tokenizer = Bytes()
        self.calls = 0

    def pair(self, prompt, responses):
        self.calls += 1
        if "explode" in str(prompt):
            raise ValueError("the template cannot render this")
        head = [BOS, *self.tokenizer.encode(flat(prompt))]
        answers = []
        for response in responses:
            ids = [*self.tokenizer.encode(flat(response)), EOS]
            answers.append((ids, [1] * len(ids)))
        return head, answers, "moved" in str(prompt)

    def conversation(self, messages):
        self.calls += 1
        first = next(k for k, m in enumerate(messages) if m["role"] == "assistant")
        head = [BOS, *self.tokenizer.encode(flat(messages[:first]))]
        ids = []
        scored = []
        for m in messages[first:]:
            turn = [*self.tokenizer.encode(m["content"]), EOS]
            ids += turn
            scored += [int(m["role"] == "assistant")] * len(turn)
        return [(head, (ids, scored))]

    def marks(self, said):
        return set()


class Chat(Plain):
    """The same, but not plain: transcripts become messages."""

    plain = False
    hash = "chat"


def flat(body):
    return body if isinstance(body, str) else "|".join(m["content"] for m in body)


def write(path, rows):
    """Write a JSONL file and return its path; a row of type str or bytes is written as it is."""
    path = Path(path)
    content = b""
    for row in rows:
        if not isinstance(row, (str, bytes)):
            row = json.dumps(row)
        content += (row.encode() if isinstance(row, str) else row) + b"\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def load(path, rows, kind="sft", template=None, **options):
    """Return the data set of some rows, quietly, its cache beside the file."""
    options = {"log": lambda line: None, "cache": Path(path) / "cache", **options}
    file = write(Path(path) / "rows.jsonl", rows)
    return load_dataset([file], kind, template or Plain(), **options)


def trees(ds):
    """Return the trees as lists, [(prompt ids, [(response ids, scored), ...]), ...].

    Reads the arrays by their definition, without code of the library.
    """
    out = []
    for i in range(len(ds)):
        at = int(ds.tree_start[i])
        prompt = ds.tokens[at : at + ds.prompt_len[i]].tolist()
        assert not ds.scored[at : at + len(prompt)].any()
        at += len(prompt)
        answers = []
        for r in range(ds.response_start[i], ds.response_start[i + 1]):
            end = at + int(ds.response_len[r])
            answers.append((ds.tokens[at:end].tolist(), ds.scored[at:end].tolist()))
            at = end
        assert at == ds.tree_start[i + 1]
        out.append((prompt, answers))
    return out


def text(ids):
    return bytes(i - 3 for i in ids if i > 2).decode()


def texts(ds):
    return [(text(prompt), *(text(ids) for ids, _ in answers)) for prompt, answers in trees(ds)]


# Formats.


@pytest.mark.parametrize(
    "keys", [("prompt", "response"), ("prompt", "completion"), ("input", "output")]
)
def test_sft_pairs(keys):
    """Three spellings of a demonstration mean the same; a null counts as an absent key."""
    row = dict(zip(keys, ("Q", "A"))) | {"messages": None, "extra": 3}
    assert sft_row(row) == ("Q", ["A"], {})


def test_sft_conversations():
    """Two spellings of a conversation mean the same; turns after the last assistant's are cut."""
    messages = [SYSTEM("s"), USER("q"), ASSISTANT("a"), USER("q2"), ASSISTANT("a2")]
    assert sft_row({"messages": messages}) == (None, [messages], {})
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[m["role"]], "value": m["content"], "weight": None} for m in messages]
    assert sft_row({"conversations": turns}) == (None, [messages], {})
    row, _, _ = canonical({"conversations": turns[1:], "system": "s"})
    assert sft_row(row) == (None, [messages], {})
    assert sft_row({"messages": [*messages, USER("thanks")]}) == (None, [messages], {})
    assert sft_row({"prompt": "informative", "messages": messages}) == (None, [messages], {})
    row = {"prompt": messages[:2], "completion": messages[2:]}
    assert sft_row(row) == (messages[:2], [messages[2:]], {})


@pytest.mark.parametrize(
    "names", [("chosen", "rejected"), ("chosen_response", "rejected_response")]
)
def test_preference_text(names):
    """Text pairs keep their characters, white space included."""
    row = {"prompt": "Q ", names[0]: " good", names[1]: "bad\n"}
    prompt, responses, columns = preference_row(row)
    assert (prompt, responses) == ("Q ", [" good", "bad\n"])
    assert all(math.isnan(x) for x in columns["reward"] + columns["margin"])


def test_preference_columns():
    """Each response has its reward, under either name; both have the margin."""
    pair = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    for chosen, rejected in (
        ("chosen_reward", "rejected_reward"),
        ("score_chosen", "score_rejected"),
    ):
        row = pair | {chosen: 2, rejected: -1.5, "margin": 3.5}
        assert preference_row(row).columns == {"reward": [2.0, -1.5], "margin": [3.5, 3.5]}


def test_preference_messages():
    """The prompt is what both lists share, up to an assistant turn; or they are answers alone."""
    q = USER("q")
    a = ASSISTANT("a")
    b = ASSISTANT("b")
    s = SYSTEM("s")

    def split(**row):
        return preference_row(row)[:2]

    # UltraFeedback, TRL conversational, and others
    assert split(prompt="about q", chosen=[q, a], rejected=[q, b]) == ([q], [[a], [b]])
    assert split(prompt=[q], chosen=[a], rejected=[b]) == ([q], [[a], [b]])
    assert split(chosen=[s, q, a], rejected=[s, q, b]) == ([s, q], [[a], [b]])
    assert split(prompt=[q], chosen=[q, a], rejected=[q, b]) == ([q], [[a], [b]])
    assert split(prompt="q", chosen=[a], rejected=[b]) == ("q", [[a], [b]])
    # Identical lists are split before the answer all the same.
    assert split(chosen=[q, a], rejected=[q, a]) == ([q], [[a], [a]])
    long = [q, a, USER("more")]
    assert split(chosen=[*long, a], rejected=[*long, b]) == (long, [[a], [b]])
    other = [b, USER("more"), b]
    assert split(chosen=[*long, a], rejected=[q, *other]) == ([q], [[a, USER("more"), a], other])
    # They differ at a user turn: the border is before the last assistant turn that both have.
    assert split(chosen=[*long, a], rejected=[q, a, USER("x"), b]) == (
        [q],
        [[a, USER("more"), a], [a, USER("x"), b]],
    )


def hh(*turns):
    return "".join(
        f"\n\n{'Human' if k % 2 == 0 else 'Assistant'}: {turn}" for k, turn in enumerate(turns)
    )


def test_transcripts():
    """HH transcripts are split after the last shared "Assistant:", never inside a word."""
    row = {
        "chosen": hh("hi", "hello", "why?", "because of it"),
        "rejected": hh("hi", "hello", "why?", "because I say"),
    }
    prompt, responses, _ = preference_row(row, plain=True)
    assert prompt == hh("hi", "hello", "why?") + "\n\nAssistant:"
    # "because " belongs to the answers although they share it.
    assert responses == [" because of it", " because I say"]
    prompt, responses, _ = preference_row(row)
    assert prompt == [USER("hi"), ASSISTANT("hello"), USER("why?")]
    assert responses == [[ASSISTANT("because of it")], [ASSISTANT("because I say")]]
    # An earlier turn differs: all from there on belongs to the responses.
    row = {"chosen": hh("hi", "hello", "why?", "a"), "rejected": hh("hi", "hell", "why?", "b")}
    prompt, responses, _ = preference_row(row, plain=True)
    assert (prompt, responses[1]) == (
        "\n\nHuman: hi\n\nAssistant:",
        " hell\n\nHuman: why?\n\nAssistant: b",
    )
    prompt, responses, _ = preference_row(row)
    assert (prompt, responses[1]) == (
        [USER("hi")],
        [ASSISTANT("hell"), USER("why?"), ASSISTANT("b")],
    )
    # A human turn differs, and one transcript is shorter.
    row = {"chosen": hh("hi", "hello", "why?", "a"), "rejected": hh("hi", "hello")}
    assert preference_row(row, plain=True)[:2] == (
        "\n\nHuman: hi\n\nAssistant:",
        [row["chosen"][23:], " hello"],
    )
    same = hh("hi", "hello", "why?", "a")
    assert preference_row({"chosen": same, "rejected": same}, plain=True)[1] == [" a", " a"]
    same = same[2:]  # some copies of the data lack the leading line feeds
    assert preference_row({"chosen": same, "rejected": same})[0] == [
        USER("hi"),
        ASSISTANT("hello"),
        USER("why?"),
    ]


@settings(max_examples=200)
@given(st.lists(st.sampled_from(["a b", "a c", "", "ab"]), min_size=2, max_size=6), st.data())
def test_transcript_split_loses_nothing(turns, draw):
    """Prompt + response is the transcript; the border is the last shared turn, by brute force."""
    turns = turns[: len(turns) // 2 * 2]
    other = [draw.draw(st.sampled_from([turn, "a b"])) for turn in turns]
    chosen = hh(*turns)
    rejected = hh(*other)
    if turns[0] != other[0]:
        with pytest.raises(ValueError, match="share no"):
            preference_row({"chosen": chosen, "rejected": rejected}, plain=True)
        return
    prompt, responses, _ = preference_row({"chosen": chosen, "rejected": rejected}, plain=True)
    assert [prompt + r for r in responses] == [chosen, rejected]
    shared = max(k for k in range(1, len(turns), 2) if turns[:k] == other[:k])
    assert prompt == hh(*turns[:shared]) + "\n\nAssistant:"


def test_kinds_reach_the_arrays(tmp_path):
    """Prompts, responses, scored flags and columns are in the arrays as defined."""
    rows = [
        {
            "prompt": "Q",
            "chosen": "good",
            "rejected": "ba",
            "chosen_reward": 1,
            "rejected_reward": 0.5,
        },
        {"prompt": "QQ", "chosen": "x", "rejected": "x", "margin": 2},
    ]
    ds = load(tmp_path, rows, "preference")
    assert len(ds) == 2 and texts(ds) == [("Q", "good", "ba"), ("QQ", "x", "x")]
    good, bad = ([*Bytes().encode(answer), EOS] for answer in ("good", "ba"))
    assert trees(ds)[0] == ([BOS, 84], [(good, [1] * 5), (bad, [1] * 3)])
    np.testing.assert_array_equal(ds.columns["reward"], np.float32([1, 0.5, np.nan, np.nan]))
    np.testing.assert_array_equal(ds.columns["margin"], np.float32([np.nan, np.nan, 2, 2]))
    assert ds.counts["identical"] == 1
    assert ds.tree_lengths().tolist() == [2 + 5 + 3, 3 + 2 + 2]
    assert ds.tree_lengths(shared=False).tolist() == [2 * 2 + 5 + 3, 2 * 3 + 2 + 2]
    assert ds.tree_lengths().dtype == ds.tree_lengths(False).dtype == np.int64
    types = dict(zip(FIELDS, ("i4", "u1", "i8", "i4", "i8", "i4")))
    assert {name: getattr(ds, name).dtype for name in FIELDS} == {
        name: np.dtype(t) for name, t in types.items()
    }
    assert all(isinstance(getattr(ds, name), np.memmap) for name in FIELDS)
    ds = load(tmp_path, [{"messages": [USER("q"), ASSISTANT("a"), USER("r"), ASSISTANT("b")]}])
    assert trees(ds)[0][1][0][1] == [1, 1, 0, 0, 1, 1] and ds.columns == {}


# Bad rows.

GOOD = {"prompt": "Q", "response": "A"}
BAD_SFT = [
    ("{", "not JSON"),
    ('{"prompt": "Q"} x', "not JSON"),
    ("[1, 2]", "not a JSON object"),
    ("3", "not a JSON object"),
    ("[" * 100_000, "nested too deeply"),
    ("9" * 5000, "not JSON"),
    (b'{"prompt": "\xff"}', "not UTF-8"),
    ("{}", "nothing to train on.*`prompt`.*`messages`"),
    ({"prompt": "Q"}, "`prompt` but no `response`"),
    ({"response": "Q", "prompt": None}, "`response` but no `prompt`"),
    ({"ask": "Q", "answer": "A"}, "this one has 'ask', 'answer'"),
    ({"prompt": 3, "response": "A"}, "`prompt` must be text, got 3"),
    ({"prompt": "Q", "response": {"a": 1}}, "`response` must be text, got an object"),
    ('{"prompt": "\\ud800", "response": "A"}', "surrogate"),
    ({"messages": []}, "not empty"),
    ({"messages": "hello"}, "list of messages"),
    ({"messages": ["hello"]}, r"messages\[0\]"),
    (
        {"messages": [{"role": "robot", "content": "x"}]},
        "'robot': must be system, user, assistant",
    ),
    ({"messages": [{"content": "x"}]}, "role` is None"),
    (
        {"messages": [USER("q"), {"role": "assistant", "content": None}]},
        r"messages\[1\].content` must be text",
    ),
    ({"messages": [USER("q")]}, "no assistant turn"),
    ({"conversations": [{"from": "human"}]}, r"conversations\[0\].value"),
    ({"prompt": [ASSISTANT("a")], "response": "A"}, "ends with an assistant turn"),
    ({"prompt": "explode", "response": "A"}, "cannot render"),
]
PAIR = {"prompt": "Q", "chosen": "a", "rejected": "b"}
BAD_PREFERENCES = [
    ({"prompt": "Q", "chosen": "a"}, "no `rejected`.*`rejected_response`"),
    ({"prompt": "Q", "rejected": "a"}, "no `chosen`.*`chosen_response`"),
    (GOOD, "no `chosen`"),
    (PAIR | {"rejected": [ASSISTANT("b")]}, "write both alike"),
    (PAIR | {"chosen": [], "rejected": []}, "not empty"),
    (PAIR | {"chosen": 3}, "`chosen` must be text"),
    (PAIR | {"prompt": 3}, "`prompt` must be text"),
    (PAIR | {"chosen_reward": "high"}, "`chosen_reward` must be a finite number"),
    (PAIR | {"score_rejected": True}, "`score_rejected` must be a finite number"),
    (PAIR | {"margin": math.inf}, "`margin` must be a finite number"),
    (PAIR | {"margin": 1e300}, "`margin` must be a finite number"),
    ({"chosen": "a", "rejected": "b"}, "add a `prompt`"),
    ({"chosen": hh("a", "b"), "rejected": hh("c", "d")}, "add a `prompt`"),
    ({"chosen": hh("a", "b"), "rejected": hh("a", "b", "c")}, "ends with a Human turn"),
    ({"chosen": "x" + hh("a", "b"), "rejected": "x" + hh("a", "c")}, "must begin with"),
    (
        {"chosen": [USER("q"), ASSISTANT("a")], "rejected": [USER("r"), ASSISTANT("a")]},
        "share no prompt",
    ),
    (
        {"chosen": [USER("q"), USER("a")], "rejected": [USER("q"), ASSISTANT("a")]},
        "ends with a user turn",
    ),
    (
        {
            "prompt": [USER("q")],
            "chosen": [USER("x"), ASSISTANT("a")],
            "rejected": [ASSISTANT("a")],
        },
        "must begin with",
    ),
]


BAD = [("sft", *case) for case in BAD_SFT] + [("preference", *case) for case in BAD_PREFERENCES]


@pytest.mark.parametrize("kind, bad, reason", BAD)
def test_bad_rows(tmp_path, kind, bad, reason):
    """A bad row stops the run with file:line, reason and flag; if allowed, it is left out."""
    good = GOOD if kind == "sft" else PAIR
    rows = [good, "", bad, good]
    lines = []
    with pytest.raises(ValueError, match=rf"rows\.jsonl:3: .*{reason}.*--max-bad-rows") as error:
        load(tmp_path, rows, kind)
    assert len(str(error.value)) < 500
    ds = load(tmp_path, rows, kind, max_bad_rows=1, log=lines.append)
    assert len(ds) == 2 and (ds.counts["rows"], ds.counts["bad"]) == (3, 1)
    assert "rows.jsonl:3: " in lines[0] and len(lines) == 2


def test_no_tokens(tmp_path):
    """A prompt without tokens, or a response without a scored token, is a bad row."""

    class Odd(Plain):
        def pair(self, prompt, responses):
            head, answers, moved = super().pair(prompt, responses)
            answers = [(ids, [int(prompt != "dull")] * len(ids)) for ids, _ in answers]
            return [] if prompt == "none" else head, answers, moved

    rows = [GOOD, {"prompt": "none", "response": "A"}, {"prompt": "dull", "response": "A"}]
    lines = []
    assert len(load(tmp_path, rows, template=Odd(), max_bad_rows=2, log=lines.append)) == 1
    assert ":2: the prompt has no tokens" in lines[0] and ":3: a response has no token" in lines[1]


def test_bad_row_limit(tmp_path):
    """Ten bad rows are reported, then a count; the limit also holds for cached data."""
    rows = [GOOD] + ["{"] * 12
    for again in range(2):
        lines = []
        ds = load(tmp_path, rows, max_bad_rows=12, log=lines.append)
        assert sum(line.startswith("bad row ") for line in lines) == 10
        assert lines[10] == "... and 2 more bad rows"
        assert ("from cache" in lines[11]) == bool(again) and ds.counts["bad"] == 12
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: .*12 bad.*--max-bad-rows 11"):
        load(tmp_path, rows, max_bad_rows=11)


def test_missing_and_empty(tmp_path):
    """A missing file or an empty result says what to do and leaves no cache."""
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        load_dataset([tmp_path / "nowhere.jsonl"], "sft", Plain(), cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="no rows"):
        load(tmp_path, ["", "  "])
    with pytest.raises(ValueError, match="raise --max-length"):
        load(tmp_path, [GOOD] * 3, max_length=3)
    with pytest.raises(ValueError, match="all 2 rows are bad"):
        load(tmp_path, ["{"] * 2, max_bad_rows=5)
    with pytest.raises(ValueError, match="sft or preference"):
        load(tmp_path, [GOOD], "sfl")
    with pytest.raises(ValueError, match="drop or truncate"):
        load(tmp_path, [GOOD], overlong="cut")
    assert not list((tmp_path / "cache").iterdir())


# Lengths.

words = st.text(alphabet="abc", max_size=12)
pairs = st.lists(
    st.fixed_dictionaries({"prompt": words, "chosen": words, "rejected": words}),
    min_size=1,
    max_size=8,
)


@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(pairs, st.integers(3, 20), st.booleans())
def test_lengths(tmp_path, rows, limit, truncate):
    """Prompt and response fit into the limit.

    Responses are never cut; rows that fit are untouched; a cut prompt keeps bos and as many last
    tokens as fit; a tree is dropped only if no prompt would be left.
    """
    rows.append({"prompt": "", "chosen": "", "rejected": ""})  # a row that always fits
    overlong = "truncate" if truncate else "drop"
    ds = load(tmp_path, rows, "preference", max_length=limit, overlong=overlong)
    expected = []
    cut = 0
    for row in rows:
        longest = max(len(row["chosen"]), len(row["rejected"])) + 1
        prompt = row["prompt"]
        if 1 + len(prompt) + longest > limit:
            room = limit - longest - 1
            if not truncate or room < 1 or not prompt:
                continue
            prompt = prompt[-room:]
            cut += 1
        expected.append((prompt, row["chosen"], row["rejected"]))
    assert texts(ds) == expected
    for prompt, answers in trees(ds):
        assert prompt[0] == BOS
        assert all(len(prompt) + len(ids) <= limit and ids[-1] == EOS for ids, _ in answers)
    c = ds.counts
    assert (c["rows"], c["trees"]) == (len(rows), len(ds))
    assert (c["too_long"], c["truncated"]) == (len(rows) - len(ds), cut)
    assert c["tokens"] == len(ds.tokens) == ds.tree_lengths().sum()
    assert c["scored"] == ds.scored.sum()


def test_truncate_without_bos(tmp_path):
    """A prompt without bos is cut to its last tokens, one at least."""

    class NoBos(Plain):
        def pair(self, prompt, responses):
            head, answers, moved = super().pair(prompt, responses)
            return head[1:], answers, moved

    rows = [{"prompt": "abcdef", "response": "xyz"}, {"prompt": "abcdef", "response": "wxyz"}]
    for limit, expected in ((6, [("ef", "xyz"), ("f", "wxyz")]), (5, [("f", "xyz")])):
        ds = load(tmp_path, rows, template=NoBos(), max_length=limit, overlong="truncate")
        assert texts(ds) == expected


def test_moved_borders_are_counted(tmp_path):
    """Moved borders are counted over the rows that are kept."""
    rows = [
        GOOD,
        {"prompt": "moved", "response": "A"},
        {"prompt": "moved too far", "response": "A" * 30},
    ]
    assert load(tmp_path, rows, max_length=20).counts["moved"] == 1


# Cache.


def equal(a, b):
    """Return True if two data sets have the same arrays, columns and counts."""
    if a.counts != b.counts or a.columns.keys() != b.columns.keys():
        return False
    if not all(np.array_equal(getattr(a, f), getattr(b, f)) for f in FIELDS):
        return False
    return all(np.array_equal(a.columns[k], b.columns[k], equal_nan=True) for k in a.columns)


def test_cache_hit(tmp_path):
    """The same request again tokenises nothing and gives equal arrays; so does a copied file."""
    rows = [PAIR | {"score_chosen": k} for k in range(20)]
    first = load(tmp_path, rows, "preference")
    template = Plain()
    lines = []
    again = load(tmp_path, rows, "preference", template=template, log=lines.append)
    assert template.calls == 0 and "from cache" in lines[-1]
    assert equal(first, again) and first.key == again.key
    copy = write(tmp_path / "copy.jsonl", rows)
    load_dataset(copy, "preference", template, cache=tmp_path / "cache", log=lines.append)
    assert template.calls == 0 and len(list((tmp_path / "cache").iterdir())) == 1


def test_cache_miss(tmp_path):
    """The key holds contents and order of files, kind, template, tokenizer, length, overlong."""
    rows = [PAIR | GOOD]
    a = write(tmp_path / "a.jsonl", rows)
    b = write(tmp_path / "b.jsonl", [PAIR | {"response": "other"}])
    odd = Plain()
    odd.hash = "odd"
    other = Plain()
    other.tokenizer.hash = "other"
    requests = [
        ([a], "sft", Plain(), {}),
        ([b], "sft", Plain(), {}),
        ([a, b], "sft", Plain(), {}),
        ([b, a], "sft", Plain(), {}),
        ([a], "preference", Plain(), {}),
        ([a], "sft", odd, {}),
        ([a], "sft", other, {}),
        ([a], "sft", Plain(), {"max_length": 100}),
        ([a], "sft", Plain(), {"overlong": "truncate"}),
    ]
    keys = set()
    quiet = {"log": lambda line: None, "cache": tmp_path / "cache"}
    for files, kind, template, options in requests:
        keys.add(load_dataset(files, kind, template, **quiet, **options).key)
        assert template.calls > 0
    assert len(keys) == len(requests)


@pytest.mark.parametrize("damage", ["missing", "short", "meta", "no meta", "flipped"])
def test_damaged_cache(tmp_path, damage):
    """A cache with a missing, short or changed file is rebuilt, with a warning."""
    expected = load(tmp_path, [GOOD] * 5).tokens.tolist()
    template = Plain()
    lines = []
    (folder,) = (tmp_path / "cache").iterdir()
    if damage == "missing":
        (folder / "prompt_len.npy").unlink()
    elif damage == "short":
        os.truncate(folder / "tokens.npy", (folder / "tokens.npy").stat().st_size - 4)
    elif damage == "flipped":  # in every file, one bit at a time
        for path in sorted(folder.glob("*.npy")):
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
            assert read_meta(folder, json.loads((folder / "meta.json").read_text())["key"]) is None
            if path.name != "tree_start.npy":
                content[-1] ^= 1
                path.write_bytes(content)
    elif damage == "meta":
        (folder / "meta.json").write_text("{")
    else:
        (folder / "meta.json").unlink()
    ds = load(tmp_path, [GOOD] * 5, template=template, log=lines.append)
    assert "warning" in lines[0] and template.calls == 5 and ds.tokens.tolist() == expected
    assert [f.name for f in (tmp_path / "cache").iterdir()] == [folder.name]


def test_race(tmp_path):
    """Processes that build the same key at once get the same arrays and leave one folder."""
    file = write(tmp_path / "rows.jsonl", [GOOD | {"prompt": f"Q{k}"} for k in range(600)])
    quiet = {"log": lambda line: None, "cache": tmp_path / "cache"}
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                ds = load_dataset(file, "sft", Plain(), workers=1, **quiet)
                code = 0 if texts(ds) == [(f"Q{k}", "A") for k in range(600)] else 2
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert len(list((tmp_path / "cache").iterdir())) == 1


# Files and workers.


def test_files(tmp_path):
    """Files are read in order, .gz like plain ones; bad rows are reported with their file and line.

    A byte order mark, CRLF, blank lines and a missing last line feed change nothing.
    """
    rows = [{"prompt": f"Q{k}é\u2028", "response": "A"} for k in range(10)]
    marked = b"\xef\xbb\xbf" + json.dumps(rows[0], ensure_ascii=False).encode() + b"\r"
    a = write(tmp_path / "a.jsonl", [marked, *rows[1:4]])
    b = write(tmp_path / "b.jsonl.gz", ["", *rows[4:]])
    a.write_bytes(a.read_bytes()[:-1])
    quiet = {"log": lambda line: None, "cache": tmp_path / "cache"}
    ds = load_dataset([a, b], "sft", Plain(), **quiet)
    assert texts(ds) == [(row["prompt"], "A") for row in rows]
    c = write(tmp_path / "c.jsonl", rows)
    whole = load_dataset([c], "sft", Plain(), **quiet)
    assert equal(ds, whole) and ds.key != whole.key
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz:3: "):
        load_dataset([a, write(tmp_path / "b.jsonl.gz", [GOOD, "", "{"])], "sft", Plain(), **quiet)
    b.write_bytes(b.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz: not a whole gzip file"):
        load_dataset(b, "sft", Plain(), **quiet)


def test_workers(tmp_path, monkeypatch):
    """One worker or three: the same arrays, counts and bad rows, in file order."""
    monkeypatch.setattr(data.encode, "CHUNK_ROWS", 7)
    rows = [
        "{" if k % 29 == 5 else PAIR | {"prompt": f"{'long' * (k % 9)} moved {k}", "margin": k}
        for k in range(150)
    ]
    rows[66:80] = [PAIR | {"prompt": "far too long" * 9}] * 14  # whole chunks without a tree
    results = []
    for workers in (1, 3):
        lines = []
        cache = tmp_path / str(workers)
        options = {"max_length": 40, "max_bad_rows": 9, "log": lines.append, "cache": cache}
        ds = load(tmp_path, rows, "preference", workers=workers, **options)
        files = {file.name: file.read_bytes() for file in cache.glob("*/*.npy")}
        results.append((ds, lines[:-1], files))
    (one, lines_one, files_one), (three, lines_three, files_three) = results
    assert equal(one, three)
    assert lines_one == lines_three
    assert files_one == files_three and len(files_one) == 8
    kept = [row for row in rows if isinstance(row, dict) and 1 + len(row["prompt"]) + 2 <= 40]
    assert texts(one) == [(row["prompt"], "a", "b") for row in kept] and len(kept) < 145
    assert one.columns["margin"][::2].tolist() == [row["margin"] for row in kept]
    assert one.counts["bad"] == 5 and one.counts["moved"] == len(kept)
    for workers in (1, 3):
        with pytest.raises(ValueError, match=r"rows\.jsonl:6: .*\(1 bad so far"):
            load(tmp_path, rows, "preference", workers=workers, max_length=41)


def test_dead_worker(tmp_path, monkeypatch):
    """A killed worker ends the run with an error, not a hang, and leaves no partial folder."""
    monkeypatch.setattr(data.encode, "CHUNK_ROWS", 2)
    parent = os.getpid()

    class Deadly(Plain):
        def pair(self, prompt, responses):
            if prompt == "Q7" and os.getpid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().pair(prompt, responses)

    rows = [{"prompt": f"Q{k}", "response": "A"} for k in range(40)]
    with pytest.raises(RuntimeError, match="worker was killed"):
        load(tmp_path, rows, template=Deadly(), workers=2)
    assert not list((tmp_path / "cache").iterdir())


def test_a_conversation_of_two_assistant_turns_has_no_prompt_to_score():
    """The prompt of an answer never ends with an assistant's turn."""
    said = [{"role": role, "content": "x"} for role in ("user", "assistant", "assistant")]
    with pytest.raises(ValueError, match="must end with the turn to answer"):
        answers_of({"messages": said})


def child_processes() -> set[str]:
    """Return the ids of the processes that this one has started and not waited for."""
    children = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parent = stat.read_text().rpartition(")")[2].split()[1]
            if parent == str(os.getpid()):
                children.add(stat.parent.name)
    return children


def test_interrupt(tmp_path, monkeypatch):
    """Ctrl-C reaches the caller and leaves neither workers nor partial folders."""
    monkeypatch.setattr(data.encode, "CHUNK_ROWS", 2)
    parent = os.getpid()

    class Interrupting(Plain):
        def pair(self, prompt, responses):
            if prompt == "Q7":
                os.kill(parent, signal.SIGINT)
            return super().pair(prompt, responses)

    rows = [{"prompt": f"Q{k}", "response": "A"} for k in range(4000)]
    before = child_processes()  # other tests of this session may have left some
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, rows, template=Interrupting(), workers=2)
    assert not list((tmp_path / "cache").iterdir())
    assert child_processes() <= before


# Anything at all.

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.just(hh("a", "b")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.fixed_dictionaries({"role": inner, "content": inner})
    ),
    max_leaves=6,
)
roles = st.sampled_from(["user", "assistant", "system", "human", "gpt", "robot", 3])
message_lists = st.lists(
    st.fixed_dictionaries({"role": roles, "content": st.text(max_size=3)}), max_size=4
)
KEYS = """prompt response completion input output messages conversations system
chosen rejected margin chosen_reward score_rejected"""
values = st.text(max_size=5) | message_lists | json_values
odd_rows = st.dictionaries(st.sampled_from(KEYS.split()), values, max_size=5).map(json.dumps)
odd_lines = st.lists(
    odd_rows.map(str.encode) | st.binary(max_size=20).filter(lambda b: b"\n" not in b), max_size=6
)


@pytest.mark.slow
@settings(max_examples=120, suppress_health_check=list(HealthCheck), deadline=None)
@given(odd_lines, st.sampled_from(["sft", "preference"]), st.booleans())
def test_any_line(tmp_path, lines, kind, plain):
    """Any line is a kept row or a counted bad one."""
    rows = [PAIR | GOOD, *lines]
    template = Plain() if plain else Chat()
    ds = load(tmp_path, rows, kind, template, max_bad_rows=99, max_length=10**6)
    c = ds.counts
    assert c["trees"] + c["bad"] == c["rows"] <= len(rows)
    assert c["trees"] == len(ds) == len(trees(ds))
    for prompt, answers in trees(ds):
        assert prompt and all(any(scored) for _, scored in answers)


# Batches: the worked examples of data/trees.py.


def test_examples_in_docstrings():
    """Examples in the docstrings of data/trees.py give the results that they show."""
    results = doctest.testmod(data.trees)
    assert results.attempted >= 5 and not results.failed


def test_worked_example_of_a_batch():
    """One tree, [5 6] with [7 8] and [9], is the table in the docstring of make_batch."""
    ds = from_trees([([5, 6], [([7, 8], [1, 1]), ([9], [1])])])
    batch = make_batch(ds, [0])
    table = {}
    for line in make_batch.__doc__.splitlines():
        name, _, numbers = line.strip().partition(" ")
        digits = re.match(r"[\d |]+", numbers.strip())
        if digits and name.isidentifier():
            table[name] = [int(n) for n in digits[0].replace("|", " ").split()]
    names = ["tokens", "positions", "kv_end", "logit_index", "target", "response"]
    assert {name: getattr(batch, name).tolist() for name in names} == {n: table[n] for n in names}
    assert (batch.lengths.tolist(), batch.tree.tolist(), batch.last.tolist()) == (
        [2, 1],
        [0, 0],
        [3, 4],
    )
    assert batch.spans == [(2, [2, 1])]
    repeated = make_batch(ds, [0], share_prompts=False)
    assert repeated.tokens.tolist() == [5, 6, 7, 8, 5, 6, 9]
    assert repeated.spans == [(2, [2]), (2, [1])]


def test_scored_lengths_and_responses_of():
    """Scored tokens are counted by response, empty responses included; trees list theirs."""
    ds = from_trees(
        [([1, 2], [([], []), ([3, 4], [0, 1]), ([], [])]), ([5], [([6, 7, 8], [1, 0, 1])])]
    )
    assert ds.scored_len.tolist() == [0, 1, 0, 2]
    assert ds.responses_of([1, 0]).tolist() == [3, 0, 1, 2]
    assert ds.responses_of([]).tolist() == []


def test_lines_and_archives_without_end_meet_a_limit(tmp_path: Path, monkeypatch):
    """A line that is too long, alone or in a .gz file, and a .gz file of nothing but line ends."""
    monkeypatch.setattr("data.rows.LONGEST_LINE", 1 << 20)
    good = b'{"prompt": "a", "response": "b"}\n'
    (tmp_path / "long.jsonl").write_bytes(good + b'{"prompt": "' + b"x" * (2 << 20) + b'"}\n')
    with pytest.raises(ValueError, match=r"long\.jsonl:2: a line of more than 1 MB"):
        list(read_rows(tmp_path / "long.jsonl"))
    with gzip.open(tmp_path / "long.jsonl.gz", "wb") as file:
        file.write(good * 3 + b"0" * (4 << 20))
    with pytest.raises(ValueError, match=r"long\.jsonl\.gz:4: a line of more than 1 MB"):
        list(read_rows(tmp_path / "long.jsonl.gz"))
    monkeypatch.setattr("data.rows.BOMB_BYTES", 1 << 16)
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb") as file:
        file.write(b"\n" * (1 << 20))
    with pytest.raises(ValueError, match=r"bomb\.jsonl\.gz:\d+: 1,\d+ bytes have grown to \d+"):
        list(read_rows(tmp_path / "bomb.jsonl.gz"))
    with gzip.open(tmp_path / "fine.jsonl.gz", "wb") as file:
        file.write(good * 1000)
    assert len(list(read_rows(tmp_path / "fine.jsonl.gz"))) == 1000
