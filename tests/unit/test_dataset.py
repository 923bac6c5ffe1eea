"""Rows to trees: every format, every kind of bad row, the length rule, the cache and the worker pool."""

import gzip
import hashlib
import json
import math
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data.encode
from data.dataset import load_dataset
from data.formats import preference_row, sft_row

BOS, EOS = 1, 2
FIELDS = ("tokens", "scored", "tree_start", "prompt_len", "response_start", "response_len")


def message(role, text):
    return {"role": role, "content": text}


USER, ASSISTANT, SYSTEM = (partial(message, role) for role in ("user", "assistant", "system"))


class Bytes:
    """A tokenizer of bytes: id = byte + 3."""

    bos, eos, hash = BOS, EOS, "bytes"

    def encode(self, text):
        return [byte + 3 for byte in text.encode()]


class Plain:
    """bos, prompt, response, eos; messages as their contents, one tag a turn."""

    plain, hash = True, "plain"

    def __init__(self):
        self.tokenizer, self.calls = Bytes(), 0

    def pair(self, prompt, responses):
        self.calls += 1
        if "explode" in str(prompt):
            raise ValueError("the template cannot render this")
        ids = self.tokenizer.encode
        head = [BOS, *ids(flat(prompt))]
        return (
            head,
            [([*ids(flat(r)), EOS], [1] * (len(ids(flat(r))) + 1)) for r in responses],
            "moved" in str(prompt),
        )

    def conversation(self, messages):
        self.calls += 1
        first = next(k for k, m in enumerate(messages) if m["role"] == "assistant")
        head, ids, scored = [BOS, *self.tokenizer.encode(flat(messages[:first]))], [], []
        for m in messages[first:]:
            turn = [*self.tokenizer.encode(m["content"]), EOS]
            ids += turn
            scored += [int(m["role"] == "assistant")] * len(turn)
        return head, (ids, scored)


class Chat(Plain):
    plain, hash = False, "chat"


def flat(body):
    return body if isinstance(body, str) else "|".join(m["content"] for m in body)


def write(path, rows):
    """A JSONL file; a row of type str or bytes goes in as it is."""
    path = Path(path)
    lines = [
        r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode()
        for r in rows
    ]
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as stream:
        stream.write(b"".join(line + b"\n" for line in lines))
    return path


def load(path, rows, kind="sft", template=None, **options):
    """Rows -> dataset, quietly, with the cache beside the file."""
    options = {"log": lambda line: None, "cache": Path(path) / "cache", **options}
    return load_dataset(
        [write(Path(path) / "rows.jsonl", rows)], kind, template or Plain(), **options
    )


def trees(ds):
    """The trees as plain lists: [(prompt ids, [(response ids, scored), ...]), ...], read by the definition alone."""
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
    """The three spellings of a demonstration mean the same; null cells are absent."""
    row = dict(zip(keys, ("Q", "A"))) | {"messages": None, "extra": 3}
    assert sft_row(row) == ("Q", ["A"], {})


def test_sft_conversations():
    """Both spellings of a conversation come out alike, and what follows the last assistant turn is cut off."""
    messages = [SYSTEM("s"), USER("q"), ASSISTANT("a"), USER("q2"), ASSISTANT("a2")]
    assert sft_row({"messages": messages}) == (None, [messages], {})
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[m["role"]], "value": m["content"], "weight": None} for m in messages]
    assert sft_row({"conversations": turns}) == (None, [messages], {})
    assert sft_row({"conversations": turns[1:], "system": "s"}) == (None, [messages], {})
    assert sft_row({"messages": [*messages, USER("thanks")]}) == (None, [messages], {})
    assert sft_row({"prompt": "informative", "messages": messages}) == (None, [messages], {})
    assert sft_row({"prompt": messages[:2], "completion": messages[2:]}) == (
        messages[:2],
        [messages[2:]],
        {},
    )


