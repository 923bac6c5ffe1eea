"""Any file, row or conversation becomes trees as defined, or an error with a reason; then batches.

Inputs are made by hypothesis; the expected result is computed a second time here in plain Python.
"""

import contextlib
import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from strategies import json_values, lines, quick, roles, rows, texts

from data import formats
from data.containers import kind_of
from data.dataset import from_trees, load_dataset
from data.encode import ROWS
from data.keys import check_used
from data.rows import read_rows, write_rows
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.trees import make_batch, micro_batches, pack, step_examples, steps_per_epoch, visited

pytestmark = pytest.mark.slow  # together about ten seconds

# ---- rows ----------------------------------------------------------------------------------------


def a_row(line: bytes) -> dict | None:
    """Return the JSON object of a line, by Python's parser, or None; no key stands twice."""

    def once(pairs: list) -> dict:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        value = json.loads(line.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@quick
@given(st.lists(lines, max_size=5), st.booleans())
@example([b'\xef\xbb\xbf{"prompt": "a"}', b"{}"], False)
def test_a_file_is_read_up_to_its_first_bad_line(tmp_path: Path, lines: list[bytes], packed: bool):
    """read_rows gives the rows before the first bad line and an error with its file:line."""
    path = tmp_path / ("rows.jsonl" + ".gz" * packed)
    path.write_bytes(gzip.compress(b"\n".join(lines)) if packed else b"\n".join(lines))
    try:
        assume(kind_of(path) == "lines")  # test_containers.py has the others
    except ValueError:
        assume(False)
    wanted = []
    bad = None
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        row = a_row(line)
        if row is None:
            bad = number
            break
        wanted.append(row)
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
@example(b"PAR1", 0, b"")  # then it is a Parquet file, which needs pyarrow
def test_damaged_gzip_files_are_named(tmp_path: Path, noise: bytes, at: int, patch: bytes):
    """Noise, a cut or a patched gzip file gives an error with its name, or rows."""
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
        except (ValueError, ImportError) as error:
            assert str(path) in str(error)


@quick
@given(st.lists(st.dictionaries(texts, json_values, max_size=3), max_size=3))
def test_rows_that_are_written_are_read_back(tmp_path: Path, rows: list[dict]):
    """read_rows undoes write_rows for any JSON, halves of surrogate pairs included."""
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
    """Any row gives text or messages, with a number a response in every column, or a ValueError.

    A null counts as an absent key.
    """

    def outcome(row: dict):
        try:
            return formats.answers_of(row, plain) if kind == "answers" else ROWS[kind](row, plain)
        except ValueError as error:
            assert str(error)
            return None

    parsed = outcome(row)
    without_nulls = {key: value for key, value in row.items() if value is not None}
    assert repr(parsed) == repr(outcome(without_nulls))  # by repr: NaN is not equal to itself
    if parsed is None:
        return
    prompt, responses, columns = (*parsed, {}) if kind == "answers" else parsed
    assert responses and all(isinstance(r, str) or is_messages(r) for r in responses)
    if prompt is None:
        assert len(responses) == 1 and responses[0][-1]["role"] == "assistant"
    else:
        assert isinstance(prompt, str) or is_messages(prompt) and prompt[-1]["role"] != "assistant"
    for values in columns.values():
        assert len(values) == len(responses)
        assert all(isinstance(v, float) and not abs(v) > 3.5e38 for v in values)


class Bytes:
    """A plain template over bytes, with the part of Template that load_dataset uses."""

    plain = True
    hash = "bytes"
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
        return [(head, answer)]

    def marks(self, said):
        return set()


def is_usable(line: bytes, kind: str) -> bool:
    """Return True if a line has a row with tokens in its prompt and in every response."""
    try:
        content = a_row(line) or {}
        row = ROWS[kind](content, True)
        check_used(content, row, kind)
        if row.prompt is None:
            [(head, answer)] = Bytes().conversation(row.responses[0])
            return bool(head and answer[0])
        head, answers, _ = Bytes().pair(row.prompt, row.responses)
        return bool(head) and all(ids for ids, _ in answers)
    except ValueError:
        return False


@settings(quick, max_examples=60)
@given(st.lists(lines, max_size=6), st.sampled_from(list(ROWS)), st.integers(0, 6))
def test_bad_rows_are_counted_up_to_the_limit(
    tmp_path: Path, lines: list[bytes], kind: str, limit: int
):
    """load_dataset counts bad rows; past --max-bad-rows it names the first."""
    good = {"prompt": "a", "response": "b", "chosen": "b", "rejected": "c", "label": True}
    good |= {"helpfulness": 3, "responses": ["b"], "weights": [1.0]}
    if kind == "label":  # a pair beside an answer with a label says two things
        del good["chosen"], good["rejected"]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([json.dumps(good).encode(), *lines]))
    kept = 1
    bad = []
    for number, line in enumerate(lines, 2):
        if line.strip():
            usable = is_usable(line, kind)
            kept += usable
            bad += [] if usable else [number]

    def load():
        cache = tmp_path / "cache"
        return load_dataset(path, kind, Bytes(), 10**6, "drop", limit, cache, 1, lambda text: None)

    if len(bad) <= limit:
        data = load()
        assert len(data) == kept
        assert (data.counts["bad"], data.counts["rows"]) == (len(bad), kept + len(bad))
    else:
        with pytest.raises(ValueError) as error:
            load()
        assert str(error.value).startswith(f"{path}:{bad[0]}: ")
        assert "--max-bad-rows" in str(error.value)


