"""One JSON object of a data file -> the prompt and the responses that a template turns into tokens.

    SFT          {prompt, response}, {prompt, completion}, {input, output}: text or message lists
                 {messages: [{role, content}, ...]}, {conversations: [{from, value}, ...]}: every assistant turn counts
    preferences  {prompt, chosen, rejected}, {prompt, chosen_response, rejected_response}: text or message lists
                 {chosen, rejected} without a prompt: message lists that repeat it (UltraFeedback), or transcripts
                 "\\n\\nHuman: ...\\n\\nAssistant: ..." (HH-RLHF)
                 optional numbers: chosen_reward, rejected_reward (or score_chosen, score_rejected), margin
    labels       {prompt, response or completion, label: true | false}, or preference: "chosen" | "rejected" for label;
                 or preferences, as two labels a row (KTO)
    attributes   {prompt, response or completion, attributes: {helpfulness: 4, ...}}, or the attributes as keys of the
                 row (HelpSteer); {prompt, responses: [...], attributes: [{...}, ...]} for several answers to a prompt,
                 or one object for all of them
    weights      {prompt, responses: [...], weights: [...]}, numbers, as train_steerlm.py writes them for itself

Text only: no tokenizer here. Every function takes one row and raises ValueError(reason) for a row it cannot use; the
caller adds file and line. A null counts as an absent key, because exports of tables write one for every empty cell.
"""

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

Messages = list[dict[str, str]]  # [{"role": "user", "content": "..."}, ...], no other keys

# In the order of NeMo-Aligner's attribute line. Another attribute needs no more than its name here.
ATTRIBUTES = ("quality", "toxicity", "humor", "creativity", "helpfulness", "correctness", "coherence", "complexity",
              "verbosity")  # fmt: skip
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
FLOAT32_MAX = 3.4e38


class Row(NamedTuple):
    """What a row says. `prompt` None: `responses` is one whole conversation, each assistant turn of it to be scored."""

    prompt: str | Messages | None
    responses: list[str | Messages]
    columns: dict[
        str, list[float]
    ]  # name -> one number a response, NaN when the row does not give it


def sft_row(row: dict[str, Any]) -> Row:
    """One demonstration: a prompt with its response, or a conversation. ValueError names the keys that would do."""
    pairs = (("prompt", "response"), ("prompt", "completion"), ("input", "output"))
    for prompt_key, response_key in pairs:
        if row.get(prompt_key) is None or row.get(response_key) is None:
            continue
        if (
            prompt_key == "input" and row.get("instruction") is not None
        ):  # Alpaca: half of the prompt would be lost
            raise ValueError(
                "`instruction` beside `input` and `output`: join the first two into one `prompt`"
            )
        prompt, response = _content(row, prompt_key), _content(row, response_key)
        if isinstance(response, list):
            prompt, (response,) = _split(prompt, {response_key: response})
        return Row(_ends_before_answer(prompt), [response], {})
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            return Row(None, [_conversation(row, key)], {})
    wanted = "`prompt` and `response` (or `completion`), `input` and `output`, `messages` or `conversations`"
    raise ValueError(
        f"{_missing(row, pairs)}: an SFT row needs {wanted}; this one has {_keys(row)}"
    )


def preference_row(row: dict[str, Any], plain: bool = False) -> Row:
    """One comparison: responses [chosen, rejected]; columns `reward` and `margin`, NaN where the row has none.

    `plain`: keep HH transcripts as text, the prompt ending in "Assistant:"; otherwise they become messages.
    ValueError names the missing key and the keys that would do.
    """
    keys = [
        _one_of(row, ("chosen", "chosen_response")),
        _one_of(row, ("rejected", "rejected_response")),
    ]
    prompt = None if row.get("prompt") is None else _content(row, "prompt")
    chosen, rejected = (_content(row, key) for key in keys)
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, responses = _split(prompt, {keys[0]: chosen, keys[1]: rejected})
    elif not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise ValueError(
            f"one of `{keys[0]}`, `{keys[1]}` is text and the other a message list: write both alike"
        )
    elif prompt is not None:
        responses = [chosen, rejected]
    else:
        prompt, responses = _transcripts(chosen, rejected, plain)
    rewards = [
        _number(row, ("chosen_reward", "score_chosen")),
        _number(row, ("rejected_reward", "score_rejected")),
    ]
    return Row(
        _ends_before_answer(prompt),
        responses,
        {"reward": rewards, "margin": [_number(row, ("margin",))] * 2},
    )