@pytest.mark.parametrize(
    "names", [("chosen", "rejected"), ("chosen_response", "rejected_response")]
)
def test_preference_text(names):
    """Text pairs keep their characters, white space included."""
    prompt, responses, columns = preference_row(
        {"prompt": "Q ", names[0]: " good", names[1]: "bad\n"}
    )
    assert (prompt, responses) == ("Q ", [" good", "bad\n"])
    assert all(math.isnan(x) for x in columns["reward"] + columns["margin"])


def test_preference_columns():
    """Rewards go to their own response under either name, a margin to both."""
    pair = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    expected = {"reward": [2.0, -1.5], "margin": [3.5, 3.5]}
    assert (
        preference_row(pair | {"chosen_reward": 2, "rejected_reward": -1.5, "margin": 3.5}).columns
        == expected
    )
    assert (
        preference_row(pair | {"score_chosen": 2, "score_rejected": -1.5, "margin": 3.5}).columns
        == expected
    )


def test_preference_messages():
    """The prompt is what the lists share, up to an assistant turn; the answer alone may stand in them as well."""
    q, a, b = USER("q"), ASSISTANT("a"), ASSISTANT("b")
    split = lambda **row: preference_row(row)[:2]  # noqa: E731
    assert split(prompt="about q", chosen=[q, a], rejected=[q, b]) == (
        [q],
        [[a], [b]],
    )  # UltraFeedback
    assert split(chosen=[SYSTEM("s"), q, a], rejected=[SYSTEM("s"), q, b]) == (
        [SYSTEM("s"), q],
        [[a], [b]],
    )
    assert split(prompt=[q], chosen=[a], rejected=[b]) == ([q], [[a], [b]])  # TRL conversational
    assert split(prompt=[q], chosen=[q, a], rejected=[q, b]) == ([q], [[a], [b]])
    assert split(prompt="q", chosen=[a], rejected=[b]) == ("q", [[a], [b]])
    assert split(chosen=[q, a], rejected=[q, a]) == (
        [q],
        [[a], [a]],
    )  # identical: still split before the answer
    long = [q, a, USER("more")]
    assert split(chosen=[*long, a], rejected=[*long, b]) == (long, [[a], [b]])
    other = [b, USER("more"), b]
    assert split(chosen=[*long, a], rejected=[q, *other]) == ([q], [[a, USER("more"), a], other])
    # They part at a user turn: the border is before the last assistant turn that both have.
    assert split(chosen=[*long, a], rejected=[q, a, USER("x"), b]) == (
        [q],
        [[a, USER("more"), a], [a, USER("x"), b]],
    )


def hh(*turns):
    return "".join(
        f"\n\n{'Human' if k % 2 == 0 else 'Assistant'}: {turn}" for k, turn in enumerate(turns)
    )


def test_transcripts():
    """HH: split after the last "Assistant:" that both share, never inside a word, wherever the transcripts part."""
    row = {
        "chosen": hh("hi", "hello", "why?", "because of it"),
        "rejected": hh("hi", "hello", "why?", "because I say"),
    }
    prompt, responses, _ = preference_row(row, plain=True)
    assert prompt == hh("hi", "hello", "why?") + "\n\nAssistant:"
    assert responses == [
        " because of it",
        " because I say",
    ]  # "because " is the answer's, though both begin with it
    prompt, responses, _ = preference_row(row)
    assert prompt == [USER("hi"), ASSISTANT("hello"), USER("why?")]
    assert responses == [[ASSISTANT("because of it")], [ASSISTANT("because I say")]]
    # An earlier turn differs: everything from there on belongs to the responses.
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
    same = same[2:]  # some copies have no line ends in front
    assert preference_row({"chosen": same, "rejected": same})[0] == [
        USER("hi"),
        ASSISTANT("hello"),
        USER("why?"),
    ]


