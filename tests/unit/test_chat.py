"""Chat templates of published models: what is learned is what the row says, ended as served."""

import json
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

import chat_templates
from chat_templates import MODELS

import data.jinja
from data.dataset import load_dataset, load_prompts
from data.encode import ROWS
from data.formats import with_options
from data.keys import canonical
from data.said import left_out
from data.templates import Template
from data.tokenizer import load_tokenizer


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str | None, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


TOOLS = [{"type": "function", "function": {"name": "calc", "parameters": {"type": "object"}}}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "calc", "arguments": {"x": 4}}}
RESULT = {"role": "tool", "content": "forty", "name": "calc", "tool_call_id": "abcdefghi"}
THOUGHT = "<think>\ntwo and two\n</think>\n\nfour"
SYSTEM = {"role": "system", "content": "Be kind."}
ROWS_OF = {
    "one": [user("2+2?"), answer("four")],
    "system": [SYSTEM, user("2+2?"), answer("four")],
    "turns": [user("2+2?"), answer("four"), user("sure?"), answer("yes")],
    "system turns": [SYSTEM, user("2+2?"), answer("four"), user("sure?"), answer("yes")],
    "thought": [user("2+2?"), answer(THOUGHT)],
    "thoughts": [user("2+2?"), answer(THOUGHT), user("sure?"), answer(THOUGHT + "!")],
    "reasoning": [user("2+2?"), answer("four", reasoning_content="two and two")],
    "tools": [user("2+2?"), answer(None, tool_calls=[CALL]), RESULT, answer("four")],
}
EMPTY = "<think>\n\n</think>\n\n"  # Qwen3 writes it before the last answer without reasoning
CALLED = '<tool_call>\n{"name": "calc", "arguments": {"x": 4}}\n</tool_call>'
# What is learned where it is not the answers themselves with the end of turn; None: refused.
LEARNED = {
    ("qwen2.5", "tools"): [CALLED, "four"],
    ("smollm2", "tools"): [CALLED, "four"],
    ("qwen3", "one"): [EMPTY + "four"],
    ("qwen3", "system"): [EMPTY + "four"],
    ("qwen3", "turns"): [EMPTY + "four", EMPTY + "yes"],
    ("qwen3", "system turns"): [EMPTY + "four", EMPTY + "yes"],
    ("qwen3", "reasoning"): [THOUGHT],
    ("qwen3", "tools"): [EMPTY + CALLED, EMPTY + "four"],
    ("llama3.1", "tools"): ['{"name": "calc", "parameters": {"x": 4}}', "four"],
    ("mistral", "tools"): ['[TOOL_CALLS] [{"name": "calc", "arguments": {"x": 4}}]', " four"],
    ("gemma", "system"): None,
    ("gemma", "system turns"): None,
    # The prompt of R1's distillations ends in <think>: the answer goes on behind it.
    ("r1", "thought"): [THOUGHT.removeprefix("<think>\n")],
    ("r1", "thoughts"): [
        THOUGHT.removeprefix("<think>\n"),
        THOUGHT.removeprefix("<think>\n") + "!",
    ],
}
ENDS = {"gemma": "<end_of_turn>", "phi3": "<|end|>"}  # others: eos


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Return a function: name of a model -> its template."""
    made: dict[str, Template] = {}

    def get(name: str) -> Template:
        if name not in made:
            folder = chat_templates.save(tmp_path_factory.mktemp("chat"), *MODELS[name])
            made[name] = Template("auto", load_tokenizer(folder))
        return made[name]

    return get


def trees_of(template: Template, row: dict) -> list:
    """Return the trees of an SFT row, as load_dataset makes them."""
    content, _, options = canonical(row, "sft")
    return template.conversation(with_options(ROWS["sft"](content, False), options).responses[0])


def learned_texts(template: Template, trees: list) -> list[str]:
    """Return the text of every run of scored tokens."""
    texts = []
    for _, (ids, scored) in trees:
        runs: list[list[int]] = []
        before = 0
        for token, flag in zip(ids, scored):
            if flag and not before:
                runs.append([])
            if flag:
                runs[-1].append(token)
            before = flag
        texts += [template.tokenizer.decode(run, False) for run in runs]
    return texts


@pytest.mark.parametrize("row", ROWS_OF)
@pytest.mark.parametrize("model", MODELS)
def test_what_is_learned_is_what_the_row_says(model: str, row: str, template):
    """Every answer with its reasoning and calls, and one end of turn at which sampling stops."""
    chat = template(model)
    messages = ROWS_OF[row]
    more = {"tools": TOOLS} if row == "tools" else {}
    space = " " if model == "mistral" else ""
    plain = [space + m["content"] for m in messages if m["role"] == "assistant" and m["content"]]
    wanted = LEARNED.get((model, row), plain)
    reads_calls = {"qwen2.5", "smollm2", "qwen3", "llama3.1", "mistral"}
    if (row == "reasoning" and model != "qwen3") or (row == "tools" and model not in reads_calls):
        wanted = None
    if wanted is None:
        with pytest.raises(ValueError, match="leaves out|takes no tools|refuses this row"):
            trees_of(chat, {"messages": messages, **more})
        return
    trees = trees_of(chat, {"messages": messages, **more})
    end = ENDS.get(model, chat.tokenizer.eos_token)
    assert learned_texts(chat, trees) == [text + end for text in wanted]
    assert chat.tokenizer.special[end] in chat.stop_ids and chat.end == chat.tokenizer.special[end]


@pytest.mark.parametrize("row", ["one", "system", "turns", "system turns", "thought", "tools"])
@pytest.mark.parametrize("model", MODELS)
def test_texts_are_those_of_transformers(model: str, row: str, template, tmp_path: Path):
    """Every tree is transformers' rendering of its turns, up to the end of the answer.

    R1's answers with reasoning differ on purpose: its template cuts what is to be learned.
    """
    transformers = pytest.importorskip("transformers")
    chat = template(model)
    messages = ROWS_OF[row]
    tools = TOOLS if row == "tools" else None
    try:
        trees = trees_of(chat, {"messages": messages, **({"tools": tools} if tools else {})})
    except ValueError:
        return  # refused; the test above says which
    folder = chat_templates.save(tmp_path, *MODELS[model])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    turns = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
    lasts = turns if len(trees) > 1 else turns[-1:]
    spoken = [{**m, "content": m["content"] or ""} for m in messages]
    for (prompt, (ids, _)), last in zip(trees, lasts, strict=True):
        text = chat.tokenizer.decode(prompt + ids, False)
        whole = theirs.apply_chat_template(spoken[: last + 1], tools=tools, tokenize=False)
        if (model, row) == ("r1", "thought"):
            asked = theirs.apply_chat_template(
                spoken[:last], tokenize=False, add_generation_prompt=True
            )
            assert text == asked + THOUGHT.removeprefix("<think>\n") + "</s>"
            continue
        assert whole.startswith(text)
        assert whole.removeprefix(text).strip() in ("", "<|endoftext|>")  # Phi-3's eos behind it
        assert prompt + ids == theirs(text, add_special_tokens=False)["input_ids"]


def test_answers_that_differ_in_a_call_alone_differ(template):
    """A pair whose answers differ only in the arguments of a tool call has two answers."""
    calls = [{"function": {"name": "calc", "arguments": json.dumps({"x": x})}} for x in (4, 5)]
    bodies = [[answer("", tool_calls=[call])] for call in calls]
    row = {"prompt": "2+2?", "chosen": bodies[0], "rejected": bodies[1], "tools": TOOLS}
    content, _, options = canonical(row, "preference")
    pair = with_options(ROWS["preference"](content, False), options)
    prompt, (one, two), _ = template("qwen2.5").pair(pair.prompt, pair.responses)
    assert one != two
    assert '"name": "calc"' in template("qwen2.5").tokenizer.decode(prompt, False)  # the tools
    text = template("qwen2.5").tokenizer.decode(one[0], False)
    assert text == CALLED + "<|im_end|>"  # arguments given as text are not quoted once more


def test_a_message_that_a_template_leaves_out_is_named(tmp_path: Path):
    """No branch for system messages, answers cut short, tools that are not written."""
    branches = {
        "the text of message 1 (system)": (
            "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}"
            "{{ eos_token }}{% endif %}{% endfor %}"
        ),
        "the text of message 3 (assistant)": (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content[:9] }}{{ eos_token }}{% endfor %}"
        ),
    }
    messages = [SYSTEM, user("2+2?"), answer("it is certainly four")]
    for what, source in branches.items():
        folder = chat_templates.save(tmp_path / what[12:21], source, "</s>")
        chat = Template("auto", load_tokenizer(folder))
        with pytest.raises(ValueError, match="the chat template leaves out") as caught:
            trees_of(chat, {"messages": messages})
        assert what in str(caught.value)
    source = "{% set unused = tools %}" + chat_templates.OLMO
    chat = Template("auto", load_tokenizer(chat_templates.save(tmp_path / "t", source, "</s>")))
    with pytest.raises(ValueError, match="leaves out the tool calc"):
        trees_of(chat, {"messages": ROWS_OF["one"], "tools": TOOLS})
    with pytest.raises(ValueError, match="leaves out the text of message 1 .system."):
        folder = tmp_path / next(iter(branches))[12:21]
        Template("auto", load_tokenizer(folder)).prompt([SYSTEM, user("2+2?")])


def test_white_space_and_order_are_the_templates_own():
    """Line ends and trimming are not compared; a text in another message's place is."""
    chat = [user("a  b"), answer("c\n\nd"), user("e")]
    assert not left_out("a b|c d|e", chat, [1])
    assert "message 2" in left_out("c d|a b|e", chat, [1])
    assert not left_out("a b|d|e", [user("a b"), answer("<think>c</think>d"), user("e")], [])
    assert "message 2" in left_out("a b|d|e", [user("a b"), answer("<think>c</think>d")], [1])


