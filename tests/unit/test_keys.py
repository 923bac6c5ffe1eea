"""Keys of rows: each is used, refused by name, or named as ignored; no meaning is lost."""

import json
from pathlib import Path

import pytest

from data.dataset import load_dataset, load_prompts
from data.formats import sft_row
from data.keys import canonical
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
    clean, ignored = canonical(row)
    assert clean["prompt"] == prompt and not ignored
    assert not {"system", "system_prompt", "history", "instruction"} & clean.keys()


def with_key(key: str, value: object, place: str) -> dict:
    """Return a good row with a key put into the row or into one of its messages."""
    if place == "row":
        return {"prompt": "Q", "response": "A", key: value}
    if place == "prompt":
        return {"prompt": [{**USER, key: value}], "response": "A"}
    return {"messages": [USER, {**ANSWER, key: value}]}


ROW_KEYS = {
    "tools": [{"type": "function"}],
    "functions": [{}, {"name": "f"}],
    "documents": ["d"],
    "chat_template_kwargs": {"enable_thinking": False},
    "images": ["a.png"],
    "audio": "a.wav",
    "weight": 0.5,
    "train": False,
    "mask": [0, 1],
}
MESSAGE_KEYS = {
    "reasoning_content": "two and two",
    "thinking": "hm",
    "reasoning": {"text": "hm"},
    "tool_calls": [{"function": {"name": "calc"}}],
    "tool_call_id": "call_1",
    "function_call": {"name": "calc"},
    "refusal": "no",
}


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
    prompt, (response, scored) = template.conversation(
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
        {"messages": [{**USER, "name": "Ada"}, ANSWER], "label": False},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = Template("auto", load_tokenizer(toy / "model"))
    for _ in range(2):  # tokenised, and from the cache
        said: list[str] = []
        load_dataset(file, "sft", template, cache=tmp_path / "cache", log=said.append)
        assert said[-1].endswith(
            "; keys ignored: id (2), label (1), messages[].name (1), source (1)"
        )


def test_a_refused_key_names_file_and_line(toy: Path, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "Q", "response": "A"}\n{"prompt": "Q", "response": "A", "tools": [1]}\n'
    )
    template = Template("auto", load_tokenizer(toy / "model"))
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: `tools` cannot be used"):
        load_dataset(file, "sft", template, cache=tmp_path / "cache", log=str)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: `tools` cannot be used"):
        load_prompts([file], template, 100, log=str)
