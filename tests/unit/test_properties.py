"""Whatever comes in, a file, a row, a flag, a header: it is used as it says, or refused by name. Never a crash.

Inputs are made by hypothesis; what must come out is written again here in plain Python.
"""

import contextlib
import gzip
import io
import json
import math
import multiprocessing
import resource
import struct
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import checkpoint
import config
import hf
import train_dpo
import train_kto
import train_sft
from data import formats
from data.dataset import from_trees, load_dataset
from data.encode import ROWS
from data.rows import read_rows, write_rows
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.trees import make_batch, micro_batches, pack, step_examples, steps_per_epoch, visited
from weights.folder import load_model, save_model, weight_files

quick = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))

# ---- any JSON --------------------------------------------------------------------------------------------------------

texts = st.text(max_size=6) | st.sampled_from(
    ["\n\nHuman: a\n\nAssistant: b", "\n\nAssistant:", "\ud800", ""]
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, 1e39, 2, 1.0])
    | st.floats()
    | texts
)
roles = st.sampled_from(["user", "assistant", "system", "human", "gpt", "Human", "robot", 3])
messages = st.lists(
    st.fixed_dictionaries({"role": roles, "content": texts})
    | st.fixed_dictionaries({"from": roles, "value": texts}),
    max_size=4,
)
json_values = st.recursive(
    scalars | messages,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
attributes = st.dictionaries(
    st.sampled_from(["helpfulness", "verbosity", "charm"]), scalars | st.just(4), max_size=2
)
KEYS = """prompt response completion input output instruction messages conversations system chosen rejected
chosen_response rejected_response margin chosen_reward score_rejected label preference responses attributes weights
helpfulness""".split()
fitting = {
    "responses": st.lists(texts | messages, max_size=3), "attributes": attributes | st.lists(attributes, max_size=3),
    "weights": st.lists(st.floats() | scalars, max_size=3), "label": st.booleans(), "helpfulness": st.integers(0, 4),
}  # fmt: skip


@st.composite
def rows(draw):
    """A row with known keys, whose values may fit them or be anything."""
    keys = draw(st.lists(st.sampled_from(KEYS), max_size=6, unique=True))
    return {key: draw(json_values | fitting.get(key, texts | messages)) for key in keys}


lines = rows().map(json.dumps).map(str.encode) | st.binary(max_size=30).map(
    lambda b: b.replace(b"\n", b"")
)
lines |= st.sampled_from(
    [b"", b" ", b"[]", b"\xff", b"[" * 5000, b"9" * 5000, b'{"prompt": ' + b"9" * 5000 + b"}"]
)


def a_row(line: bytes) -> dict | None:
    """What a line holds, by Python's own parser; None if that is no JSON object."""
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@quick
@given(st.lists(lines, max_size=5), st.booleans())
@example([b'\xef\xbb\xbf{"prompt": "a"}', b"{}"], False)
def test_a_file_is_read_up_to_its_first_bad_line(tmp_path: Path, lines: list[bytes], packed: bool):
    """read_rows gives the rows before the first line that holds none, whose file:line the error then names."""
    path = tmp_path / ("rows.jsonl" + ".gz" * packed)
    path.write_bytes(gzip.compress(b"\n".join(lines)) if packed else b"\n".join(lines))
    wanted, bad = [], None
    for number, line in enumerate(lines, 1):
        if line.strip() and bad is None:
            found = a_row(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            bad = number if found is None else None
            wanted += [found] if found is not None else []
    got = []
    if bad is None:
        got += read_rows(path)
    else:
        with pytest.raises(ValueError) as error:
            got.extend(read_rows(path))
        assert str(error.value).startswith(f"{path}:{bad}: ")
    assert json.dumps(got) == json.dumps(wanted)


@quick
@given(st.binary(max_size=60), st.integers(0, 60), st.binary(max_size=3))
def test_damaged_gzip_files_are_named(tmp_path: Path, noise: bytes, at: int, patch: bytes):
    """Noise, a cut or patched gzip file: an error with its name, or rows where the damage is harmless."""
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(b'{"prompt": "a"}\n' * 3)
    for content in (
        noise,
        whole[:at],
        whole[:at] + patch + whole[at + len(patch) :],
        whole + noise,
    ):
        path.write_bytes(content)
        try:
            assert all(isinstance(row, dict) for row in read_rows(path))
        except ValueError as error:
            assert str(path) in str(error)


@quick
@given(st.lists(st.dictionaries(texts, json_values, max_size=3), max_size=3))
def test_rows_that_are_written_are_read_back(tmp_path: Path, rows: list[dict]):
    """write_rows and read_rows undo each other for whatever JSON can say, halves of surrogate pairs included."""
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert json.dumps(list(read_rows(path))) == json.dumps(rows)


def is_messages(value) -> bool:
    return bool(value) and all(
        m.keys() == {"role", "content"}
        and m["role"] in ("system", "user", "assistant")
        and m["content"].encode() != 0
        for m in value
    )


@settings(quick, max_examples=400)
@given(rows(), st.sampled_from([*ROWS, "answers"]), st.booleans())
@example({"prompt": "a", "response": "b", "weights": []}, "weights", False)
@example({"prompt": "a", "responses": 5, "weights": [1.0]}, "weights", False)
@example({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1e39}, "preference", False)
def test_any_row_is_used_or_refused(row: dict, kind: str, plain: bool):
    """A row of any kind gives text or messages with a number a response in every column, or a ValueError; a null
    counts as an absent key."""

    def outcome(row: dict):
        try:
            return formats.answers_of(row, plain) if kind == "answers" else ROWS[kind](row, plain)
        except ValueError as error:
            assert str(error)
            return None

    found = outcome(row)
    # by repr: NaN is not equal to itself
    assert repr(found) == repr(
        outcome({key: value for key, value in row.items() if value is not None})
    )
    if found is None:
        return
    prompt, responses, columns = (*found, {}) if kind == "answers" else found
    assert responses and all(isinstance(r, str) or is_messages(r) for r in responses)
    if prompt is None:
        assert len(responses) == 1 and responses[0][-1]["role"] == "assistant"
    else:
        assert isinstance(prompt, str) or is_messages(prompt) and prompt[-1]["role"] != "assistant"
    for values in columns.values():
        assert len(values) == len(responses) and all(
            isinstance(v, float) and not abs(v) > 3.5e38 for v in values
        )


class Bytes:
    """A plain template over bytes, with the little of Template that load_dataset asks for."""

    plain, hash = True, "bytes"
    tokenizer = SimpleNamespace(bos=None, hash="bytes")

    def pair(self, prompt, responses):
        body = [
            x if isinstance(x, str) else "".join(m["content"] for m in x)
            for x in (prompt, *responses)
        ]
        head, *answers = ([byte for byte in text.encode()] for text in body)
        return head, [(ids, [1] * len(ids)) for ids in answers], False

    def conversation(self, messages):
        head, [answer], _ = self.pair(messages[:-1], [messages[-1:]])
        return head, answer


@settings(quick, max_examples=60)
@given(st.lists(lines, max_size=6), st.sampled_from(list(ROWS)), st.integers(0, 6))
def test_bad_rows_are_counted_up_to_the_limit(
    tmp_path: Path, lines: list[bytes], kind: str, limit: int
):
    """load_dataset keeps the good rows and counts the others; past --max-bad-rows it names the first of them."""
    good = {
        "prompt": "a",
        "response": "b",
        "chosen": "b",
        "rejected": "c",
        "label": True,
        "helpfulness": 3,
    }
    good |= {"responses": ["b"], "weights": [1.0]}
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([json.dumps(good).encode(), *lines]))
    kept, bad = 1, []
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        try:
            found = ROWS[kind](a_row(line) or {}, True)
            (head, answers, *_) = (
                Bytes().pair(found.prompt, found.responses) if found.prompt is not None
                else (lambda head, answer: (head, [answer]))(*Bytes().conversation(found.responses[0]))
            )  # fmt: skip
            usable = bool(head) and all(ids for ids, _ in answers)
        except ValueError:
            usable = False
        kept, bad = kept + usable, bad + [number] * (not usable)
    load = lambda: load_dataset(
        path, kind, Bytes(), 10**6, "drop", limit, tmp_path / "cache", 1, lambda text: None
    )  # noqa: E731
    if len(bad) <= limit:
        data = load()
        assert (len(data), data.counts["bad"], data.counts["rows"]) == (
            kept,
            len(bad),
            kept + len(bad),
        )
    else:
        with pytest.raises(ValueError) as error:
            load()
        assert str(error.value).startswith(f"{path}:{bad[0]}: ") and "--max-bad-rows" in str(
            error.value
        )


# ---- templates -------------------------------------------------------------------------------------------------------

MARKERS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Byte-level BPE that merges words, spaces and line feeds, with the markers of every template in one token each."""
    folder = tmp_path_factory.mktemp("bpe")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer, tok.decoder = byte_level, tokenizers.decoders.ByteLevel()
    tok.train_from_iterator(["the cat\nsat  on\n\nthe mat, the cat ran\n"] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=330, show_progress=False, special_tokens=["<s>", "</s>", *MARKERS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
    )
    return load_tokenizer(folder)


PIECES = [
    "the",
    " cat",
    "sat",
    " ",
    "  ",
    "\n",
    "\n\n",
    "é",
    "🦙",
    "<",
    "|>",
    "user",
    "[INST]",
    "\t",
    "\0",
    "\u2028",
]
contents = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
contents |= st.text(st.characters(exclude_categories=["Cs"]))
answers = contents.filter(str.strip)


@st.composite
def chats(draw):
    """[system,] user, assistant, user, assistant, ... ending with the assistant."""
    chat = [{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        chat += [
            {"role": "user", "content": draw(contents)},
            {"role": "assistant", "content": draw(answers)},
        ]
    return chat


def by_hand(name: str, chat: list[dict]) -> list[tuple[str, bool]]:
    """A conversation as (text, whether the assistant says it, its end of turn included), from the formats' pages."""
    parts = []
    for k, m in enumerate(chat):
        role, text, said = m["role"], m["content"], m["role"] == "assistant"
        if name == "chatml":
            parts += [(f"<|im_start|>{role}\n", False), (f"{text}<|im_end|>", said), ("\n", False)]
        elif name == "zephyr":
            parts += [(f"<|{role}|>\n", False), (f"{text}</s>", said), ("\n", False)]
        elif name == "llama3":
            parts += [("<s>" * (k == 0) + f"<|start_header_id|>{role}<|end_header_id|>\n\n", False)]
            parts += [(f"{text.strip()}<|eot_id|>", said)]
        elif said:
            parts += [(f" {text.strip()} </s>", True)]
        elif role == "user":
            before = (
                f"<<SYS>>\n{chat[0]['content']}\n<</SYS>>\n\n"
                if k == 1 and chat[0]["role"] == "system"
                else ""
            )
            parts += [(f"<s>[INST] {(before + text).strip()} [/INST]", False)]
    return parts[:-1] if parts[-1] == ("\n", False) else parts


@settings(quick, max_examples=60)
@given(chats())
@pytest.mark.parametrize("name", ["chatml", "zephyr", "llama2", "llama3"])
def test_conversations_are_the_format_and_decode_back(tokenizer, name: str, chat: list[dict]):
    """Prompt + response are the ids of the format written by hand and decode to it; what is scored is what the
    assistant says, and every answer ends with a stop id, the only one in it. A conversation is a pair whose prompt is
    all before the first answer, and what waits for an answer begins the answered."""
    template = Template(name, tokenizer)
    parts = by_hand(name, chat)
    text = "".join(part for part, _ in parts)
    prompt, (ids, scored) = template.conversation(chat)
    assert template.render(chat, False).rstrip() == text
    assert prompt + ids == tokenizer.encode(text)
    assert tokenizer.decode(prompt + ids, False) == text and len(ids) == len(scored)

    runs = []
    for before, flag, i in zip([0, *scored], scored, ids):
        if flag:
            runs += [] if before else [[]]
            runs[-1].append(i)
    said = [part for part, by_assistant in parts if by_assistant]
    if name in ("chatml", "llama3"):  # their markers are single tokens, across which nothing merges
        # ... but a content that begins with white space may merge with the line feeds after the marker
        assert len(runs) == len(said) and all(
            whole.endswith(tokenizer.decode(run, False).lstrip())
            or "\ufffd" in tokenizer.decode(run, False)
            for run, whole in zip(runs, said)
        )
    assert len(runs) == len(said)
    for run in runs:
        assert run[-1] in template.stop_ids and not set(run[:-1]) & template.stop_ids

    first = next(k for k, m in enumerate(chat) if m["role"] == "assistant")
    assert template.pair(chat[:first], [chat[first:]])[:2] == (prompt, [(ids, scored)])
    assert template.prompt(chat[:first])[: len(prompt)] == prompt


@settings(quick, max_examples=60)
@given(contents, st.lists(answers, min_size=1, max_size=3))
def test_plain_is_bos_prompt_response_eos(tokenizer, prompt: str, responses: list[str]):
    """Exactly that, for every response of a prompt, with nothing in between; all of it decodes back."""
    head, found, _ = Template("plain", tokenizer).pair(prompt, responses)
    for (ids, scored), response in zip(found, responses, strict=True):
        assert head + ids == [tokenizer.bos, *tokenizer.encode(prompt + response), tokenizer.eos]
        assert tokenizer.decode(head + ids, False) == f"<s>{prompt}{response}</s>" and scored == [
            1
        ] * len(ids)


@settings(quick, max_examples=60)
@given(
    st.lists(
        st.fixed_dictionaries({"role": roles, "content": contents | st.integers()}), max_size=5
    )
    | json_values
)
@pytest.mark.parametrize("name", ["plain", "chatml", "llama2"])
def test_any_messages_are_rendered_or_refused(tokenizer, name: str, chat):
    """No list of messages, however wild its roles and contents, ends in anything but ids or a ValueError."""
    template = Template(name, tokenizer)
    for call in (template.conversation, template.prompt, lambda m: template.pair("a", [m])):
        with contextlib.suppress(ValueError):
            assert call(chat)
    with contextlib.suppress(ValueError):
        assert template.pair(chat, [chat])


# ---- packing ---------------------------------------------------------------------------------------------------------


@st.composite
def forests(draw):
    """A data set of random trees: a prompt, responses, some of whose tokens are scored; every token its own number."""
    sizes = st.tuples(st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=3))
    trees, next_id = [], 0
    for prompt_len, response_lens in draw(st.lists(sizes, min_size=1, max_size=6)):
        flags = [draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)) for n in response_lens]
        ids = []
        for n in (prompt_len, *response_lens):
            ids.append(list(range(next_id, next_id + n)))
            next_id += n
        trees.append((ids[0], list(zip(ids[1:], flags))))
    n = sum(len(responses) for _, responses in trees)
    return trees, from_trees(trees, {"reward": np.arange(n, dtype=np.float32)})


