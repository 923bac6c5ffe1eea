"""Keys of rows: each is used, refused by name, or named as ignored; no meaning is lost."""

import json
from pathlib import Path

import pytest

from data.dataset import load_dataset, load_prompts
from data.encode import ROWS
from data.formats import sft_row
from data.keys import canonical, prompt_in
from data.templates import Template
from data.tokenizer import load_tokenizer

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}
EARLIER = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]

USED = {  # row -> the same under the keys that are read
    "system": ({"system": "S", "prompt": "Q", "response": "A"}, [SYSTEM, USER]),
    "system_prompt": ({"system_prompt": "S", "prompt": "Q", "response": "A"}, [SYSTEM, USER]),
    "both alike": ({"system": "S", "system_prompt": "S", "prompt": "Q"}, [SYSTEM, USER]),
    "said twice": ({"system": "S", "prompt": [SYSTEM, USER]}, [SYSTEM, USER]),
    "empty system": ({"system": "", "prompt": "Q"}, "Q"),
    "null system": ({"system": None, "prompt": "Q"}, "Q"),
    "history": ({"history": [["q", "a"]], "prompt": "Q"}, [*EARLIER, USER]),
    "history of messages": ({"history": EARLIER, "prompt": "Q"}, [*EARLIER, USER]),
    "system and history": (
        {"system": "S", "history": [["q", "a"]], "prompt": "Q"},
        [SYSTEM, *EARLIER, USER],
    ),
    "no history": ({"history": [], "prompt": "Q"}, "Q"),
    "instruction": ({"instruction": "Do", "output": "A"}, "Do"),
    "instruction and input": ({"instruction": "Do", "input": "it", "output": "A"}, "Do\nit"),
    "empty input": ({"instruction": "Do", "input": "", "output": "A"}, "Do"),
    "instruction with system": (
        {"system": "S", "instruction": "Do", "input": "it", "response": "A"},
        [SYSTEM, {"role": "user", "content": "Do\nit"}],
    ),
    "parts": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"text": "!"}]}]},
        [{"role": "user", "content": "Q!"}],
    ),
}


@pytest.mark.parametrize("name", USED)
def test_what_stands_beside_the_prompt_becomes_part_of_it(name: str):
    row, prompt = USED[name]
    clean, ignored, _ = canonical(row)
    assert clean["prompt"] == prompt and not ignored
    assert not {"system", "system_prompt", "history", "instruction"} & clean.keys()


TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
SPOKEN = {  # what a sender writes beside the text -> what the chat template gets
    "reasoning_content": ({"reasoning_content": "hm"}, {"reasoning_content": "hm"}),
    "thinking": ({"thinking": "hm"}, {"reasoning_content": "hm"}),
    "reasoning": ({"reasoning": "hm", "reasoning_content": None}, {"reasoning_content": "hm"}),
    "tool_calls": ({"tool_calls": [CALL]}, {"tool_calls": [CALL]}),
    "flat": ({"tool_calls": [{"name": "f", "arguments": {"x": 1}}]}, {"tool_calls": [CALL]}),
    "as text": (
        {"tool_calls": [{"id": "7", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"tool_calls": [{"id": "7", **CALL}]},
    ),
    "function_call": (
        {"function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"tool_calls": [CALL]},
    ),
    "nothing": ({"tool_calls": [], "thinking": ""}, {}),
}


@pytest.mark.parametrize("name", SPOKEN)
def test_what_stands_beside_a_text_reaches_the_template(name: str):
    """Under one name, calls with their arguments as objects; content may be null beside a call."""
    given, got = SPOKEN[name]
    for content in ("A", None):
        if content is None and "tool_calls" not in got:
            continue
        row = {"messages": [USER, {**ANSWER, "content": content, **given}]}
        [_, message] = sft_row(canonical(row, "sft").row).responses[0]
        assert message == {**ANSWER, "content": content or "", **got}


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"tools": [TOOL]}, {"tools": [TOOL]}),
        ({"tools": [TOOL["function"]]}, {"tools": [TOOL]}),
        ({"tools": json.dumps([TOOL])}, {"tools": [TOOL]}),
        ({"functions": [{"name": "f"}], "tools": None}, {"tools": [TOOL]}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ({"template_kwargs": {"a": 1}, "tools": [TOOL]}, {"a": 1, "tools": [TOOL]}),
        ({"tools": [], "chat_template_kwargs": {}}, {}),
    ],
)
def test_options_of_the_template(given: dict, options: dict):
    """Tools under their names and shapes, and values for the chat template."""
    clean, ignored, got = canonical({"prompt": "Q", "response": "A", **given}, "sft")
    assert got == options and not ignored
    assert clean == {"prompt": "Q", "response": "A"}