def label_row(row: dict[str, Any], plain: bool = False) -> Row:
    """A response that is desirable (column `label` 1) or not (0); a comparison is taken apart into one of each.

    ValueError names the missing key and the keys that would do.
    """
    answer = next((key for key in ("response", "completion") if row.get(key) is not None), None)
    if answer is None and (row.get("chosen") is not None or row.get("chosen_response") is not None):
        return preference_row(row, plain)._replace(columns={"label": [1.0, 0.0]})
    if answer is None or row.get("prompt") is None:
        wanted = "`prompt`, `response` (or `completion`) and `label`, or `prompt`, `chosen` and `rejected`"
        raise ValueError(f"a KTO row needs {wanted}; this one has {_keys(row)}")
    label = row.get("label")
    if label is None and row.get("preference") in ("chosen", "rejected"):
        label = row["preference"] == "chosen"
    if label not in (True, False):  # 1 and 0 too: exports of tables write them
        raise ValueError(
            f"`label` must be true or false (or `preference` chosen or rejected), got {_show(label)}"
        )
    return sft_row(row)._replace(columns={"label": [float(label)]})


def attribute_row(row: dict[str, Any]) -> Row:
    """One or several responses with a column for each of ATTRIBUTES, NaN where the row has none of that name.

    ValueError names the missing key, or the attribute that is not known.
    """
    if row.get("responses") is None:
        plain, attributes = sft_row(row), [row.get("attributes")]
    else:
        several = row["responses"]
        if not isinstance(several, list) or not several:
            raise ValueError(
                f"`responses` must be a list of answers and not empty, got {_show(several)}"
            )
        attributes = row.get("attributes")
        if attributes is None or isinstance(attributes, dict):
            attributes = [attributes] * len(several)
        if not isinstance(attributes, list) or len(attributes) != len(several):
            raise ValueError(
                f"`attributes` must be a list of {len(several)} objects, one for each of `responses`"
            )
        prompt = None if row.get("prompt") is None else _ends_before_answer(_content(row, "prompt"))
        if prompt is None:
            raise ValueError(f"`responses` but no `prompt`; this row has {_keys(row)}")
        plain = Row(prompt, [_content({"responses": r}, "responses") for r in several], {})
    rows = [row if given is None else given for given in attributes]
    for given in rows:
        if not isinstance(given, dict):
            raise ValueError(f"`attributes` must be an object of numbers, got {_show(given)}")
        if given is not row:
            known_attributes(given)
    return plain._replace(
        columns={name: [_number(given, (name,)) for given in rows] for name in ATTRIBUTES}
    )


def weight_row(row: dict[str, Any]) -> Row:
    """Several responses to a prompt with a number for each (column `weight`)."""
    plain, weights = attribute_row({**row, "attributes": {}}), row.get("weights")
    if not isinstance(weights, list) or len(weights) != len(plain.responses):
        raise ValueError("`weights` must be a list of numbers, one for each of `responses`")
    numbers = [_number({"weights": weight}, ("weights",)) for weight in weights]
    return plain._replace(columns={"weight": numbers})