@quick
@given(forests(), st.booleans(), st.data())
def test_a_batch_is_its_branches_written_out(forest, shared: bool, data):
    """Every token once (a prompt once a response when not shared); the mask, the positions, and which place predicts
    which token of which response, against an enumeration token by token of every (prompt, response)."""
    trees, dataset = forest
    some = data.draw(st.lists(st.sampled_from(range(len(trees))), unique=True))
    only = data.draw(
        st.none() | st.integers(0, min((len(trees[i][1]) for i in some), default=1) - 1)
    )
    batch = make_batch(dataset, some, shared, only)

    number = np.cumsum(
        [0, *(len(responses) for _, responses in trees)]
    )  # of a tree's first response
    # (token, tree in the batch, None in a prompt or else the response, position) of every place of the flat row
    places, scored, spans, tree_of, rows, last = [], [], [], [], [], []
    for i in some:
        prompt, responses = trees[i]
        responses = responses if only is None else responses[only : only + 1]
        for group in [responses] if shared else [[r] for r in responses]:
            start = len(places)
            places += [(token, len(spans), None, k) for k, token in enumerate(prompt)]
            for ids, flags in group:
                r = len(tree_of)
                tree_of.append(len(spans))
                rows.append(number[i] + [ids for ids, _ in trees[i][1]].index(ids))
                for k, (token, flag) in enumerate(zip(ids, flags)):
                    before = len(places) - 1 if k else start + len(prompt) - 1
                    scored += [(before, token, r)] if flag else []
                    places.append((token, len(spans), r, len(prompt) + k))
                last.append(len(places) - 1)
            spans.append((len(prompt), [len(ids) for ids, _ in group]))

    assert batch.tokens.tolist() == [token for token, *_ in places] and batch.spans == spans
    assert batch.positions.tolist() == [position for *_, position in places]
    assert (
        list(zip(batch.logit_index.tolist(), batch.target.tolist(), batch.response.tolist()))
        == scored
    )
    assert (batch.tree.tolist(), batch.last.tolist()) == (tree_of, last)
    assert batch.columns["reward"].tolist() == rows
    assert batch.lengths.tolist() == [
        sum(r == response for *_, r in scored) for response in range(len(tree_of))
    ]
    sums = batch.sum_by_response(batch.target.double())
    assert sums.tolist() == [
        sum(t for _, t, r in scored if r == response) for response in range(len(tree_of))
    ]
    visible = 0
    for i, (_, tree, response, _) in enumerate(places):
        for j, (_, other, owner, _) in enumerate(places):
            sees = j <= i and tree == other and owner in (None, response)
            assert sees == bool(j <= i < batch.kv_end[j])
            visible += sees
    assert batch.context == pytest.approx(visible / max(1, len(places)))
    if only is None and len(some) == len(trees):
        assert len(places) == dataset.tree_lengths(shared).sum()