@settings(max_examples=200)
@given(st.lists(st.sampled_from(["a b", "a c", "", "ab"]), min_size=2, max_size=6), st.data())
def test_transcript_split_loses_nothing(turns, draw):
    """Prompt + response is each transcript, and the border is the last shared assistant turn found by brute force."""
    turns = turns[: len(turns) // 2 * 2]
    other = [draw.draw(st.sampled_from([turn, "a b"])) for turn in turns]
    chosen, rejected = hh(*turns), hh(*other)
    if turns[0] != other[0]:
        with pytest.raises(ValueError, match="share no"):
            preference_row({"chosen": chosen, "rejected": rejected}, plain=True)
        return
    prompt, responses, _ = preference_row({"chosen": chosen, "rejected": rejected}, plain=True)
    assert [prompt + r for r in responses] == [chosen, rejected]
    shared = max(k for k in range(1, len(turns), 2) if turns[:k] == other[:k])
    assert prompt == hh(*turns[:shared]) + "\n\nAssistant:"


def test_kinds_reach_the_arrays(tmp_path):
    """Prompt, responses, scores and columns lie in the arrays where the definition says."""
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
    ({"question": "Q", "answer": "A"}, "this one has 'question', 'answer'"),
    ({"prompt": 3, "response": "A"}, "`prompt` must be text, got 3"),
    ({"prompt": "Q", "response": {"a": 1}}, "`response` must be text, got an object"),
    ('{"prompt": "\\ud800", "response": "A"}', "surrogate"),
    ({"instruction": "do", "input": "", "output": "A"}, "join"),
    ({"messages": []}, "not empty"),
    ({"messages": "hello"}, "list of messages"),
    ({"messages": ["hello"]}, r"messages\[0\]"),
    (
        {"messages": [{"role": "robot", "content": "x"}]},
        "'robot': must be system, user or assistant",
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
    """A bad row stops the run with file:line, reason and flag; allowed, it is printed, counted and left out."""
    good = GOOD if kind == "sft" else PAIR
    rows, lines = [good, "", bad, good], []
    with pytest.raises(ValueError, match=rf"rows\.jsonl:3: .*{reason}.*--max-bad-rows") as error:
        load(tmp_path, rows, kind)
    assert len(str(error.value)) < 500
    ds = load(tmp_path, rows, kind, max_bad_rows=1, log=lines.append)
    assert len(ds) == 2 and (ds.counts["rows"], ds.counts["bad"]) == (3, 1)
    assert "rows.jsonl:3: " in lines[0] and len(lines) == 2


def test_no_tokens(tmp_path):
    """A response without a scored token, and a prompt without tokens, are bad rows."""

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
    """Ten reports and a count; refused past the limit, from the cache just as while reading."""
    rows = [GOOD] + ["{"] * 12
    for again in range(2):
        lines = []
        ds = load(tmp_path, rows, max_bad_rows=12, log=lines.append)
        assert (
            sum(line.startswith("bad row ") for line in lines) == 10
            and lines[10] == "... and 2 more bad rows"
        )
        assert ("from cache" in lines[11]) == bool(again) and ds.counts["bad"] == 12
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: .*12 bad.*--max-bad-rows 11"):
        load(tmp_path, rows, max_bad_rows=11)


def test_missing_and_empty(tmp_path):
    """A missing file and an empty result say what to do, and leave no cache behind."""
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
    """No response with its prompt is longer than the limit; responses are never cut; what fits is untouched; a cut
    prompt fills the room, keeps its bos first and its last tokens; a tree goes only when it cannot be made to fit."""
    rows.append({"prompt": "", "chosen": "", "rejected": ""})  # something is always left
    ds = load(
        tmp_path, rows, "preference", max_length=limit, overlong="truncate" if truncate else "drop"
    )
    expected, cut = [], 0
    for row in rows:
        longest = max(len(row["chosen"]), len(row["rejected"])) + 1
        prompt = row["prompt"]
        if 1 + len(prompt) + longest > limit:
            room = limit - longest - 1
            if not truncate or room < 1 or not prompt:
                continue
            prompt, cut = prompt[-room:], cut + 1
        expected.append((prompt, row["chosen"], row["rejected"]))
    assert texts(ds) == expected
    for prompt, answers in trees(ds):
        assert prompt[0] == BOS and all(
            len(prompt) + len(ids) <= limit and ids[-1] == EOS for ids, _ in answers
        )
    c = ds.counts
    assert (c["rows"], c["trees"], c["too_long"], c["truncated"]) == (
        len(rows),
        len(ds),
        len(rows) - len(ds),
        cut,
    )
    assert (
        c["tokens"] == len(ds.tokens) == ds.tree_lengths().sum() and c["scored"] == ds.scored.sum()
    )


def test_truncate_without_bos(tmp_path):
    """A prompt that does not begin with bos is cut to its last tokens, down to one."""

    class NoBos(Plain):
        def pair(self, prompt, responses):
            head, answers, moved = super().pair(prompt, responses)
            return head[1:], answers, moved

    rows = [{"prompt": "abcdef", "response": "xyz"}, {"prompt": "abcdef", "response": "wxyz"}]
    for limit, expected in ((6, [("ef", "xyz"), ("f", "wxyz")]), (5, [("f", "xyz")])):
        assert (
            texts(load(tmp_path, rows, template=NoBos(), max_length=limit, overlong="truncate"))
            == expected
        )


def test_moved_borders_are_counted(tmp_path):
    """The template's word that a border moved is counted, over the rows that are kept."""
    rows = [
        GOOD,
        {"prompt": "moved", "response": "A"},
        {"prompt": "moved too far", "response": "A" * 30},
    ]
    assert load(tmp_path, rows, max_length=20).counts["moved"] == 1


# Cache.


def equal(a, b):
    same = (
        all(np.array_equal(getattr(a, f), getattr(b, f)) for f in FIELDS) and a.counts == b.counts
    )
    return same and a.columns.keys() == b.columns.keys() and all(
        np.array_equal(a.columns[k], b.columns[k], equal_nan=True) for k in a.columns)  # fmt: skip


def test_cache_hit(tmp_path):
    """The same request again: equal arrays, nothing tokenised; a copy of the file elsewhere hits as well."""
    rows = [PAIR | {"score_chosen": k} for k in range(20)]
    first = load(tmp_path, rows, "preference")
    template, lines = Plain(), []
    again = load(tmp_path, rows, "preference", template=template, log=lines.append)
    assert (
        template.calls == 0
        and equal(first, again)
        and first.key == again.key
        and "from cache" in lines[-1]
    )
    copy = write(tmp_path / "copy.jsonl", rows)
    load_dataset(copy, "preference", template, cache=tmp_path / "cache", log=lines.append)
    assert template.calls == 0 and len(list((tmp_path / "cache").iterdir())) == 1


def test_cache_miss(tmp_path):
    """Whatever decides the arrays is in the key: contents, order of files, kind, template, tokenizer, length, rule."""
    rows = [PAIR | GOOD]
    a, b = (
        write(tmp_path / "a.jsonl", rows),
        write(tmp_path / "b.jsonl", [PAIR | {"response": "other"}]),
    )
    odd, other = Plain(), Plain()
    odd.hash, other.tokenizer.hash = "odd", "other"
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
    for files, kind, template, options in requests:
        keys.add(
            load_dataset(
                files, kind, template, cache=tmp_path / "cache", log=lambda line: None, **options
            ).key
        )
        assert template.calls > 0
    assert len(keys) == len(requests)


@pytest.mark.parametrize("damage", ["missing", "short", "meta", "no meta"])
def test_damaged_cache(tmp_path, damage):
    """A cache with a file missing or cut short is rebuilt, with a warning."""
    first, lines, template = load(tmp_path, [GOOD] * 5), [], Plain()
    expected = first.tokens.tolist()
    (folder,) = (tmp_path / "cache").iterdir()
    if damage == "missing":
        (folder / "prompt_len.npy").unlink()
    elif damage == "short":
        os.truncate(folder / "tokens.npy", (folder / "tokens.npy").stat().st_size - 4)
    elif damage == "meta":
        (folder / "meta.json").write_text("{")
    else:
        (folder / "meta.json").unlink()
    ds = load(tmp_path, [GOOD] * 5, template=template, log=lines.append)
    assert "warning" in lines[0] and template.calls == 5 and ds.tokens.tolist() == expected
    assert [f.name for f in (tmp_path / "cache").iterdir()] == [folder.name]


def test_race(tmp_path):
    """Processes that build the same key at once all get the same arrays and leave one folder."""
    file, children = (
        write(tmp_path / "rows.jsonl", [GOOD | {"prompt": f"Q{k}"} for k in range(600)]),
        [],
    )
    for _ in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                ds = load_dataset(
                    file, "sft", Plain(), cache=tmp_path / "cache", workers=1, log=lambda line: None
                )
                code = 0 if texts(ds) == [(f"Q{k}", "A") for k in range(600)] else 2
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert len(list((tmp_path / "cache").iterdir())) == 1


# Files and workers.


def test_files(tmp_path):
    """gz equals plain; several files are read in order; a byte order mark, CRLF, blank lines and a last line without
    its end are no matter; bad rows name their own file and line."""
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
    rows[66:80] = [
        PAIR | {"prompt": "far too long" * 9}
    ] * 14  # whole chunks of which nothing is left
    results = []
    for workers in (1, 3):
        lines = []
        ds = load(tmp_path, rows, "preference", workers=workers, max_length=40, max_bad_rows=9, log=lines.append,
                  cache=tmp_path / str(workers))  # fmt: skip
        files = sorted(f for f in (tmp_path / str(workers)).glob("*/*.npy"))
        results.append(
            (ds, lines[:-1], [(f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files])
        )
    (one, lines_one, files_one), (three, lines_three, files_three) = results
    assert (
        equal(one, three)
        and lines_one == lines_three
        and files_one == files_three
        and len(files_one) == 8
    )
    kept = [row for row in rows if isinstance(row, dict) and 1 + len(row["prompt"]) + 2 <= 40]
    assert texts(one) == [(row["prompt"], "a", "b") for row in kept] and len(kept) < 145
    assert one.columns["margin"][::2].tolist() == [row["margin"] for row in kept]
    assert one.counts["bad"] == 5 and one.counts["moved"] == len(kept)
    for workers in (1, 3):
        with pytest.raises(ValueError, match=r"rows\.jsonl:6: .*\(1 bad so far"):
            load(tmp_path, rows, "preference", workers=workers, max_length=41)


def test_dead_worker(tmp_path, monkeypatch):
    """A worker that is killed ends the run with an error; it does not hang, and nothing half-made stays."""
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


def test_interrupt(tmp_path, monkeypatch):
    """Ctrl-C in mid-run reaches the caller and leaves neither workers nor half-made folders."""
    monkeypatch.setattr(data.encode, "CHUNK_ROWS", 2)
    parent = os.getpid()

    class Interrupting(Plain):
        def pair(self, prompt, responses):
            if prompt == "Q7":
                os.kill(parent, signal.SIGINT)
            return super().pair(prompt, responses)

    with pytest.raises(KeyboardInterrupt):
        load(
            tmp_path,
            [{"prompt": f"Q{k}", "response": "A"} for k in range(4000)],
            template=Interrupting(),
            workers=2,
        )
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


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


@settings(max_examples=120, suppress_health_check=list(HealthCheck), deadline=None)
@given(odd_lines, st.sampled_from(["sft", "preference"]), st.booleans())
def test_any_line(tmp_path, lines, kind, plain):
    """Whatever a line holds, it is a kept row or a counted bad one."""
    good = PAIR | GOOD
    ds = load(
        tmp_path,
        [good, *lines],
        kind,
        Plain() if plain else Chat(),
        max_bad_rows=99,
        max_length=10**6,
    )
    c = ds.counts
    assert c["trees"] + c["bad"] == c["rows"] <= 1 + len(lines) and c["trees"] == len(ds) == len(
        trees(ds)
    )
    assert all(
        prompt and all(any(scored) for _, scored in answers) for prompt, answers in trees(ds)
    )
