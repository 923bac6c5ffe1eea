"""data/tokenizer.py and data/templates.py against sentencepiece, tokenizers and transformers."""

import functools
import json
import pickle
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from data.templates import Template
from data.tokenizer import load_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "ran",
    "sat",
    "on",
    "over",
    "mat",
    "hill",
    "red",
    "and",
    "then",
    "it",
    "happy",
]
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "the cat sat"},
    {"role": "assistant", "content": "on the mat"},
    {"role": "user", "content": " then? "},
    {"role": "assistant", "content": "it ran\nover <hill>"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "sad."},
]
MARKERS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
texts = st.lists(
    st.sampled_from(WORDS + [" ", "  ", "\n", "<", ">", "s", "é", "🦙", "<s>", "</s>", "x"])
).map("".join)
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def sentences(n: int) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=8)) + "." for _ in range(n)]


def folder_with(path: Path, **files) -> Path:
    """Write a folder of files, name__json=content; text and bytes are written unchanged."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        name = name.replace("__", ".")
        if isinstance(content, bytes):
            (path / name).write_bytes(content)
        else:
            (path / name).write_text(
                content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
            )
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> bytes:
    """Return a small sentencepiece model with a control and a user-defined piece."""
    prefix = tmp_path_factory.mktemp("sentencepiece") / "small"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(400)),
        model_prefix=str(prefix),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["<|c|>"],
        user_defined_symbols=["<|u|>"],
        minloglevel=2,
    )
    return prefix.with_suffix(".model").read_bytes()


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    """Return a folder with a small byte-level BPE tokenizer.json, its markers special."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.train_from_iterator(
        sentences(400),
        tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            show_progress=False,
            special_tokens=["<s>", "</s>", *MARKERS],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
    }
    return folder_with(
        tmp_path_factory.mktemp("bpe"), tokenizer__json=tok.to_str(), tokenizer_config__json=config
    )


@pytest.fixture(scope="module")
def several(bpe, model, tmp_path_factory) -> list:
    """Return the byte-level tokenizer, and sentencepiece ones with legacy true and false."""
    folders = [
        folder_with(
            tmp_path_factory.mktemp("legacy"),
            tokenizer__model=model,
            tokenizer_config__json={"legacy": legacy},
        )
        for legacy in (True, False)
    ]
    return [load_tokenizer(folder) for folder in (bpe, *folders)]


@functools.lru_cache
def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def pieces(model: bytes, text: str, dummy: bool) -> list[int]:
    """Return sentencepiece's ids of a text, with its dummy space or without.

    Without: the ids after a line feed, which merges with nothing.
    """
    sp = processor(model)
    return sp.encode(text) if dummy else sp.encode("\n" + text)[len(sp.encode("\n")) :]


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("name", ["small", "llama2"])
def test_sentencepiece_ids_between_special_tokens(tmp_path, model, name, legacy):
    """Text between special tokens has sentencepiece's ids; legacy decides on the dummy space."""
    if name == "llama2":
        if not SHARED.exists():
            pytest.skip("no shared data")
        model = (SHARED / "llama2_tokenizer.model").read_bytes()
    config = {} if legacy is None else {"legacy": legacy}
    tok = load_tokenizer(
        folder_with(tmp_path, tokenizer__model=model, tokenizer_config__json=config)
    )
    legacy = legacy is not False
    rng = random.Random(1)
    for _ in range(200):
        words = ["the", " ", "  ", " cat", "\n", "é", "<s", "s>", "🦙"]
        parts = ["".join(rng.choices(words, k=rng.randrange(6))) for _ in range(3)]
        text = "{}<s>{}</s>{}".format(*parts)
        expected = pieces(model, parts[0], True) + [1] + pieces(model, parts[1], legacy) + [2]
        assert tok.encode(text) == expected + pieces(model, parts[2], legacy), text
        assert tok.decode(tok.encode(text), skip_special=False) == text
        assert tok.decode([1, *tok.encode(parts[0]), 2]) == parts[0]
    if name == "small":
        ids = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|c|>": 3, "<|u|>": 4}
        assert tok.special == ids and tok.size == 340
        assert tok.encode("<|u|><|c|><unk>") == [4, 3, 0]
        # Control tokens are skipped, user-defined ones are text.
        assert tok.decode([4, 3, 0]) == "<|u|>"