@quick
@given(
    st.lists(st.integers(1, 40), max_size=40), st.integers(40, 90), st.integers(1, 5), st.randoms()
)
def test_packing_gives_every_rank_its_share(lengths: list[int], budget: int, ranks: int, random):
    """Every example on one rank in one micro-batch, none above the budget, as many on every rank; a budget that one
    example passes is refused with the one that would do."""
    lengths = np.array(lengths, int)
    examples = np.array(random.sample(range(len(lengths)), random.randint(0, len(lengths))), int)
    shares = [micro_batches(lengths, examples, budget, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    bins = [items for share in shares for items in share]
    assert sorted(i for items in bins for i in items) == sorted(examples)
    assert all(lengths[items].sum() <= budget for items in bins)
    if len(examples) and lengths[examples].max() > 1:
        with pytest.raises(ValueError, match=f"raise --max-tokens to {lengths[examples].max()} "):
            pack(lengths[examples], int(lengths[examples].max()) - 1, ranks)


@quick
@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 9), st.booleans(), st.integers(0, 30))
def test_an_epoch_visits_every_example_once(
    n: int, batch_size: int, seed: int, shuffle: bool, steps: int
):
    """Whatever the batch size; and visited() names what so many steps touch."""
    per_epoch = steps_per_epoch(n, batch_size)
    for epoch in range(2):
        chunks = [
            step_examples(n, batch_size, epoch * per_epoch + k, seed, shuffle)
            for k in range(per_epoch)
        ]
        assert sorted(np.concatenate(chunks)) == list(range(n))
        assert all(len(chunk) == batch_size for chunk in chunks[:-1]) and len(chunks[-1])
    touched = {int(i) for k in range(steps) for i in step_examples(n, batch_size, k, seed, shuffle)}
    if steps:
        assert visited(n, batch_size, steps, seed, shuffle).tolist() == sorted(touched)


