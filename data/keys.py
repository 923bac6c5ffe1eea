"""Every key of a row is used, refused, or named as ignored: no meaning is lost on the way in.

    canonical({"system": "Be brief.", "prompt": "Hi", "response": "Ho", "id": 7}, "sft")
    -> ({"prompt": [{system: Be brief.}, {user: Hi}], "response": "Ho"}, {"id"}, {})

Senders put the same things under many keys. What stands beside the prompt (a system message,
earlier turns, an instruction) becomes part of it; tools and template values go to the chat template
with it. What nothing here can hold (images, soft weights) is refused by name, because training on
the rest would teach something else.
"""

import json
from collections.abc import Collection
from typing import Any, NamedTuple

from data.chat import ROLES, SPOKEN, Messages, as_chat
from data.formats import ATTRIBUTES, Row, prompt_of
from data.senders import ALIASES, TOOLS, renamed

# Keys that data/formats.py reads, by kind of row. Those of other kinds are ignored, by name.
ANSWERS = set("prompt response completion input output messages conversations".split())
PAIRS = set("prompt chosen rejected chosen_response rejected_response".split())
RESPONSES = (ANSWERS | PAIRS) - {"prompt", "input", "messages", "conversations"}
SAMPLED = set("tokenizer response_ids chosen_ids rejected_ids".split())
USED = {
    "sft": ANSWERS | SAMPLED | {"text"},
    "preference": PAIRS
    | SAMPLED
    | set("chosen_reward rejected_reward score_chosen score_rejected margin".split()),
    "label": ANSWERS | PAIRS | SAMPLED | {"label", "preference"},
    "attributes": ANSWERS | SAMPLED | {"responses", "attributes", *ATTRIBUTES},
    "weights": ANSWERS | {"responses", "weights"},
}
BESIDE = ("system", "system_prompt", "history", "instruction")  # become part of the prompt
# Keys of a row, and of a message, whose content would be lost.
LOST_IN_ROW = set("documents images image audio videos video weight train loss mask".split())
FOR_REWARDS = {"documents", "weight", "train", "loss", "mask"}  # a reward may read them
LOST_IN_MESSAGE = set("images audio refusal".split())
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # the same under three names
CALLS = ("tool_calls", "function_call")  # the second is OpenAI's older name
VALUES = ("chat_template_kwargs", "template_kwargs")  # for the chat template
LEARNED = ("weight", "train", "loss", "mask")  # of a message: 0 or false is not learned
LISTS = sorted(ANSWERS | PAIRS)


class Canonical(NamedTuple):
    """A row under the keys that data/formats.py reads."""

    row: dict[str, Any]
    ignored: set[str]  # names of keys
    options: dict[str, Any]  # what the chat template takes besides the messages: tools, ...


def without(row: dict[str, Any], ignore: Collection[str]) -> dict[str, Any]:
    """Return a row without some keys, in it and in its messages: --ignore-keys."""
    if not ignore:
        return row

    def kept(value: Any) -> Any:
        if isinstance(value, list):
            return [kept(one) for one in value]
        if isinstance(value, dict):
            return {key: one for key, one in value.items() if key not in ignore}
        return value

    return {key: kept(value) for key, value in row.items() if key not in ignore}


def canonical(row: dict[str, Any], kind: str = "") -> Canonical:
    """Return a row under the keys that data/formats.py reads.

    kind: a key of USED, or "" for prompts, whose other keys are the reward's. A null or empty
    value counts as absent. ValueError names a key that cannot be used.
    """
    ignored: set[str] = set()
    lost = LOST_IN_ROW if kind else LOST_IN_ROW - FOR_REWARDS
    for key in sorted(lost & row.keys()):
        if _says_something(row[key]) and not (key in LEARNED and row[key] == 1):
            raise ValueError(
                f"`{key}` cannot be used, and without it the row would mean something else: "
                "render it into the texts, or remove the key"
            )
    theirs = {ours: name for name, ours in ALIASES.items() if row.get(name) is not None}
    row = renamed(row, kind)
    beside = (*BESIDE, *TOOLS, *VALUES)
    clean = {key: value for key, value in row.items() if key not in beside}
    for key in LISTS:
        if isinstance(clean.get(key), list):
            clean[key] = _messages(clean[key], key, ignored)
    _add_instruction(row, clean)
    _add_before(row, clean, ignored, kind)
    if kind:
        unused = {key for key in clean.keys() - USED[kind] if clean[key] is not None}
        ignored |= {theirs.get(key, key) for key in unused}
    return Canonical(clean, ignored, _options(row))