@pytest.mark.parametrize("role", ["tool", "function", "observation", "ipython"])
def test_results_of_tools_are_messages_of_a_tool(role: str):
    """LLaMA-Factory's function_call is an answer that calls; results come back by any name."""
    turns = [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": role, "value": "1"},
        {"from": "gpt", "value": "A"},
    ]
    [_, call, result, _] = sft_row(canonical({"conversations": turns}, "sft").row).responses[0]
    assert call == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert result == {"role": "tool", "content": "1"}


def with_key(key: str, value: object, place: str) -> dict:
    """Return a good row with a key put into the row or into one of its messages."""
    if place == "row":
        return {"prompt": "Q", "response": "A", key: value}
    if place == "prompt":
        return {"prompt": [{**USER, key: value}], "response": "A"}
    return {"messages": [USER, {**ANSWER, key: value}]}


ROW_KEYS = {
    "documents": ["d"],
    "images": ["a.png"],
    "audio": "a.wav",
    "weight": 0.5,
    "train": False,
    "mask": [0, 1],
}
MESSAGE_KEYS = {"refusal": "no", "images": ["a.png"], "audio": "a.wav"}


@pytest.mark.parametrize("key", ROW_KEYS)
def test_a_key_of_a_row_that_would_be_lost_is_refused(key: str):
    with pytest.raises(ValueError, match=f"`{key}` cannot be used"):
        canonical(with_key(key, ROW_KEYS[key], "row"), "sft")
    for nothing in (None, [], {}, ""):
        canonical(with_key(key, nothing, "row"), "sft")