def answers_of(
    row: dict[str, Any], plain: bool = False
) -> tuple[str | Messages, list[str | Messages]]:
    """(prompt, responses) of a row of any kind: one response, several, or a comparison. ValueError as the others."""
    if row.get("chosen") is not None or row.get("chosen_response") is not None:
        found = preference_row(row, plain)
    else:
        found = attribute_row({**row, "attributes": {}})
    if found.prompt is not None:
        return found.prompt, found.responses
    *before, last = cast(
        Messages, found.responses[0]
    )  # a conversation: its last assistant turn answers the rest
    if not before:
        raise ValueError("the conversation has nothing before the assistant's turn")
    return before, [last["content"]]


def prompt_of(row: dict[str, Any], plain: bool = False) -> str | Messages:
    """The prompt of a row of any kind, with or without an answer. ValueError names the keys that would do."""
    for key in ("prompt", "input"):
        if row.get(key) is not None:
            return _ends_before_answer(_content(row, key))
    if all(
        row.get(key) is None for key in ("messages", "conversations", "chosen", "chosen_response")
    ):
        raise ValueError(f"no `prompt` (nor `input` or `messages`); this row has {_keys(row)}")
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages")
        return _ends_before_answer(
            messages[:-1] if messages[-1]["role"] == "assistant" else messages
        )
    return answers_of(row, plain)[0]


def known_attributes(names: Iterable[str], known: Iterable[str] = ATTRIBUTES) -> None:
    """ValueError for the first attribute that is not known, with those that are."""
    for name in names:
        if name not in known:
            raise ValueError(f"attribute {_show(name)} is not known: use {', '.join(known)}")


def _split(
    prompt: str | Messages | None, bodies: dict[str, Messages]
) -> tuple[str | Messages, list[str | Messages]]:
    """Message lists that hold the answer alone or repeat the prompt -> (prompt, answers, from an assistant turn on)."""
    for key, messages in bodies.items():
        if messages[-1]["role"] != "assistant":
            raise ValueError(
                f"`{key}` ends with a {messages[-1]['role']} turn: it must end with the assistant's"
            )
    lists = list(bodies.values())
    names = " and ".join(f"`{key}`" for key in bodies)
    if isinstance(prompt, list) and all(
        m[: len(prompt)] == prompt and len(m) > len(prompt) for m in lists
    ):
        return prompt, [_starts_with_answer(m[len(prompt) :], names) for m in lists]
    if isinstance(prompt, list) or (
        prompt is not None and all(m[0]["role"] == "assistant" for m in lists)
    ):
        return prompt, [_starts_with_answer(m, names) for m in lists]
    # The lists carry the prompt themselves, and a `prompt` string is only informative (UltraFeedback). The border lies
    # before the last assistant turn up to which all agree, message by message.
    for k in range(min(map(len, lists)) - 1, 0, -1):
        if all(m[:k] == lists[0][:k] and m[k]["role"] == "assistant" for m in lists):
            return lists[0][:k], [m[k:] for m in lists]
    raise ValueError(
        f"{names} share no prompt: begin them with the same messages or give `prompt` as messages"
    )


def _transcripts(
    chosen: str, rejected: str, plain: bool
) -> tuple[str | Messages, list[str | Messages]]:
    """Two HH transcripts -> (prompt, responses), split after the last "Assistant:" up to which they are identical.

    By turns: the characters both begin with may well end inside a word of the answer.
    """
    turns = list(TURN.finditer(chosen))
    border = None
    for k, turn in enumerate(turns):
        if turn[1] == "Assistant" and rejected.startswith(chosen[: turn.end()]):
            border = k
    if border is None:
        raise ValueError(
            'no `prompt`, and `chosen` and `rejected` share no "\\n\\nAssistant:" turn: add a `prompt`'
        )
    end = turns[border].end()
    conversations = [_turns(chosen), _turns(rejected)]
    if any(messages[-1]["role"] != "assistant" for messages in conversations):
        raise ValueError("a transcript ends with a Human turn: it must end with the Assistant's")
    if plain:
        return chosen[:end], [chosen[end:], rejected[end:]]
    return conversations[0][:border], [messages[border:] for messages in conversations]