# ---- the command line ------------------------------------------------------------------------------------------------

CONFIGS = [train_sft.Config, train_dpo.Config, train_kto.Config]
flag_names = st.sampled_from([name for cls in CONFIGS for name in cls.__dataclass_fields__])
spelled = st.builds(lambda no, name, dash: "--" + no + (name.replace("_", "-") if dash else name),
                    st.sampled_from(["", "", "no-", "no_"]), flag_names, st.booleans())  # fmt: skip
words = st.text(max_size=8)
words |= st.sampled_from(["1", "-1", "0.5", "1e-7", "nan", "auto", "true", "9" * 5000, "--", "--="])
argvs = st.lists(spelled | words | st.builds("{}={}".format, spelled, words), max_size=6)
argvs = argvs.map(lambda argv: [word for word in argv if word not in ("-h", "--help")])


def parsed(cls: type, argv: list[str]):
    """(config or None, what went to standard error)."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            return config.parse(cls, "", argv), said.getvalue()
        except SystemExit as stop:
            assert stop.code == 2
            return None, said.getvalue()


def fits(value, hint) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(isinstance(v, str) for v in value)
    return type(value) is hint


@settings(quick, max_examples=300)
@given(st.sampled_from(CONFIGS), argvs)
def test_any_command_line_is_taken_or_refused_in_one_line(cls: type, argv: list[str]):
    """A config whose every field has its type, or status 2 with one line; and a flag's negation is its opposite."""
    found, said = parsed(cls, argv)
    if found is None:
        assert said.startswith("error: ") and said.count("\n") <= 1 + sum(
            word.count("\n") for word in argv
        )
    else:
        assert not said and all(
            fits(getattr(found, name), hint) for name, hint in get_type_hints(cls).items()
        )