@pytest.mark.parametrize("place", ["prompt", "messages"])
@pytest.mark.parametrize("key", MESSAGE_KEYS)
def test_a_key_of_a_message_that_would_be_lost_is_refused(key: str, place: str):
    with pytest.raises(ValueError, match=rf"`{place}\[\d\]\.{key}` would be lost"):
        canonical(with_key(key, MESSAGE_KEYS[key], place), "sft")
    for nothing in (None, [], {}, ""):
        canonical(with_key(key, nothing, place), "sft")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"system": "S", "system_prompt": "T", "prompt": "Q"}, "say different things"),
        ({"system": "S", "prompt": [{"role": "system", "content": "T"}, USER]}, "two system"),
        ({"system": 5, "prompt": "Q"}, "`system` must be text"),
        ({"system": "S", "chosen": "a", "rejected": "b"}, "`system` but no prompt to put in front"),
        ({"history": "q", "prompt": "Q"}, "`history` must be a list"),
        ({"history": [["q"]], "prompt": "Q"}, r"`history\[0\]` must be a pair"),
        ({"history": [["q", 5]], "prompt": "Q"}, r"`history\[0\]` must be a pair"),
        ({"instruction": "Do", "prompt": "Q", "response": "A"}, "`instruction` beside a prompt"),
        ({"instruction": "Do", "messages": [USER, ANSWER]}, "`instruction` beside a prompt"),
        ({"instruction": "Do", "conversations": [USER, ANSWER]}, "`instruction` beside a prompt"),
        ({"instruction": ["Do"], "output": "A"}, "`instruction` must be text"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"`prompt\[0\].content` has a part of type 'image_url': only text",
        ),
        ({"prompt": "Q", "tools": 5}, "`tools` must be a list of tools"),
        ({"prompt": "Q", "tools": "{"}, "`tools` is not valid JSON"),
        ({"prompt": "Q", "tools": [{"type": "function"}]}, r"`tools\[0\]` must be"),
        ({"prompt": "Q", "tools": [TOOL], "functions": [{"name": "g"}]}, "say different things"),
        ({"prompt": "Q", "chat_template_kwargs": [1]}, "must be one object of values"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, r"`messages\[1\].tool_calls\[0\]`"),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            r"arguments` is not valid JSON",
        ),
        ({"messages": [USER, {**ANSWER, "reasoning": {"text": "hm"}}]}, "reasoning` must be text"),
        (
            {"messages": [USER, {**ANSWER, "reasoning": "a", "thinking": "b"}]},
            "two reasonings that differ",
        ),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "weight` is 0.5: 0 .not learned. or 1"),
        ({"messages": [USER, {**ANSWER, "weight": 1, "train": False}]}, "say different things"),
    ],
)
def test_what_cannot_be_is_refused(row: dict, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        canonical(row, "sft")


@pytest.mark.parametrize("key", ["weight", "train", "loss", "mask"])
def test_a_turn_of_weight_0_is_not_learned(key: str, toy: Path, tmp_path: Path):
    """Its tokens are context; the other turn of the conversation is scored, end included."""
    turns = [
        USER,
        {**ANSWER, "content": "five", key: 0},
        USER,
        {**ANSWER, "content": "four", key: 1},
    ]
    template = Template("auto", load_tokenizer(toy / "model"))
    [(prompt, (response, scored))] = template.conversation(
        sft_row(canonical({"messages": turns}, "sft")[0]).responses[0]
    )
    whole = prompt + response
    learned = [token for token, flag in zip(response, scored) if flag]
    decode = template.tokenizer.decode
    assert "five" in decode(whole) and decode(learned).strip() == "four"
    assert learned[-1] in template.stop_ids
    with pytest.raises(ValueError, match="no assistant turn to train on"):
        sft_row(canonical({"messages": turns[:2]}, "sft")[0])
    for answer in ("response", "completion", "chosen", "rejected"):
        with pytest.raises(ValueError, match=f"no turn of `{answer}` is to be learned"):
            canonical({"prompt": "Q", answer: turns[1:2]})
    canonical({"prompt": turns[:3], "response": turns[3:]}, "sft")  # in a prompt it is context


def test_ignored_keys_are_named_once(toy: Path, tmp_path: Path):
    """Ids, scores and sources, of rows and of messages, with how many rows have them."""
    rows = [
        {"prompt": "Q", "response": "A", "id": 1, "source": "web"},
        {"prompt": "Q", "response": "A", "id": 2},
        {"messages": [{**USER, "lang": "en"}, ANSWER], "label": False},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = Template("auto", load_tokenizer(toy / "model"))
    for _ in range(2):  # tokenised, and from the cache
        said: list[str] = []
        load_dataset(file, "sft", template, cache=tmp_path / "cache", log=said.append)
        assert (
            said[-1]
            .splitlines()[0]
            .endswith("; keys ignored: id (2), label (1), messages[].lang (1), source (1)")
        )


def test_a_refused_key_names_file_and_line(toy: Path, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "Q", "response": "A"}\n{"prompt": "Q", "response": "A", "images": ["x.png"]}\n'
    )
    template = Template("auto", load_tokenizer(toy / "model"))
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: `images` cannot be used"):
        load_dataset(file, "sft", template, cache=tmp_path / "cache", log=str)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: `images` cannot be used"):
        load_prompts([file], template, 100, log=str)


TURNS = [{"from": "human", "value": "Q"}]
FORMATS = {  # rows of other systems: (kind, row, prompt, responses)
    "alpaca": ("sft", {"instruction": "Do", "input": "it", "output": "A"}, "Do\nit", ["A"]),
    "dolly": (
        "sft",
        {"instruction": "Do", "context": "it", "response": "A", "category": "qa"},
        "Do\nit",
        ["A"],
    ),
    "orca": (
        "sft",
        {"system_prompt": "S", "question": "Q", "response": "A"},
        [SYSTEM, USER],
        ["A"],
    ),
    "gsm8k": ("sft", {"question": "Q", "answer": "A"}, "Q", ["A"]),
    "metamath": ("sft", {"query": "Q", "response": "A", "type": "x"}, "Q", ["A"]),
    "trl prompt and completion": ("sft", {"prompt": "Q", "completion": "A"}, "Q", ["A"]),
    "orca pairs": (
        "preference",
        {"system": "S", "question": "Q", "chosen": "A", "rejected": "B"},
        [SYSTEM, USER],
        ["A", "B"],
    ),
    "openrlhf": ("preference", {"input": "Q", "chosen": "A", "rejected": "B"}, "Q", ["A", "B"]),
    "alpaca pairs": (
        "preference",
        {"instruction": "Do", "input": "it", "chosen": "A", "rejected": "B"},
        "Do\nit",
        ["A", "B"],
    ),
    "sharegpt pairs": (
        "preference",
        {
            "conversations": TURNS,
            "chosen": {"from": "gpt", "value": "A"},
            "rejected": {"from": "gpt", "value": "B"},
        },
        [USER],
        [[ANSWER], [{**ANSWER, "content": "B"}]],
    ),
    "openai preference": (
        "preference",
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [ANSWER],
            "non_preferred_output": [{**ANSWER, "content": "B"}],
        },
        [USER],
        [[ANSWER], [{**ANSWER, "content": "B"}]],
    ),
    "ultrafeedback": (
        "preference",
        {
            "source": "x",
            "instruction": "Q",
            "completions": [
                {"response": "B", "overall_score": 4.0},
                {"response": "A", "overall_score": 8.5},
                {"response": "C", "overall_score": 5},
            ],
        },
        "Q",
        ["A", "B"],
    ),
    "kto of llama-factory": (
        "label",
        {"instruction": "Q", "output": "A", "kto_tag": True},
        "Q",
        ["A"],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_other_systems(name: str):
    kind, row, prompt, responses = FORMATS[name]
    parsed = ROWS[kind](canonical(row, kind).row, False)
    assert parsed[:2] == (prompt, responses)
    assert prompt_in(row) == prompt


def test_whole_texts_are_learned_with_plain_only(toy: Path, tmp_path: Path):
    """TRL's {text}: bos, every token of the text, eos; a chat template has no roles for it."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "Ada lives here."}) + "\n")
    tokenizer = load_tokenizer(toy / "model")
    data = load_dataset(file, "sft", Template("plain", tokenizer), cache=tmp_path / "c", log=str)
    ids = tokenizer.encode("Ada lives here.")
    assert list(data.tokens) == [tokenizer.bos, *ids, tokenizer.eos]
    assert list(data.scored) == [0, *[1] * len(ids), 1]
    with pytest.raises(ValueError, match="`text` is a whole document without roles: use --templ"):
        load_dataset(file, "sft", Template("auto", tokenizer), cache=tmp_path / "c", log=str)


def test_earlier_turns_go_in_front_of_what_is_used():
    """Not in front of a key that holds neither text nor messages, where nobody reads them."""
    row = {"prompt": "Q", "chosen": "A", "rejected": "B", "history": [["q", "a"]], "messages": -0.0}
    pair = ROWS["label"](canonical(row, "label").row, False)
    assert pair.prompt == [*EARLIER, USER]


@pytest.mark.parametrize(
    ("kind", "row", "complaint"),
    [
        (
            "preference",
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "chosen_response": "b"}
            | {"rejected": "\n\nHuman: q\n\nAssistant: c"},
            "`chosen_response` says something else",
        ),
        ("sft", {"messages": [USER, ANSWER], "prompt": {"a": 1}}, "`prompt` holds neither text"),
        (
            "preference",
            {"input": {"messages": [USER], "tools": [TOOL]}, "preferred_output": [ANSWER]}
            | {"non_preferred_output": [ANSWER], "tools": [{"name": "g"}]},
            "`input.tools` and `tools` say different things",
        ),
    ],
)
def test_what_stands_twice_may_not_differ(
    kind: str, row: dict, complaint: str, toy: Path, tmp_path: Path
):
    """Found by tests/fuzz_rows.py: one of the two was dropped without a word."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    template = Template("chatml", load_tokenizer(toy / "model"))
    with pytest.raises(ValueError, match=complaint):
        load_dataset(file, kind, template, cache=tmp_path / "cache", log=str)


def test_ignored_keys_are_named_as_the_row_names_them():
    """A key of another system that is not used is named by that system's name."""
    row = {"prompt": "Q", "chosen": "A", "rejected": "B", "conversation": [USER]}
    assert canonical(row, "preference").ignored == {"conversation"}


def test_completions_without_a_pair_are_refused():
    """Equal scores are no preference; a row without scores has none either."""
    same = [{"response": "A", "overall_score": 5}, {"response": "B", "overall_score": 5}]
    with pytest.raises(ValueError, match="no `chosen`"):
        ROWS["preference"](canonical({"prompt": "Q", "completions": same}, "preference").row, False)
    with pytest.raises(ValueError, match="none with an `overall_score`"):
        canonical({"prompt": "Q", "completions": [{"response": "A"}]}, "preference")


def test_ignored_keys_are_left_out_of_rows_and_messages(toy: Path, tmp_path: Path):
    """--ignore-keys: what would be refused is gone and not named; others make a new cache."""
    row = {"prompt": [{**USER, "audio": "x.wav"}], "response": "A", "images": ["x.png"]}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    template = Template("auto", load_tokenizer(toy / "model"))
    said: list[str] = []
    options = {"cache": tmp_path / "cache", "log": said.append}
    data = load_dataset(file, "sft", template, ignore=["images", "audio"], **options)
    assert len(data) == 1 and "ignored" not in said[-1]
    with pytest.raises(ValueError, match="images"):
        load_dataset(file, "sft", template, **options)
    prompts = load_prompts([file], template, 100, log=str, ignore=["images", "audio"])
    assert prompts.rows == [row]