@pytest.mark.parametrize(
    ("source", "close"),
    [
        (  # shared/cases: the marker of the next turn closes an answer
            "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
            "<|user|>",
        ),
        (
            "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
            "\n<|user|>",
        ),
        (  # nothing closes an answer: eos does
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            "</s>",
        ),
        (  # words close it, no token: eos behind them
            "{% for m in messages %}{{ m.role }}: {{ m.content }} STOP\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            " STOP</s>",
        ),
    ],
)
def test_every_answer_ends_with_a_stop_id(source: str, close: str, tmp_path: Path):
    """Whatever closes an answer is learned, and sampling stops there."""
    folder = chat_templates.save(tmp_path, source, "</s>")
    chat = Template("auto", load_tokenizer(folder))
    trees = trees_of(chat, {"messages": ROWS_OF["turns"]})
    assert learned_texts(chat, trees) == [f"four{close}", f"yes{close}"]
    ends = {[i for i, flag in zip(ids, scored) if flag][-1] for _, (ids, scored) in trees}
    assert ends == {chat.end} and chat.end in chat.stop_ids


def test_reasoning_is_kept_where_a_template_strips_it(tmp_path: Path):
    """shared/cases strip.jinja: the prompt, the answer as the row has it, and the end."""
    source = chat_templates.R1.replace("<think>\n", "")
    chat = Template("auto", load_tokenizer(chat_templates.save(tmp_path, source, "</s>")))
    [(prompt, _)] = trees = trees_of(chat, {"messages": ROWS_OF["thought"]})
    assert learned_texts(chat, trees) == [THOUGHT + "</s>"]
    assert chat.tokenizer.decode(prompt, False) == "<s><|User|>2+2?<|Assistant|>"