@pytest.mark.parametrize(
    ("argv", "value"),
    [(["--shuffle"], True), (["--no-shuffle"], False), (["--shuffle=false"], False), (["--no-shuffle=true"], False),
     (["--no_shuffle=false"], True)],
)  # fmt: skip
def test_a_negated_flag_means_its_opposite(argv: list[str], value: bool):
    """--no-shuffle=true cannot switch shuffling on."""
    assert parsed(train_sft.Config, argv)[0].shuffle is value


def values(hint) -> st.SearchStrategy:
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    text = st.text(min_size=1, max_size=6).filter(lambda t: not t.startswith("-"))
    kinds = {int: st.integers(), float: st.floats(), bool: st.booleans(), str: text}
    return kinds.get(hint, st.lists(text, min_size=1))


@quick
@given(st.sampled_from(CONFIGS), st.data())
def test_what_is_written_is_read_back(tmp_path: Path, cls: type, data):
    """Random values of every flag, given as flags or as the file that to_json writes, make the same config."""
    hints = {name: hint for name, hint in get_type_hints(cls).items() if name != "config"}
    wanted = cls(**{name: data.draw(values(hint)) for name, hint in hints.items()})
    argv = []
    for name, value in vars(wanted).items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif name != "config":
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    path = tmp_path / "config.json"
    path.write_text(config.to_json(wanted))
    by_file, said = parsed(cls, ["--config", str(path)])
    assert by_file, said
    by_file.config = ""
    assert (
        repr(by_file) == repr(wanted) == repr(parsed(cls, argv)[0])
    )  # by repr: NaN is not equal to itself