def test_added_tokens_are_split_as_tokenizers_does(tmp_path, model):
    """Longest match, lstrip, rstrip and single_word cut a text where tokenizers cuts it."""
    flags = {
        "<x>": {},
        "<x>y": {},
        "<l>": {"lstrip": True},
        "<r>": {"rstrip": True},
        "w": {"single_word": True},
        "<b>": {"lstrip": True, "rstrip": True, "special": False},
    }
    decoder = {
        i: {"content": text, "special": True} | flag
        for i, (text, flag) in enumerate(flags.items(), 340)
    }
    config = {"added_tokens_decoder": decoder, "legacy": False}
    folder = folder_with(tmp_path, tokenizer__model=model, tokenizer_config__json=config)
    tok = load_tokenizer(folder)
    theirs = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    theirs.add_tokens(
        [tokenizers.AddedToken(text, normalized=False, **flag) for text, flag in flags.items()]
    )
    rng = random.Random(2)
    for _ in range(500):
        text = "".join(rng.choices(["the", " ", "\n", "y", *flags], k=rng.randrange(8)))
        expected = []
        cut = theirs.encode(text)
        for i, (start, end) in zip(cut.ids, cut.offsets):
            if i == 0:  # text between added tokens
                expected += pieces(model, text[start:end], start == 0)
            else:
                expected.append(tok.special[theirs.id_to_token(i)])
        assert tok.encode(text) == expected, text
    assert tok.size == 346 and tok.decode([340, 345]) == "<b>"


@pytest.mark.parametrize("legacy", [True, False])
def test_llama2_ids_equal_transformers(tmp_path, legacy):
    """The real Llama-2 model gives transformers' ids on text without runs of spaces."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")  # transformers reads tokenizer.model through it
    if not SHARED.exists():
        pytest.skip("no shared data")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "legacy": legacy,
    }
    folder = folder_with(
        tmp_path,
        tokenizer__model=(SHARED / "llama2_tokenizer.model").read_bytes(),
        tokenizer_config__json=config,
        config__json={"model_type": "llama"},
    )
    tok = load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    lines = (SHARED / "gsm8k" / "pref_test.jsonl").read_text().splitlines()[:100]
    for row in map(json.loads, lines):
        text = f"{row['prompt'].strip()}</s><s>[INST] {row['chosen'].strip()} [/INST]"
        text = re.sub(" +", " ", text)
        ids = tok.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert tok.decode(ids[:200]) == theirs.decode(ids[:200], skip_special_tokens=True)


def test_json_ids_equal_transformers(tmp_path, bpe):
    """tokenizer.json gives transformers' ids and texts, with tokens that only the config adds."""
    transformers = pytest.importorskip("transformers")
    shutil.copytree(bpe, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        "400": {"content": "<new>", "special": True},
        "401": {"content": "<word>", "special": False, "rstrip": True},
    }
    folder_with(tmp_path, tokenizer_config__json=config)
    tok = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tok.bos, tok.eos, tok.pad, tok.size) == (0, 1, None, 402)
    for text in ["the cat<new> sat", "<s>a  é🦙</s><word>  on<|im_end|>", "", "<|eot_id|>\n<word>"]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert tok.encode(text) == ids
        for skip in (True, False):
            assert tok.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_where_bos_eos_and_pad_come_from(tmp_path, model, bpe):
    """tokenizer_config.json, special_tokens_map.json, the model, config.json; null means none."""

    def load(**files):
        return load_tokenizer(folder_with(tmp_path / str(len(list(tmp_path.iterdir()))), **files))

    tok = load(tokenizer__model=model)
    assert (tok.bos, tok.eos, tok.pad) == (1, 2, None)
    assert (tok.bos_token, tok.eos_token, tok.stops) == ("<s>", "</s>", {2})
    tok = load(
        tokenizer__model=model,
        tokenizer_config__json={"eos_token": {"content": "<|u|>"}, "bos_token": None},
        special_tokens_map__json={"eos_token": "<s>", "pad_token": {"content": "<unk>"}},
    )
    assert (tok.bos, tok.eos, tok.pad, tok.bos_token) == (None, 4, 0, "")
    tok = load(
        tokenizer__model=model,
        added_tokens__json={"<pad>": 340, "<end>": 341},
        special_tokens_map__json={"eos_token": "<end>", "pad_token": "<pad>"},
        generation_config__json={"eos_token_id": [2, 341]},
    )
    assert (tok.eos, tok.pad, tok.size) == (341, 340, 342)
    assert (tok.stops, tok.encode("<end>")) == ({2, 341}, [341])
    source = (bpe / "tokenizer.json").read_bytes()
    ids = {"bos_token_id": 0, "eos_token_id": [1, 6]}
    tok = load(tokenizer__json=source, config__json=ids)
    assert (tok.bos, tok.eos, tok.eos_token, tok.stops) == (0, 1, "</s>", {1, 6})
    tok = load(
        tokenizer__json=source, config__json=ids, tokenizer_config__json={"eos_token": "<|im_end|>"}
    )
    assert (tok.bos, tok.eos) == (None, 3)
    with pytest.raises(ValueError, match="eos_token 'nowhere' is not in the vocabulary"):
        load(tokenizer__model=model, tokenizer_config__json={"eos_token": "nowhere"})