def _turns(text: str) -> Messages:
    """A transcript "Human: ... Assistant: ..." as messages, white space around each turn removed."""
    before, *parts = TURN.split(
        text
    )  # text before the first turn, then role, content, role, content, ...
    if before.strip():
        raise ValueError('a transcript must begin with "\\n\\nHuman:" or "\\n\\nAssistant:"')
    return [
        {"role": ROLES[role.lower()], "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2])
    ]


def _conversation(row: dict[str, Any], key: str) -> Messages:
    """A whole conversation, cut after its last assistant turn: what follows carries no loss and nothing sees it."""
    messages = _messages(row[key], key)
    if (
        isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system"
    ):  # ShareGPT, NeMo
        messages = [{"role": "system", "content": _text(row["system"], "system")}, *messages]
    answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError(f"`{key}` has no assistant turn to learn from")
    return messages[: answers[-1] + 1]


def _content(row: dict[str, Any], key: str) -> str | Messages:
    return _messages(row[key], key) if isinstance(row[key], list) else _text(row[key], key)


def _messages(value: Any, key: str) -> Messages:
    """Checked messages in the one form {role, content}; both spellings, {role, content} and {from, value}, are read."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{key}` must be a list of messages and not empty, got {_show(value)}")
    messages = []
    for k, message in enumerate(value):
        where = f"{key}[{k}]"
        if not isinstance(message, dict):
            raise ValueError(f"`{where}` must be a message {{role, content}}, got {_show(message)}")
        role_key, text_key = (
            ("from", "value")
            if "from" in message and "role" not in message
            else ("role", "content")
        )
        role = message.get(role_key)
        known = ROLES.get(role.lower()) if isinstance(role, str) else None
        if known is None:
            raise ValueError(
                f"`{where}.{role_key}` is {_show(role)}: must be system, user or assistant"
            )
        messages.append(
            {"role": known, "content": _text(message.get(text_key), f"{where}.{text_key}")}
        )
    return messages


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"`{key}` must be text, got {_show(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"`{key}` holds half of a surrogate pair, which is no character: repair the escape"
        ) from None
    return value


def _number(row: dict[str, Any], names: tuple[str, ...]) -> float:
    """The first of the named numbers that the row gives; NaN when it gives none."""
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not abs(value) < FLOAT32_MAX
        ):
            raise ValueError(f"`{name}` must be a finite number, got {_show(value)}")
        return float(value)
    return math.nan


def _starts_with_answer(messages: Messages, names: str) -> Messages:
    if messages[0]["role"] != "assistant":
        raise ValueError(
            f"{names} must begin with an assistant turn or with all messages of `prompt`"
        )
    return messages


def _ends_before_answer(prompt: str | Messages) -> str | Messages:
    if isinstance(prompt, list) and (not prompt or prompt[-1]["role"] == "assistant"):
        raise ValueError(
            "the prompt ends with an assistant turn: it must end with what the assistant answers"
        )
    return prompt


def _one_of(row: dict[str, Any], names: tuple[str, str]) -> str:
    for name in names:
        if row.get(name) is not None:
            return name
    wanted = "`prompt`, `chosen` and `rejected`"
    raise ValueError(
        f"no `{names[0]}` (nor `{names[1]}`): a preference row needs {wanted}; this one has {_keys(row)}"
    )


def _missing(row: dict[str, Any], pairs: tuple[tuple[str, str], ...]) -> str:
    """The half of a pair that is not there, when the other half is."""
    for pair in pairs:
        for have, lack in (pair, pair[::-1]):
            if row.get(have) is not None:
                return f"`{have}` but no `{lack}`"
    return "nothing to learn from"


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(map(_show, list(row)[:8])) or "no keys"


def _show(value: Any) -> str:
    """A value for an error message: short, and of ASCII alone so that every terminal prints it."""
    if isinstance(value, (list, dict)) and value:
        return "a list" if isinstance(value, list) else "an object"
    shown = ascii(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
