"""Any conversation: the ids are those of the chat format, written again here, and decode back."""

import contextlib
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import json_values, quick, roles

from data.templates import Template
from data.tokenizer import load_tokenizer

MARKERS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level BPE that merges words, spaces and line feeds; each marker is one token."""
    folder = tmp_path_factory.mktemp("bpe")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = byte_level
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        show_progress=False,
        special_tokens=["<s>", "</s>", *MARKERS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(["the cat\nsat  on\n\nthe mat, the cat ran\n"] * 9, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return load_tokenizer(folder)


PIECES = ["the", " cat", "sat", " ", "  ", "\n", "\n\n", "é", "🦙"]
PIECES += ["<", "|>", "user", "[INST]", "\t", "\0", "\u2028"]
contents = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
contents |= st.text(st.characters(exclude_categories=["Cs"]))
answers = contents.filter(str.strip)


@st.composite
def chats(draw) -> list[dict]:
    """Draw [system,] user, assistant, user, assistant, ... ending with the assistant."""
    chat = [{"role": "system", "content": draw(contents)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        chat.append({"role": "user", "content": draw(contents)})
        chat.append({"role": "assistant", "content": draw(answers)})
    return chat


def render(name: str, chat: list[dict]) -> list[tuple[str, bool]]:
    """Return a conversation as parts (text, True if the assistant says it), from the format's page.

    The end of the assistant's turn belongs to what it says.
    """
    parts = []
    for k, message in enumerate(chat):
        role, text = message["role"], message["content"]
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
            if k == 1 and chat[0]["role"] == "system":
                text = f"<<SYS>>\n{chat[0]['content']}\n<</SYS>>\n\n" + text
            parts += [(f"<s>[INST] {text.strip()} [/INST]", False)]
    return parts[:-1] if parts[-1] == ("\n", False) else parts


def runs_of(ids: list[int], scored: list[int]) -> list[list[int]]:
    """Return every run of scored ids: ([5, 6, 7, 8], [1, 1, 0, 1]) -> [[5, 6], [8]]."""
    runs: list[list[int]] = []
    for before, flag, id in zip([0, *scored], scored, ids):
        if flag and not before:
            runs.append([])
        if flag:
            runs[-1].append(id)
    return runs


@settings(quick, max_examples=60)
@given(chats())
@pytest.mark.parametrize("name", ["chatml", "zephyr", "llama2", "llama3"])
def test_conversations_are_the_format_and_decode_back(tokenizer, name: str, chat: list[dict]):
    """Prompt + response are the ids of the format's text; scored is what the assistant says.

    Every answer ends with a stop id, the only one in it. A conversation equals the pair whose
    prompt is everything before the first answer, and a prompt begins its conversation.
    """
    template = Template(name, tokenizer)
    parts = render(name, chat)
    text = "".join(part for part, _ in parts)
    prompt, (ids, scored) = template.conversation(chat)
    assert template.render(chat, False).rstrip() == text
    assert prompt + ids == tokenizer.encode(text)
    assert tokenizer.decode(prompt + ids, False) == text
    assert len(ids) == len(scored)

    runs = runs_of(ids, scored)
    said = [part for part, by_assistant in parts if by_assistant]
    assert len(runs) == len(said)
    if name in ("chatml", "llama3"):
        # Their markers are single tokens across which nothing merges; but content that begins
        # with white space may merge with the line feeds after the marker.
        for run, whole in zip(runs, said):
            decoded = tokenizer.decode(run, False)
            assert whole.endswith(decoded.lstrip()) or "\ufffd" in decoded
    for run in runs:
        assert run[-1] in template.stop_ids and not set(run[:-1]) & template.stop_ids

    first = next(k for k, message in enumerate(chat) if message["role"] == "assistant")
    assert template.pair(chat[:first], [chat[first:]])[:2] == (prompt, [(ids, scored)])
    assert template.prompt(chat[:first])[: len(prompt)] == prompt


@settings(quick, max_examples=60)
@given(contents, st.lists(answers, min_size=1, max_size=3))
def test_plain_is_bos_prompt_response_eos(tokenizer, prompt: str, responses: list[str]):
    """Exactly that for every response, with nothing in between; all of it decodes back."""
    head, encoded, _ = Template("plain", tokenizer).pair(prompt, responses)
    for (ids, scored), response in zip(encoded, responses, strict=True):
        assert head + ids == [tokenizer.bos, *tokenizer.encode(prompt + response), tokenizer.eos]
        assert tokenizer.decode(head + ids, False) == f"<s>{prompt}{response}</s>"
        assert scored == [1] * len(ids)


wild_messages = st.fixed_dictionaries({"role": roles, "content": contents | st.integers()})


@settings(quick, max_examples=60)
@given(st.lists(wild_messages, max_size=5) | json_values)
@pytest.mark.parametrize("name", ["plain", "chatml", "llama2"])
def test_any_messages_are_rendered_or_rejected(tokenizer, name: str, chat):
    """Messages with any roles and contents end in ids or in a ValueError."""
    template = Template(name, tokenizer)
    for call in (template.conversation, template.prompt, lambda m: template.pair("a", [m])):
        with contextlib.suppress(ValueError):
            assert call(chat)
    with contextlib.suppress(ValueError):
        assert template.pair(chat, [chat])