def test_missing_and_broken_files_are_named(tmp_path, model, monkeypatch):
    """A folder without a tokenizer, a broken file, a missing package: the error names it."""
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model.*tokenizer\.json"):
        load_tokenizer(folder_with(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"json[/\\]tokenizer\.json"):
        load_tokenizer(folder_with(tmp_path / "json", tokenizer__json="{broken"))
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a sentencepiece model"):
        load_tokenizer(folder_with(tmp_path / "model", tokenizer__model=b"version https://git-lfs"))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(
            folder_with(tmp_path / "config", tokenizer__model=model, tokenizer_config__json="{")
        )
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        load_tokenizer(folder_with(tmp_path / "json"))


def test_pickled_tokenizers_and_templates_agree_and_hashes_tell_differences(tmp_path, model, bpe):
    """A pickled copy gives the same ids; the hash changes with what decides ids or text alone."""
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    config = {"legacy": False, "chat_template": named}
    plain = load_tokenizer(folder_with(tmp_path / "a", tokenizer__model=model))
    chat = load_tokenizer(
        folder_with(tmp_path / "b", tokenizer__model=model, tokenizer_config__json=config)
    )
    assert (plain.chat_template, chat.chat_template) == (None, "d")
    jinja = folder_with(
        tmp_path / "c",
        tokenizer__model=model,
        tokenizer_config__json=config,
        chat_template__jinja="j",
    )
    assert load_tokenizer(jinja).chat_template == "j"
    assert len({plain.hash, chat.hash, load_tokenizer(jinja).hash}) == 3
    same = folder_with(
        tmp_path / "d", tokenizer__model=model, tokenizer_config__json={"model_max_length": 5}
    )
    assert load_tokenizer(same).hash == plain.hash
    for tok in (plain, chat, load_tokenizer(bpe)):
        template = Template("chatml", tok)
        copy = pickle.loads(pickle.dumps(template))
        assert copy.conversation(CHAT) == template.conversation(CHAT) and copy.hash == template.hash
        assert copy.hash != Template("zephyr", tok).hash
        assert Template("auto", tok).plain == (tok.chat_template is None)


def expected_text(name: str, messages: list[dict], generation: bool) -> str:
    """Return the text of a conversation in a published chat format, written a second time."""
    out = ""
    system = ""
    for i, m in enumerate(messages):
        role = m["role"]
        content = m["content"]
        if name == "chatml":
            out += f"<|im_start|>{role}\n{content}<|im_end|>\n"
        elif name == "zephyr":
            out += f"<|{role}|>\n{content}</s>\n"
        elif name == "llama3":
            out += "<s>" if i == 0 else ""
            out += f"<|start_header_id|>{role}<|end_header_id|>\n\n{content.strip()}<|eot_id|>"
        elif role == "system":
            system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif role == "user":
            out += f"<s>[INST] {(system + content).strip()} [/INST]"
            system = ""
        else:
            out += f" {content.strip()} </s>"
    last = {
        "chatml": "<|im_start|>assistant\n",
        "zephyr": "<|assistant|>\n",
        "llama2": "",
        "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    }
    return out + (last[name] if generation else "")


@pytest.mark.parametrize("name", ["chatml", "zephyr", "llama2", "llama3"])
def test_built_in_templates_render_the_published_formats(bpe, name):
    """A built-in template is the published format, here and as chat_template in transformers."""
    transformers = pytest.importorskip("transformers")
    template = Template(name, load_tokenizer(bpe))
    theirs = transformers.AutoTokenizer.from_pretrained(bpe)
    for messages in (CHAT, CHAT[1:], CHAT[:2], CHAT[1:4]):
        for generation in (True, False):
            text = template.render(messages, generation)
            assert text == expected_text(name, messages, generation)
            assert text == theirs.apply_chat_template(
                messages,
                chat_template=template.source,
                tokenize=False,
                add_generation_prompt=generation,
            )


FOLDER_TEMPLATE = """{%- if tools is not none %}
    {{- tools | tojson }}
{%- endif %}
{{ bos_token }}
{% for message in messages %}
    {% if message['role'] not in ['user', 'assistant', 'system'] %}
        {{ raise_exception('no role ' + message['role']) }}
    {% endif %}
    {% if loop.index0 > 40 %}{% break %}{% endif %}
    {% if message.role == 'assistant' -%}
        {% generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}
    {% else %}
        [{{ message | tojson }}]
    {% endif %}
{% endfor %}
{{ strftime_now('%Y') }}
{%- if add_generation_prompt %}
>
{% endif %}
"""


def test_the_folders_template_renders_as_in_transformers(tmp_path, bpe):
    """White space, loop controls, generation marks, tojson, dates, exceptions: as transformers."""
    transformers = pytest.importorskip("transformers")
    shutil.copytree(bpe, tmp_path, dirs_exist_ok=True)
    folder_with(tmp_path, chat_template__jinja=FOLDER_TEMPLATE)
    template = Template("auto", load_tokenizer(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for generation in (True, False):
        assert template.render(CHAT, generation) == theirs.apply_chat_template(
            CHAT, tokenize=False, add_generation_prompt=generation
        )
    with pytest.raises(ValueError, match="no role pirate"):
        template.render([{"role": "pirate", "content": "arr"}], True)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__.mro}'.format(1) }}",
        "{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_a_malicious_template_reaches_nothing(tmp_path, model, attack):
    """A template cannot reach attributes of Python objects nor change the caller's messages."""
    folder = folder_with(tmp_path, tokenizer__model=model, chat_template__jinja=attack)
    with pytest.raises(ValueError, match="refuses this row"):
        Template("auto", load_tokenizer(folder)).render(CHAT, True)


@quick
@given(prompt=texts, responses=st.lists(texts.filter(str.strip), min_size=1, max_size=3))
@pytest.mark.parametrize("name", ["plain", "chatml"])
def test_border_law(several, name, prompt, responses):
    """Prompt ids + response ids are those of the text; the border is the longest common prefix."""
    for tok in several:
        template = Template(name, tok)
        said = [("user", prompt), *(("assistant", response) for response in responses)]
        assume("own_ends" not in template.marks(said))  # test_chat.py has them
        if name == "plain":
            head = [tok.bos, *tok.encode(prompt)]
            wholes = [[tok.bos, *tok.encode(prompt + r), tok.eos] for r in responses]
        else:
            user = [{"role": "user", "content": prompt}]
            head = tok.encode(template.render(user, True))
            chats = [[*user, {"role": "assistant", "content": r}] for r in responses]
            wholes = [tok.encode(template.render(chat, False).rstrip()) for chat in chats]
        prompt_ids, answers, moved = template.pair(prompt, responses)
        assert [prompt_ids + ids for ids, _ in answers] == wholes
        assert head[: len(prompt_ids)] == prompt_ids and moved == (len(prompt_ids) < len(head))
        if moved:
            assert any(whole[len(prompt_ids)] != head[len(prompt_ids)] for whole in wholes)
        assert all(scored == [1] * len(ids) for ids, scored in answers)
        if name == "plain":
            text = tok.decode(prompt_ids[1:] + answers[0][0], False)
            assert text == prompt + responses[0] + tok.eos_token


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_a_merge_across_the_border_moves_it(tmp_path, bpe, model, kind):
    """A merge of prompt and response moves the border back for all responses; it is reported."""
    tok = load_tokenizer(bpe if kind == "bpe" else folder_with(tmp_path, tokenizer__model=model))
    template = Template("plain", tok)
    prompt_ids, [(first, scored), (second, _)], moved = template.pair("the hap", ["py.", " cat"])
    assert moved and scored == [1] * len(first)
    head = [tok.bos, *tok.encode("the hap")]
    assert prompt_ids == head[: len(prompt_ids)] and head[len(prompt_ids)] != first[0]
    assert tok.decode(prompt_ids + first) == "the happy."
    assert tok.decode(prompt_ids + second) == "the hap cat"
    moved = template.pair("the cat\n", ["sat", "ran"])[2]
    assert moved is False  # no merge crosses a line feed here


@pytest.mark.parametrize(
    "name,end",
    [("chatml", "<|im_end|>"), ("zephyr", "</s>"), ("llama2", " </s>"), ("llama3", "<|eot_id|>")],
)
def test_conversations_score_the_assistants_and_nothing_else(bpe, name, end):
    """The scored runs of a conversation are the assistant's texts, each with its end of turn."""
    tok = load_tokenizer(bpe)
    template = Template(name, tok)
    [(prompt_ids, (ids, scored))] = template.conversation(
        [*CHAT, {"role": "user", "content": "left out"}]
    )
    assert prompt_ids + ids == tok.encode(template.render(CHAT, False).rstrip())
    assert prompt_ids == tok.encode(template.render(CHAT[:2], True))
    runs = []
    previous = 0
    for i, on in zip(ids, scored):
        if on and not previous:
            runs.append([])
        if on:
            runs[-1].append(i)
        previous = on
    space = " " if name == "llama2" else ""
    answers = [m["content"] for m in CHAT if m["role"] == "assistant"]
    assert [tok.decode(run, False) for run in runs] == [space + answer + end for answer in answers]
    assert {run[-1] for run in runs} <= template.stop_ids
    # A pair whose response is several messages scores the same tokens.
    _, [(pair_ids, pair_scored)], _ = template.pair(CHAT[:2], [CHAT[2:]])
    assert (pair_ids, pair_scored) == (ids, scored)


def test_strings_are_one_user_and_one_assistant_message(bpe):
    """A string prompt is a user message, a string response an assistant message."""
    template = Template("chatml", load_tokenizer(bpe))
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    assert template.pair("the cat", ["sat"]) == template.pair(messages[:1], [messages[1:]])
    prompt, [answer], _ = template.pair("the cat", ["sat"])
    assert template.conversation(messages) == [(prompt, answer)]
    plain = Template("plain", load_tokenizer(bpe))
    assert plain.pair("the cat", ["sat"]) == plain.pair(messages[:1], [messages[1:]])
    prompt, [answer], _ = plain.pair("the cat", ["sat"])
    assert plain.conversation(messages) == [(prompt, answer)]


def test_rows_that_cannot_be_used_are_refused_with_a_reason(tmp_path, bpe, model):
    """Empty answers, empty prompts, several turns in plain, rewritten turns, malformed messages."""
    tok = load_tokenizer(bpe)
    plain = Template("plain", tok)
    chatml = Template("chatml", tok)
    for template in (plain, chatml):
        with pytest.raises(ValueError, match="empty response"):
            template.pair("the", ["cat", " \n"])
        with pytest.raises(ValueError, match="messages must be a list"):
            template.pair([{"role": "user", "content": None}], ["a"])
    with pytest.raises(ValueError, match="choose --template chatml"):
        plain.pair(CHAT[:2], ["a"])
    with pytest.raises(ValueError, match="choose --template chatml"):
        plain.conversation(CHAT)
    with pytest.raises(ValueError, match="no assistant message"):
        chatml.conversation(CHAT[:2])
    with pytest.raises(ValueError, match="begin and end with an assistant"):
        chatml.pair("a", [CHAT[1:3]])

    def load(**files):
        return load_tokenizer(folder_with(tmp_path / str(len(list(tmp_path.iterdir()))), **files))

    no_bos = load(tokenizer__model=model, tokenizer_config__json={"bos_token": None})
    with pytest.raises(ValueError, match="prompt has no token"):
        Template("plain", no_bos).pair("", ["a"])
    # Some templates drop the reasoning of all turns but the last.
    forgetful = (
        "{% for m in messages %}{% if loop.last %}<think>{% endif %}{{ m.content }}</s>{% endfor %}"
    )
    template = Template("auto", load(tokenizer__model=model, chat_template__jinja=forgetful))
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        template.conversation(CHAT)


def test_templates_check_the_tokens_they_need(tmp_path, bpe, model):
    """llama3 needs its markers, plain an eos; chatml without markers ends turns with eos."""
    small = load_tokenizer(folder_with(tmp_path / "a", tokenizer__model=model))
    with pytest.raises(ValueError, match=r"llama3 needs special tokens.*<\|eot_id\|>"):
        Template("llama3", small)
    without = folder_with(
        tmp_path / "b", tokenizer__model=model, tokenizer_config__json={"eos_token": None}
    )
    with pytest.raises(ValueError, match="an eos_token"):
        Template("auto", load_tokenizer(without))
    with pytest.raises(ValueError, match="unknown template 'chatlm'"):
        Template("chatlm", small)
    with pytest.raises(ValueError, match="cannot be parsed"):
        folder = folder_with(tmp_path / "c", tokenizer__model=model, chat_template__jinja="{% if")
        Template("auto", load_tokenizer(folder))
    chatml = Template("chatml", small)
    assert chatml.render(CHAT[1:2], False) == "<|im_start|>user\nthe cat sat</s>\n"
    _, [(ids, _)], _ = chatml.pair("the", ["cat"])
    assert ids[-1] == small.eos and chatml.stop_ids == {small.eos}
    tok = load_tokenizer(bpe)
    assert Template("chatml", tok).stop_ids == {tok.eos, tok.special["<|im_end|>"]}
    assert Template("llama3", tok).stop_ids == {tok.eos, tok.special["<|eot_id|>"]}
    assert Template("plain", tok).stop_ids == {tok.eos}