def check_used(content: dict[str, Any], row: Row, kind: str) -> None:
    """Check that no key holds another prompt or answer than those that are learned.

    content: a row under our keys; row: what was made of it. What stands twice may stand twice.
    ValueError names a key whose texts are not learned.
    """
    learned = set(_texts_of(row.prompt)).union(*map(_texts_of, row.responses))
    split = set()  # transcripts: two texts that formats.py splits
    if content.get("prompt") is None:
        for pair in (("chosen", "chosen_response"), ("rejected", "rejected_response")):
            split |= set([key for key in pair if isinstance(content.get(key), str)][:1])
    for key in USED[kind] & {*LISTS, "text", "responses"}:
        value = content.get(key)
        if value is None or key in split:
            continue
        if not isinstance(value, (str, list)):
            raise ValueError(
                f"`{key}` holds neither text nor messages: remove it, or use --ignore-keys {key}"
            )
        texts = _texts_of(value)
        if key in ("messages", "conversations"):  # turns behind the last answer are left out
            roles = [_role(message) for message in value] if isinstance(value, list) else []
            texts = (
                texts[: len(roles) - roles[::-1].index("assistant")]
                if "assistant" in roles
                else texts
            )
        if not learned.issuperset(texts):
            raise ValueError(
                f"`{key}` says something else than the prompt and answer that stand beside it: "
                f"keep one, or use --ignore-keys {key}"
            )