def test_values_for_the_template(template, tmp_path: Path):
    """--template-kwargs and a row's chat_template_kwargs reach it; unread names are refused."""
    tokenizer = template("qwen3").tokenizer
    off = Template("auto", tokenizer, {"enable_thinking": False})
    prompt, [(ids, _)], _ = off.pair("2+2?", ["four"])
    decode = tokenizer.decode
    assert decode(prompt, False).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert decode(ids, False) == "four<|im_end|>"
    rows = [{"prompt": "Q", "response": "A", "chat_template_kwargs": {"enable_thinking": False}}]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(rows[0]) + "\n")
    data = load_dataset(file, "sft", template("qwen3"), cache=tmp_path / "cache", log=str)
    whole, asked = list(data.tokens), int(data.prompt_len[0])
    assert decode(whole[:asked], False).endswith("</think>\n\n")
    assert decode(whole[asked:], False) == "A<|im_end|>"
    prompts = load_prompts([file], template("qwen3"), 100, log=str)
    assert decode(prompts.ids[0], False).endswith("</think>\n\n")
    assert Template("auto", tokenizer).hash != off.hash
    with pytest.raises(ValueError, match="never reads `enable_thinking`"):
        Template("auto", template("phi3").tokenizer, {"enable_thinking": False})
    with pytest.raises(ValueError, match="takes no tools"):
        trees_of(template("phi3"), {"messages": ROWS_OF["one"], "tools": TOOLS})
    with pytest.raises(ValueError, match="plain has no place for tools"):
        Template("plain", tokenizer).conversation(
            with_options(
                ROWS["sft"]({"messages": ROWS_OF["one"]}, False), {"tools": TOOLS}
            ).responses[0]
        )