# ---- templates -----------------------------------------------------------------------------------

MARKERS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Return a byte-level BPE that merges words, spaces and line feeds, with all markers."""
    folder = tmp_path_factory.mktemp("bpe")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = byte_level
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        show_progress=False,
        special_tokens=["<s>", "</s>", *MARKERS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tok.train_from_iterator(["the cat\nsat  on\n\nthe mat, the cat ran\n"] * 9, trainer)
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
    """Return [system,] user, assistant, user, assistant, ... ending with the assistant."""
    chat = [{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        chat += [
            {"role": "user", "content": draw(contents)},
            {"role": "assistant", "content": draw(answers)},
        ]
    return chat


def by_hand(name: str, chat: list[dict]) -> list[tuple[str, bool]]:
    """Return a conversation as [(text, scored), ...], from the documentation of each format.

    Scored is the assistant's text, end of turn included.
    """
    parts = []
    for k, m in enumerate(chat):
        role = m["role"]
        text = m["content"]
        said = role == "assistant"
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
            before = ""
            if k == 1 and chat[0]["role"] == "system":
                before = f"<<SYS>>\n{chat[0]['content']}\n<</SYS>>\n\n"
            parts += [(f"<s>[INST] {(before + text).strip()} [/INST]", False)]
    return parts[:-1] if parts[-1] == ("\n", False) else parts


@settings(quick, max_examples=60)
@given(chats())
@pytest.mark.parametrize("name", ["chatml", "zephyr", "llama2", "llama3"])
def test_conversations_are_the_format_and_decode_back(tokenizer, name: str, chat: list[dict]):
    """A conversation's ids are those of its format written by hand, and decode to it.

    Scored are the assistant's texts; each ends with its only stop id. A conversation is the pair of
    the messages before the first answer and those from there on, and its prompt begins with the
    ids of a prompt alone.
    """
    template = Template(name, tokenizer)
    parts = by_hand(name, chat)
    text = "".join(part for part, _ in parts)
    [(prompt, (ids, scored))] = template.conversation(chat)
    assert template.render(chat, False).rstrip() == text
    assert prompt + ids == tokenizer.encode(text)
    assert tokenizer.decode(prompt + ids, False) == text and len(ids) == len(scored)

    runs = []
    for before, flag, i in zip([0, *scored], scored, ids):
        if flag:
            runs += [] if before else [[]]
            runs[-1].append(i)
    said = [part for part, by_assistant in parts if by_assistant]
    assert len(runs) == len(said)
    if name in ("chatml", "llama3"):  # their markers are single tokens, across which nothing merges
        for run, whole in zip(runs, said):
            # White space in front of the text may merge with the line feeds after the marker.
            text = tokenizer.decode(run, False)
            assert whole.endswith(text.lstrip()) or "\ufffd" in text
    for run in runs:
        assert run[-1] in template.stop_ids and not set(run[:-1]) & template.stop_ids

    first = next(k for k, m in enumerate(chat) if m["role"] == "assistant")
    assert template.pair(chat[:first], [chat[first:]])[:2] == (prompt, [(ids, scored)])
    assert template.prompt(chat[:first])[: len(prompt)] == prompt


@settings(quick, max_examples=60)
@given(contents, st.lists(answers, min_size=1, max_size=3))
def test_plain_is_bos_prompt_response_eos(tokenizer, prompt: str, responses: list[str]):
    """Exactly that for every response, with nothing in between; it decodes to the text."""
    head, encoded, _ = Template("plain", tokenizer).pair(prompt, responses)
    for (ids, scored), response in zip(encoded, responses, strict=True):
        assert head + ids == [tokenizer.bos, *tokenizer.encode(prompt + response), tokenizer.eos]
        assert tokenizer.decode(head + ids, False) == f"<s>{prompt}{response}</s>"
        assert scored == [1] * len(ids)


odd_message = st.fixed_dictionaries({"role": roles, "content": contents | st.integers()})


@settings(quick, max_examples=60)
@given(st.lists(odd_message, max_size=5) | json_values)
@pytest.mark.parametrize("name", ["plain", "chatml", "llama2"])
def test_any_messages_are_rendered_or_refused(tokenizer, name: str, chat):
    """Any list of messages gives ids or a ValueError."""
    template = Template(name, tokenizer)
    for call in (template.conversation, template.prompt, lambda m: template.pair("a", [m])):
        with contextlib.suppress(ValueError):
            assert call(chat)
    with contextlib.suppress(ValueError):
        assert template.pair(chat, [chat])


# ---- packing -------------------------------------------------------------------------------------


@st.composite
def forests(draw):
    """Return random trees, also as a data set: no two tokens have the same id, some are scored.

    Responses may be empty.
    """
    sizes = st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=1, max_size=3))
    trees = []
    next_id = 0
    for prompt_len, response_lens in draw(st.lists(sizes, min_size=1, max_size=6)):
        prompt = list(range(next_id, next_id + prompt_len))
        next_id += prompt_len
        responses = []
        for n in response_lens:
            flags = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
            responses.append((list(range(next_id, next_id + n)), flags))
            next_id += n
        trees.append((prompt, responses))
    n = sum(len(responses) for _, responses in trees)
    return trees, from_trees(trees, {"reward": np.arange(n, dtype=np.float32)})


@quick
@given(forests(), st.booleans(), st.data())
def test_a_batch_is_its_branches_written_out(forest, shared: bool, data):
    """Tokens, positions, mask and scored tokens equal an enumeration of every (prompt, response).

    Every token occurs once, a prompt once a response when it is not shared.
    """
    trees, dataset = forest
    some = data.draw(st.lists(st.sampled_from(range(len(trees))), unique=True))
    fewest = min((len(trees[i][1]) for i in some), default=1)
    only = data.draw(st.none() | st.integers(0, fewest - 1))
    batch = make_batch(dataset, some, shared, only)

    first_number = np.cumsum([0, *(len(responses) for _, responses in trees)])  # of each tree
    places = []  # of the flat row: (token, tree, response or None in a prompt, position)
    scored = []  # (place that predicts, token, response)
    spans = []
    tree_of = []  # the rest: of every response
    numbers = []
    last = []
    for i in some:
        prompt, responses = trees[i]
        chosen = range(len(responses)) if only is None else [only]
        for group in [chosen] if shared else [[k] for k in chosen]:
            start = len(places)
            places += [(token, len(spans), None, k) for k, token in enumerate(prompt)]
            for number in group:
                ids, flags = responses[number]
                r = len(tree_of)
                tree_of.append(len(spans))
                numbers.append(first_number[i] + number)
                for k, (token, flag) in enumerate(zip(ids, flags)):
                    before = len(places) - 1 if k else start + len(prompt) - 1
                    if flag:
                        scored.append((before, token, r))
                    places.append((token, len(spans), r, len(prompt) + k))
                last.append(len(places) - 1)
            spans.append((len(prompt), [len(responses[k][0]) for k in group]))

    assert batch.tokens.tolist() == [token for token, *_ in places]
    assert batch.spans == spans
    assert batch.positions.tolist() == [position for *_, position in places]
    columns = (batch.logit_index, batch.target, batch.response)
    assert list(zip(*(column.tolist() for column in columns))) == scored
    assert (batch.tree.tolist(), batch.last.tolist()) == (tree_of, last)
    assert batch.columns["reward"].tolist() == numbers
    sums = batch.sum_by_response(batch.target.double())
    for response in range(len(tree_of)):
        targets = [token for _, token, r in scored if r == response]
        assert batch.lengths[response] == len(targets)
        assert sums[response] == sum(targets)
    visible = 0
    for i, (_, tree, response, _) in enumerate(places):
        for j, (_, other, owner, _) in enumerate(places):
            sees = j <= i and tree == other and owner in (None, response)
            assert sees == bool(j <= i < batch.kv_end[j])
            visible += sees
    assert batch.context == pytest.approx(visible / max(1, len(places)))
    if only is None and len(some) == len(trees):
        assert len(places) == dataset.tree_lengths(shared).sum()


sizes = st.lists(st.integers(1, 40), max_size=40)


@quick
@given(sizes, st.integers(40, 90), st.integers(1, 5), st.randoms())
def test_packing_gives_every_rank_its_share(lengths: list[int], budget: int, ranks: int, random):
    """Every example is in one micro-batch of one rank, within the budget; ranks have as many.

    A budget that an example exceeds is an error that names a sufficient one.
    """
    lengths = np.array(lengths, int)
    examples = np.array(random.sample(range(len(lengths)), random.randint(0, len(lengths))), int)
    shares = [micro_batches(lengths, examples, budget, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    bins = [items for share in shares for items in share]
    assert sorted(i for items in bins for i in items) == sorted(examples)
    assert all(lengths[items].sum() <= budget for items in bins)
    longest = int(lengths[examples].max()) if len(examples) else 0
    if longest > 1:
        with pytest.raises(ValueError, match=f"raise --max-tokens to {longest} "):
            pack(lengths[examples], longest - 1, ranks)


@quick
@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 9), st.booleans(), st.integers(0, 30))
def test_an_epoch_visits_every_example_once(
    n: int, batch_size: int, seed: int, shuffle: bool, steps: int
):
    """For any batch size; visited() lists the examples of the first steps."""
    per_epoch = steps_per_epoch(n, batch_size)
    for epoch in range(2):
        steps_of_epoch = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        chunks = [step_examples(n, batch_size, k, seed, shuffle) for k in steps_of_epoch]
        assert sorted(np.concatenate(chunks)) == list(range(n))
        assert all(len(chunk) == batch_size for chunk in chunks[:-1]) and len(chunks[-1])
    touched = {int(i) for k in range(steps) for i in step_examples(n, batch_size, k, seed, shuffle)}
    if steps:
        assert visited(n, batch_size, steps, seed, shuffle).tolist() == sorted(touched)