def _texts_of(value: Any) -> list[str]:
    """Return the texts of a text, of messages, or of a list of both."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return _texts_of(value.get("content", value.get("value")))
    return [text for one in value for text in _texts_of(one)] if isinstance(value, list) else []


def prompt_in(row: dict[str, Any], plain: bool = False) -> str | Messages:
    """Return the prompt of a row of any kind, with what the chat template takes besides.

    plain: keep HH transcripts as text. ValueError names the keys that a row needs.
    """
    content, _, options = canonical(row)
    return as_chat(prompt_of(content, plain), options)


def _says_something(value: Any) -> bool:
    """Return whether a value is more than null or empty."""
    return value is not None and value not in ("", [], {})


def _messages(messages: list, key: str, ignored: set[str]) -> list:
    """Return messages with text and, where the sender does not want it learned, learn = False."""
    result = []
    for k, message in enumerate(messages):
        if not isinstance(message, dict):
            return messages  # formats.py says what is wrong
        where = f"{key}[{k}]"
        for lost in sorted(LOST_IN_MESSAGE & message.keys()):
            if _says_something(message[lost]):
                raise ValueError(
                    f"`{where}.{lost}` would be lost: write it into the content as the model "
                    "should write it, or remove the key"
                )
        text_key = "value" if "from" in message and "role" not in message else "content"
        new = {name: message[name] for name in ("role", "from") if name in message}
        if text_key in message:
            new[text_key] = _joined(message[text_key], f"{where}.{text_key}")
        new |= _spoken(message, new, text_key, where)
        marks = {name: message[name] for name in LEARNED if message.get(name) is not None}
        if marks and not _is_learned(marks, where):
            new["learn"] = False
        known = {"role", "from", text_key, "learn", *LEARNED, *LOST_IN_MESSAGE}
        known |= {*SPOKEN, *THOUGHTS, *CALLS}
        unknown = {name for name in message.keys() - known if message[name] is not None}
        ignored |= {f"{key}[].{name}" for name in unknown}
        result.append(new)
    answers = [new for new in result if _role(new) == "assistant"]
    if key in RESPONSES and answers and not any(new.get("learn", True) for new in answers):
        raise ValueError(f"no turn of `{key}` is to be learned: remove the row")
    return result


def _spoken(
    message: dict[str, Any], new: dict[str, Any], text_key: str, where: str
) -> dict[str, Any]:
    """Return reasoning, tool calls and names of a message under the keys of chat templates.

    An answer that only calls tools has no text, which becomes "". ValueError: a value that is none.
    """
    more: dict[str, Any] = {}
    thoughts = {message[name] for name in THOUGHTS if isinstance(message.get(name), str)} - {""}
    for name in THOUGHTS:
        if message.get(name) not in (None, "", [], {}) and not isinstance(message[name], str):
            raise ValueError(f"`{where}.{name}` must be text")
    if len(thoughts) > 1:
        raise ValueError(f"`{where}` has two reasonings that differ: keep one")
    if thoughts:
        more["reasoning_content"] = thoughts.pop()
    calls = message.get("tool_calls")
    if not _says_something(calls) and _says_something(message.get("function_call")):
        calls = [message["function_call"]]
    if new.get("from") == "function_call" or new.get("role") == "function_call":  # LLaMA-Factory
        calls = _parsed(new.get(text_key), f"{where}.{text_key}")
        new["role" if "role" in new else "from"] = "assistant"
        new[text_key] = ""
    if _says_something(calls):
        if not isinstance(calls, list):
            calls = [calls]
        more["tool_calls"] = [
            _call(call, f"{where}.tool_calls[{k}]") for k, call in enumerate(calls)
        ]
        if new.get(text_key) is None:
            new[text_key] = ""
    for name in ("tool_call_id", "name"):
        if isinstance(message.get(name), str) and message[name]:
            more[name] = message[name]
    return more


def _call(call: Any, where: str) -> dict[str, Any]:
    """Return a tool call {type, function: {name, arguments}}, its arguments as an object.

    Templates write arguments as JSON: an object given as text would be quoted once more.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"`{where}` must be {{function: {{name, arguments}}}}")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", f"{where}.function.arguments")
    if not isinstance(arguments, dict):
        raise ValueError(f"`{where}.function.arguments` must be an object")
    ids = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {
        **ids,
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _parsed(text: Any, where: str) -> Any:
    """Return what a JSON text says. ValueError: it is none."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"`{where}` is not valid JSON") from None


def _options(row: dict[str, Any]) -> dict[str, Any]:
    """Return the tools of a row and its values for the chat template.

    ValueError: they are not what their names say, or two names say different things.
    """
    options: dict[str, Any] = {}
    given = [row[name] for name in VALUES if _says_something(row.get(name))]
    for values in given:
        if not isinstance(values, dict) or values != given[0]:
            raise ValueError(f"`{VALUES[0]}` must be one object of values for the chat template")
        options |= values
    for name in TOOLS:
        tools = row.get(name)
        if isinstance(tools, str) and tools.strip():  # LLaMA-Factory writes JSON into a text
            tools = _parsed(tools, name)
        if not _says_something(tools):
            continue
        if not isinstance(tools, list):
            raise ValueError(f"`{name}` must be a list of tools")
        wrapped = [_tool(tool, f"{name}[{k}]") for k, tool in enumerate(tools)]
        if options.get("tools", wrapped) != wrapped:
            raise ValueError("`tools` and `functions` say different things: keep one")
        options["tools"] = wrapped
    return options


def _tool(tool: Any, where: str) -> dict[str, Any]:
    """Return a tool {type: function, function: {name, ...}}. ValueError: it has no name."""
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        function = tool["function"]
    else:
        function = tool
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"`{where}` must be {{type: function, function: {{name, ...}}}}")
    return tool if function is not tool else {"type": "function", "function": function}


def _is_learned(marks: dict[str, Any], where: str) -> bool:
    """Return whether a message is to be learned. ValueError: neither yes nor no, or both."""
    for name, value in marks.items():
        if value not in (0, 1):  # false and true too
            raise ValueError(
                f"`{where}.{name}` is {value!r}: 0 (not learned) or 1; other weights are not known"
            )
    if len(set(map(bool, marks.values()))) > 1:
        raise ValueError(f"`{where}`: {' and '.join(sorted(marks))} say different things")
    return bool(next(iter(marks.values())))


def _joined(content: Any, where: str) -> Any:
    """Return content parts of type text as one text; anything else as it is.

    ValueError: a part of another type.
    """
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", "str") or not isinstance(text, str):
            raise ValueError(f"`{where}` has a part of type {kind!r}: only text can be used")
        texts.append(text)
    return "".join(texts)


def _add_instruction(row: dict[str, Any], clean: dict[str, Any]) -> None:
    """Make Alpaca's instruction, with its input below it, the prompt."""
    instruction = row.get("instruction")
    if not _says_something(instruction):
        return
    if not isinstance(instruction, str):
        raise ValueError("`instruction` must be text")
    if any(clean.get(key) is not None for key in ("prompt", "messages", "conversations")):
        raise ValueError(
            "`instruction` beside a prompt: which comes first is not said; join them, or call it "
            "`system`"
        )
    more = clean.pop("input", None)
    clean["prompt"] = f"{instruction}\n{more}" if _says_something(more) else instruction
    if clean.get("response") is None and clean.get("output") is not None:
        clean["response"] = clean.pop("output")


def _add_before(row: dict[str, Any], clean: dict[str, Any], ignored: set[str], kind: str) -> None:
    """Put a system message and earlier turns in front of the prompt or the conversation."""
    before = _system(row) + _messages(_history(row.get("history")), "history", ignored)
    if not before:
        return
    keys = ("messages", "conversations", "prompt", "input")
    known = USED.get(kind, keys)
    key = next((k for k in keys if k in known and isinstance(clean.get(k), (str, list))), None)
    names = " and ".join(f"`{name}`" for name in BESIDE[:3] if _says_something(row.get(name)))
    if key is None:
        raise ValueError(f"{names} but no prompt to put in front of: add a `prompt`")
    rest = clean[key]
    if isinstance(rest, str):
        rest = [{"role": "user", "content": rest}]
    if not isinstance(rest, list) or not all(isinstance(message, dict) for message in rest):
        return  # formats.py says what is wrong
    first = rest[0] if rest else {}
    if before[0]["role"] == "system" and _role(first) == "system":
        if first.get("content", first.get("value")) != before[0]["content"]:
            raise ValueError(f"{names} and the first message of `{key}` are two system messages")
        before = before[1:]
    clean[key] = before + rest
    for body in ("chosen", "rejected", "response", "completion"):
        whole = clean.get(body)
        if key == "prompt" and isinstance(whole, list) and whole and _role(whole[0]) != "assistant":
            clean[body] = before + whole  # it repeats the prompt


def _system(row: dict[str, Any]) -> list[dict[str, str]]:
    """Return the system message that stands beside the prompt, as a list of none or one."""
    texts = {row[key] for key in ("system", "system_prompt") if isinstance(row.get(key), str)}
    for key in ("system", "system_prompt"):
        if _says_something(row.get(key)) and not isinstance(row[key], str):
            raise ValueError(f"`{key}` must be text")
    texts.discard("")
    if len(texts) > 1:
        raise ValueError("`system` and `system_prompt` say different things: keep one")
    return [{"role": "system", "content": text} for text in texts]


def _history(history: Any) -> list[dict[str, str]]:
    """Return earlier turns: pairs [user, assistant] (LLaMA-Factory, Firefly), or messages."""
    if not _says_something(history):
        return []
    if not isinstance(history, list):
        raise ValueError("`history` must be a list of [user, assistant] pairs or of messages")
    turns: list[dict[str, str]] = []
    for k, turn in enumerate(history):
        if isinstance(turn, dict) and _role(turn) in ROLES.values():
            turns.append(turn)
        elif (
            isinstance(turn, (list, tuple))
            and len(turn) == 2
            and all(isinstance(text, str) for text in turn)
        ):
            roles = ("user", "assistant")
            turns += [{"role": role, "content": text} for role, text in zip(roles, turn)]
        else:
            raise ValueError(f"`history[{k}]` must be a pair [user, assistant] or a message")
    return turns


def _role(message: Any) -> str | None:
    """Return the role of a message under our names, None if it has none that is known."""
    role = message.get("role", message.get("from")) if isinstance(message, dict) else None
    return ROLES.get(role.lower()) if isinstance(role, str) else None