@pytest.mark.parametrize("name", ["plain", "auto"])
def test_ends_that_a_row_has_already_are_not_doubled(name: str, template, tmp_path: Path):
    """A bos in front, an eos or end of turn behind: one each is learned, and they are counted."""
    chat = Template(name, template("phi3").tokenizer)
    bare = chat.pair("2+2?", ["four"])
    end = "<|end|>" if name == "auto" else "<|endoftext|>"
    assert chat.pair("<s>2+2?", [f"four{end}"]) == bare
    assert chat.pair("2+2?", [f"four{end}\n"]) == bare
    lines = [
        {"prompt": "<s>2+2?", "response": f"four{end}"},
        {"prompt": "2+2?", "response": "four"},
        {"prompt": "say <|end|> now", "response": "four"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said: list[str] = []
    load_dataset(file, "sft", chat, cache=tmp_path / "cache", log=said.append)
    assert "1 rows with a bos or an end of turn of their own, not doubled" in said[-1]
    assert "1 rows with control tokens in their texts" in said[-1]


def test_named_tokens_reach_the_template_as_in_transformers(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    source = (
        "{{ bos_token }}{{ pad_token }}{{ unk_token is defined }}{{ image_token }}"
        "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    more = {"pad_token": "<|pad|>", "extra_special_tokens": {"image_token": "<|image|>"}}
    marks = "{# <|pad|> <|image|> #}"
    folder = chat_templates.save(tmp_path, source + marks, "</s>", more)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    mine = Template("auto", load_tokenizer(folder)).render(ROWS_OF["one"], False)
    assert mine == theirs.apply_chat_template(ROWS_OF["one"], tokenize=False)
    assert "<|pad|>" in mine and "<|image|>" in mine


def test_a_template_that_hangs_is_stopped(tmp_path: Path, monkeypatch):
    """A loop of loops is stopped after some seconds, and the row is refused."""
    monkeypatch.setattr(data.jinja, "SECONDS", 0.2)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    source = "{% if messages | length > 2 %}" + loop + "{% endif %}" + chat_templates.OLMO
    chat = Template("auto", load_tokenizer(chat_templates.save(tmp_path, source, "</s>")))
    trees_of(chat, {"messages": ROWS_OF["one"]})
    with pytest.raises(ValueError, match="it still runs after 0.2 seconds"):
        trees_of(chat, {"messages": ROWS_OF["turns"]})