@quick
@given(
    st.dictionaries(flag_names | texts, json_values, max_size=3).map(json.dumps).map(str.encode)
    | lines
)
@example(b"[" * 100_000)
def test_any_config_file_is_taken_or_refused_by_name(tmp_path: Path, content: bytes):
    """A file of flags that are not, values that do not fit, or no JSON at all: the one line names the file."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    found, said = parsed(train_dpo.Config, ["--config", str(path)])
    assert found or said.startswith("error: ") and "config.json" in said
    for value in (
        json.loads(content).values() if found else ()
    ):  # nothing else has a place in a flag
        assert all(
            isinstance(v, (str, int, float))
            for v in (value if isinstance(value, list) else [value])
        )


# ---- folders of weights ----------------------------------------------------------------------------------------------

OFFERS = [0, -1, 1, 2**31, 2**32, 2**53, 2**60, 2**63, 2**64 - 1, 2**64, 1.5, "3", None, [], {}]
DTYPES = "BOOL U8 I8 F8_E5M2 F8_E4M3 I16 F16 BF16 I32 U32 F32 F64 I64 C64 F4 X".split()


def header_of(content: bytes) -> tuple[dict, bytes]:
    """(header, data) of a safetensors file: eight bytes of length, that much JSON, then the tensors."""
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def file_of(header, data: bytes, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """A safetensors file with one or two lies in it."""
    header, data = header_of(content)
    names = sorted(name for name in header if name != "__metadata__")
    for _ in range(draw(st.integers(1, 2))):
        what = draw(
            st.sampled_from(
                "cut size text flip shape reshape dtype offsets swap drop nested".split()
            )
        )
        name = draw(st.sampled_from(names))
        entry = header[name]
        if what == "cut":
            return content[: draw(st.integers(0, len(content) - 1))]
        if what == "size":
            return file_of(
                header,
                data,
                draw(st.sampled_from([0, 1, 7, 2**20, 10**8, 2**31, 2**60, 2**63, 2**64 - 1])),
            )
        if what == "text":
            return file_of(
                draw(st.binary(max_size=20) | json_values.map(json.dumps).map(str.encode)), data
            )
        if what == "nested":
            return file_of(b'{"a":' * 50_000, data)
        if what == "flip":
            flipped = bytearray(content[: 8 + len(json.dumps(header))])
            flipped[draw(st.integers(0, len(flipped) - 1))] ^= 1 << draw(st.integers(0, 7))
            return bytes(flipped) + content[len(flipped) :]
        if what == "shape":
            entry["shape"] = draw(
                st.lists(st.sampled_from(OFFERS), max_size=4) | st.sampled_from(OFFERS)
            )
        elif what == "reshape" and "query_key_value" not in name:
            before = header_of(content)[0][name]["shape"]
            entry["shape"] = draw(
                st.sampled_from([[math.prod(before)], [1, *before], before[::-1]])
            )
        elif what == "dtype":
            entry["dtype"] = draw(st.sampled_from(DTYPES))
        elif what == "offsets":
            entry["data_offsets"] = draw(st.lists(st.sampled_from(OFFERS), max_size=3))
        elif what == "swap":
            other = header[draw(st.sampled_from(names))]
            entry["data_offsets"], other["data_offsets"] = (
                other["data_offsets"],
                entry["data_offsets"],
            )
        elif what == "drop":
            names.remove(name)
            header.pop(name)
    return file_of(header, data)


def in_a_small_process(work) -> None:
    """Runs work() in a forked child that may take 512 MB more than this process; a death by signal fails too."""

    def child(pipe) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), used + (512 << 20)))
        torch.set_num_threads(1)
        try:
            work()
            pipe.send("")
        except BaseException as error:  # noqa: BLE001 - whatever it is, the parent reports it
            lines = "".join(traceback.format_exception(error)).splitlines()
            pipe.send("\n".join(line[:300] for line in lines)[:6000])

    ours, theirs = multiprocessing.Pipe(False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    theirs.close()
    try:
        report = ours.recv()
    except EOFError:
        report = "died"
    process.join()
    assert process.exitcode == 0 and not report, f"{report} (exit {process.exitcode})"


def small_model(folder: Path, family: str) -> bytes:
    """Writes a tiny folder without a tokenizer; returns its weight file."""
    save_model(
        hf.new_model(hf.New(family=family, vocab=10, width=16, heads=2, layers=1, ffn=8)), folder
    )
    return (folder / "model.safetensors").read_bytes()


def loads_or_names(folder: Path, call=lambda folder: load_model(folder, torch.float32)):
    """The result of loading, or None when it is refused with the folder's name in the message."""
    try:
        return call(folder)
    except (ValueError, FileNotFoundError) as error:
        assert str(folder) in str(error), f"no file is named: {error}"
        return None


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_lying_weight_files_are_refused(family: str, tmp_path: Path):
    """Cut files, lying sizes, shapes of 2**60, offsets that overlap, other types, no JSON: an error with the file's
    name, in bounded memory; what loads in spite of it has floating weights of the config's shapes."""
    content = small_model(tmp_path, family)
    whole = {name: entry for name, entry in header_of(content)[0].items() if name != "__metadata__"}

    @settings(quick, max_examples=150, database=None)
    @given(damaged(content))
    def check(broken: bytes):
        (tmp_path / "model.safetensors").write_bytes(broken)
        loads_or_names(tmp_path, weight_files)
        if loads_or_names(tmp_path):
            header, _ = header_of(broken)
            kinds = {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
            assert kinds <= {"F64", "F32", "F16", "BF16"}
            assert all(header[name]["shape"] == entry["shape"] for name, entry in whole.items())

    in_a_small_process(check)


def test_a_fused_weight_of_another_shape_is_refused(tmp_path: Path):
    """As many numbers in another shape: named like every other weight that does not fit."""
    header, data = header_of(small_model(tmp_path, "gpt_neox"))
    header["gpt_neox.layers.0.attention.query_key_value.weight"]["shape"].reverse()
    (tmp_path / "model.safetensors").write_bytes(file_of(header, data))
    assert loads_or_names(tmp_path) is None


@settings(quick, max_examples=150)
@given(st.data())
def test_lying_indexes_are_refused(tmp_path: Path, data):
    """model.safetensors.index.json of any content: the weights it truly lists, or an error with the folder's name."""
    content = (
        small_model(tmp_path / "model", "llama") if not (tmp_path / "model").exists() else None
    )
    folder = tmp_path / "model"
    names = list(header_of(content or (folder / "model.safetensors").read_bytes())[0])
    names = [name for name in names if name != "__metadata__"]
    save_file(
        {names[0]: torch.zeros(1)}, folder / "other.safetensors"
    )  # holds one weight, of a wrong shape
    odd = ["", ".", "no.safetensors", "other.safetensors", "../model/model.safetensors", "\0", 3]
    good = dict.fromkeys(names, "model.safetensors")
    lie = st.tuples(st.sampled_from([*names[1:], "spare"]), st.sampled_from(odd)).map(
        lambda pair: {**good, pair[0]: pair[1]}
    )
    maps = (json_values | st.just(good)).map(lambda m: json.dumps({"weight_map": m}).encode())
    for index in (json.dumps({"weight_map": data.draw(lie)}).encode(), data.draw(maps | lines)):
        (folder / "model.safetensors.index.json").write_bytes(index)
        if loads_or_names(folder):
            assert json.loads(index)["weight_map"] == good


NUMBERS = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size intermediate_size head_dim"


def test_impossible_configs_are_refused(tmp_path: Path):
    """config.json of any content, or with any value for one of its numbers: an error with the folder's name, in
    bounded memory, or a model; never a layer list of 2**60."""
    small_model(tmp_path, "llama")
    good = json.loads((tmp_path / "config.json").read_text())
    keys = st.sampled_from([*NUMBERS.split(), *good])
    changed = st.dictionaries(keys, st.sampled_from(OFFERS) | json_values, min_size=1, max_size=2)

    @settings(quick, max_examples=200, database=None)
    @given(changed.map(lambda change: json.dumps({**good, **change}).encode()) | lines)
    def check(content: bytes):
        (tmp_path / "config.json").write_bytes(content)
        loads_or_names(tmp_path)

    in_a_small_process(check)


@quick
@given(st.data())
def test_any_manifest_is_whole_or_says_what_is_wrong(tmp_path: Path, data):
    """checkpoint.damage of a manifest of any content gives a reason; "" only for the one that lists every file."""
    good = {}
    for name in ("state.safetensors", "state.json"):
        (tmp_path / name).write_bytes(name.encode())
        good[name] = {"bytes": len(name), "sha256": checkpoint._digest(tmp_path / name)}
    changed = st.dictionaries(st.sampled_from([*good, "x", "..", "\0"]), json_values).map(
        lambda more: {**good, **more}
    )
    content = data.draw(
        st.just(good).map(json.dumps).map(str.encode)
        | changed.map(json.dumps).map(str.encode)
        | lines
    )
    (tmp_path / "manifest.json").write_bytes(content)
    reason = checkpoint.damage(tmp_path)
    assert isinstance(reason, str)
    if not reason:
        assert json.loads(content) == good
