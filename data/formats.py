"""One JSON object of a data file -> the prompt and the responses that a template turns into tokens.

    SFT          {prompt, response}, {prompt, completion}, {input, output}: text or message lists
                 {messages: [{role, content}, ...]}, {conversations: [{from, value}, ...]}:
                 every assistant turn is scored; {text}, with --template plain
    preferences  {prompt, chosen, rejected}, {prompt, chosen_response, rejected_response}:
                 text or message lists
                 {chosen, rejected} without a prompt: message lists that repeat it (UltraFeedback),
                 or transcripts "\\n\\nHuman: ...\\n\\nAssistant: ..." (HH-RLHF)
                 optional numbers: chosen_reward, rejected_reward (or score_chosen,
                 score_rejected), margin
    labels       {prompt, response or completion, label: true | false}, or
                 preference: "chosen" | "rejected" for label; or preferences, two labels a row (KTO)
    attributes   {prompt, response or completion, attributes: {helpfulness: 4, ...}}, or the
                 attributes as keys of the row (HelpSteer);
                 {prompt, responses: [...], attributes: [{...}, ...]} for several answers to a
                 prompt, or one object for all of them
    weights      {prompt, responses: [...], weights: [...]}: numbers, written by train_steerlm.py
    sampled ids  response_ids beside response, chosen_ids and rejected_ids beside chosen and
                 rejected, with `tokenizer`, the fingerprint of the template that they belong to:
                 written by best_of_n.py, and used in place of the text where it is the same

Text only, no tokenizer. Every function takes one row and raises ValueError(reason) for a row that
it cannot use; the caller adds file and line. A null counts as an absent key: table exports write
one for every empty cell.
"""

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from data.chat import ROLES, SPOKEN, Chat, Messages, as_chat

# In the order of NeMo-Aligner's attribute line. To add an attribute, add its name.
ATTRIBUTES = (
    "quality",
    "toxicity",
    "humor",
    "creativity",
    "helpfulness",
    "correctness",
    "coherence",
    "complexity",
    "verbosity",
)
TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
FLOAT32_MAX = 3.4e38


class Row(NamedTuple):
    """The content of a row."""

    # None: `responses` is one whole conversation, every assistant turn of it to be scored.
    prompt: str | Messages | None
    responses: list[str | Messages]
    columns: dict[str, list[float]]  # name -> one number a response, NaN where the row has none


def with_options(row: Row, options: dict[str, Any]) -> Row:
    """Return a row whose prompt, or conversation, brings options for the chat template."""
    if not options:
        return row
    if row.prompt is None:
        return row._replace(responses=[Chat(cast(Messages, row.responses[0]), options)])
    return row._replace(prompt=as_chat(row.prompt, options))


def sft_row(row: dict[str, Any], plain: bool = False) -> Row:
    """Return one demonstration: a prompt with its response, a conversation, or a whole text.

    plain: take {text}, every token of which is learned. ValueError names the keys that a row needs.
    """
    pairs = (("prompt", "response"), ("prompt", "completion"), ("input", "output"))
    for prompt_key, response_key in pairs:
        if row.get(prompt_key) is None or row.get(response_key) is None:
            continue
        prompt = _content(row, prompt_key)
        response = _content(row, response_key)
        if isinstance(response, list):
            prompt, (response,) = _split(prompt, {response_key: response})
        return Row(_ends_before_answer(prompt), [response], {})
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            return Row(None, [_conversation(row, key)], {})
    if row.get("text") is not None:
        if not plain:
            raise ValueError(
                "`text` is a whole document without roles: use --template plain, which learns all "
                "of it, or write `messages`"
            )
        return Row("", [_text(row["text"], "text")], {})
    raise ValueError(
        f"{_missing(row, pairs)}: an SFT row needs `prompt` and `response` (or `completion`), "
        f"`input` and `output`, `messages` or `conversations`; this one has {_keys(row)}"
    )


def preference_row(row: dict[str, Any], plain: bool = False) -> Row:
    """Return one comparison: responses [chosen, rejected], columns `reward` and `margin`.

    plain: keep HH transcripts as text, the prompt ending in "Assistant:"; else make them messages.
    ValueError names the missing key and the keys that a row needs.
    """
    chosen_key = _one_of(row, ("chosen", "chosen_response"))
    rejected_key = _one_of(row, ("rejected", "rejected_response"))
    prompt = None if row.get("prompt") is None else _content(row, "prompt")
    chosen = _content(row, chosen_key)
    rejected = _content(row, rejected_key)
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, responses = _split(prompt, {chosen_key: chosen, rejected_key: rejected})
    elif not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise ValueError(
            f"one of `{chosen_key}`, `{rejected_key}` is text and the other a message list: "
            "write both alike"
        )
    elif prompt is not None:
        responses = [chosen, rejected]
    else:
        prompt, responses = _transcripts(chosen, rejected, plain)
    columns = {
        "reward": [
            _number(row, ("chosen_reward", "score_chosen")),
            _number(row, ("rejected_reward", "score_rejected")),
        ],
        "margin": [_number(row, ("margin",))] * 2,
    }
    return Row(_ends_before_answer(prompt), responses, columns)


def label_row(row: dict[str, Any], plain: bool = False) -> Row:
    """Return a response that is desirable (column `label` 1) or not (0); of a comparison, both.

    ValueError names the missing key and the keys that a row needs.
    """
    answer = next((key for key in ("response", "completion") if row.get(key) is not None), None)
    if answer is None and (row.get("chosen") is not None or row.get("chosen_response") is not None):
        return preference_row(row, plain)._replace(columns={"label": [1.0, 0.0]})
    if answer is None or row.get("prompt") is None:
        raise ValueError(
            "a KTO row needs `prompt`, `response` (or `completion`) and `label`, or `prompt`, "
            f"`chosen` and `rejected`; this one has {_keys(row)}"
        )
    label = row.get("label")
    if label is None and row.get("preference") in ("chosen", "rejected"):
        label = row["preference"] == "chosen"
    if label not in (True, False):  # 1 and 0 too: exports of tables write them
        raise ValueError(
            "`label` must be true or false (or `preference` chosen or rejected), "
            f"got {_show(label)}"
        )
    return sft_row(row)._replace(columns={"label": [float(label)]})


def attribute_row(row: dict[str, Any]) -> Row:
    """Return one or several responses with a column for each of ATTRIBUTES, NaN for missing ones.

    ValueError names the missing key or the unknown attribute.
    """
    if row.get("responses") is None:
        unrated = sft_row(row)
        attributes = [row.get("attributes")]
    else:
        unrated = _several_responses(row)
        attributes = row.get("attributes")
        n = len(unrated.responses)
        if attributes is None or isinstance(attributes, dict):
            attributes = [attributes] * n
        if not isinstance(attributes, list) or len(attributes) != n:
            raise ValueError(
                f"`attributes` must be a list of {n} objects, one for each of `responses`"
            )
    ratings = [row if given is None else given for given in attributes]  # None: keys of the row
    for rating in ratings:
        if not isinstance(rating, dict):
            raise ValueError(f"`attributes` must be an object of numbers, got {_show(rating)}")
        if rating is not row:
            known_attributes(rating)
    columns = {name: [_number(rating, (name,)) for rating in ratings] for name in ATTRIBUTES}
    return unrated._replace(columns=columns)


def _several_responses(row: dict[str, Any]) -> Row:
    """Return the prompt and the list `responses` of a row."""
    responses = row["responses"]
    if not isinstance(responses, list) or not responses:
        raise ValueError(
            f"`responses` must be a list of answers and not empty, got {_show(responses)}"
        )
    if row.get("prompt") is None:
        raise ValueError(f"`responses` but no `prompt`; this row has {_keys(row)}")
    prompt = _ends_before_answer(_content(row, "prompt"))
    return Row(prompt, [_content({"responses": r}, "responses") for r in responses], {})


def weight_row(row: dict[str, Any]) -> Row:
    """Return several responses to a prompt with a number for each (column `weight`)."""
    unweighted = attribute_row({**row, "attributes": {}})
    weights = row.get("weights")
    if not isinstance(weights, list) or len(weights) != len(unweighted.responses):
        raise ValueError("`weights` must be a list of numbers, one for each of `responses`")
    numbers = [_number({"weights": weight}, ("weights",)) for weight in weights]
    return unweighted._replace(columns={"weight": numbers})


def answers_of(
    row: dict[str, Any], plain: bool = False
) -> tuple[str | Messages, list[str | Messages]]:
    """Return (prompt, responses) of a row of any kind: one response, several, or a comparison.

    Of a conversation, the last assistant turn is the response. ValueError as above.
    """
    if row.get("chosen") is not None or row.get("chosen_response") is not None:
        parsed = preference_row(row, plain)
    else:
        parsed = attribute_row({**row, "attributes": {}})
    if parsed.prompt is not None:
        return parsed.prompt, parsed.responses
    *before, last = cast(Messages, parsed.responses[0])
    if not before:
        raise ValueError("the conversation has nothing before the assistant's turn")
    answer = [last] if last.keys() & set(SPOKEN) else last["content"]
    return _ends_before_answer(before), [answer]


def prompt_of(row: dict[str, Any], plain: bool = False) -> str | Messages:
    """Return the prompt of a row of any kind, with or without an answer.

    ValueError names the keys that a row needs.
    """
    for key in ("prompt", "input"):
        if row.get(key) is not None:
            return _ends_before_answer(_content(row, key))
    keys = ("messages", "conversations", "chosen", "chosen_response")
    if all(row.get(key) is None for key in keys):
        raise ValueError(f"no `prompt` (nor `input` or `messages`); this row has {_keys(row)}")
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages")
        if messages[-1]["role"] == "assistant":
            messages.pop()
        return _ends_before_answer(messages)
    return answers_of(row, plain)[0]


def known_attributes(names: Iterable[str], known: Iterable[str] = ATTRIBUTES) -> None:
    """Check attribute names. ValueError: one is unknown; the message lists the known ones."""
    for name in names:
        if name not in known:
            raise ValueError(f"attribute {_show(name)} is not known: use {', '.join(known)}")


def _split(
    prompt: str | Messages | None, bodies: dict[str, Messages]
) -> tuple[str | Messages, list[str | Messages]]:
    """Split message lists that hold the answer alone, or repeat the prompt, into (prompt, answers).

    Every answer begins with an assistant turn.
    """
    for key, messages in bodies.items():
        if messages[-1]["role"] != "assistant":
            raise ValueError(
                f"`{key}` ends with a {messages[-1]['role']} turn: it must end with the assistant's"
            )
    lists = list(bodies.values())
    names = " and ".join(f"`{key}`" for key in bodies)
    if isinstance(prompt, list):
        n = len(prompt)
        if all(m[:n] == prompt and len(m) > n for m in lists):
            lists = [m[n:] for m in lists]
        return prompt, [_starts_with_answer(m, names) for m in lists]
    if prompt is not None and all(m[0]["role"] == "assistant" for m in lists):
        return prompt, list(lists)
    # The lists contain the prompt, and a `prompt` string is only informative (UltraFeedback). The
    # border lies before the last assistant turn up to which all lists agree, message by message.
    for k in range(min(map(len, lists)) - 1, 0, -1):
        if all(m[:k] == lists[0][:k] and m[k]["role"] == "assistant" for m in lists):
            return lists[0][:k], [m[k:] for m in lists]
    raise ValueError(
        f"{names} share no prompt: start them with the same messages or give `prompt` as messages"
    )


def _transcripts(
    chosen: str, rejected: str, plain: bool
) -> tuple[str | Messages, list[str | Messages]]:
    """Split two HH transcripts into (prompt, responses).

    The border lies after the last "Assistant:" up to which they are identical. By turns, not by
    characters: the longest common prefix may end inside a word of the answer.
    """
    turns = list(TURN.finditer(chosen))
    border = None
    for k, turn in enumerate(turns):
        if turn[1] == "Assistant" and rejected.startswith(chosen[: turn.end()]):
            border = k
    if border is None:
        raise ValueError(
            "no `prompt`, and `chosen` and `rejected` share no '\\n\\nAssistant:' turn: "
            "add a `prompt`"
        )
    end = turns[border].end()
    conversations = [_turns(chosen), _turns(rejected)]
    if any(messages[-1]["role"] != "assistant" for messages in conversations):
        raise ValueError("a transcript ends with a Human turn: it must end with the Assistant's")
    if plain:
        return chosen[:end], [chosen[end:], rejected[end:]]
    return conversations[0][:border], [messages[border:] for messages in conversations]


def _turns(text: str) -> Messages:
    """Turn a transcript "Human: ... Assistant: ..." into messages without surrounding space."""
    before, *parts = TURN.split(
        text
    )  # before the first turn; then role, content, role, content, ...
    if before.strip():
        raise ValueError('a transcript must begin with "\\n\\nHuman:" or "\\n\\nAssistant:"')
    return [
        {"role": ROLES[role.lower()], "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2])
    ]


def _conversation(row: dict[str, Any], key: str) -> Messages:
    """Return a conversation up to its last assistant turn: nothing after it carries a loss."""
    messages = _messages(row[key], key)
    answers = [
        k
        for k, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("learn", True)
    ]
    if not answers:
        raise ValueError(f"`{key}` has no assistant turn to train on")
    return messages[: answers[-1] + 1]


def _content(row: dict[str, Any], key: str) -> str | Messages:
    return _messages(row[key], key) if isinstance(row[key], list) else _text(row[key], key)


def _messages(value: Any, key: str) -> Messages:
    """Return checked messages {role, content}, from {role, content} or {from, value}."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{key}` must be a list of messages and not empty, got {_show(value)}")
    messages = []
    for k, message in enumerate(value):
        where = f"{key}[{k}]"
        if not isinstance(message, dict):
            raise ValueError(f"`{where}` must be a message {{role, content}}, got {_show(message)}")
        keys = ("role", "content")
        if "from" in message and "role" not in message:
            keys = ("from", "value")
        role_key, text_key = keys
        role = message.get(role_key)
        known_role = ROLES.get(role.lower()) if isinstance(role, str) else None
        if known_role is None:
            raise ValueError(
                f"`{where}.{role_key}` is {_show(role)}: must be system, user, assistant, tool or "
                "developer"
            )
        content = _text(message.get(text_key), f"{where}.{text_key}")
        more = {name: message[name] for name in SPOKEN if name in message}
        unlearned = {} if message.get("learn", True) else {"learn": False}
        messages.append({"role": known_role, "content": content, **more, **unlearned})
    return messages


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"`{key}` must be text, got {_show(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"`{key}` holds half of a surrogate pair, which is no character: fix the escape"
        ) from None
    return value


def _number(row: dict[str, Any], names: tuple[str, ...]) -> float:
    """Return the first of the named numbers that the row has, or NaN."""
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not abs(value) < FLOAT32_MAX:
            raise ValueError(f"`{name}` must be a finite number, got {_show(value)}")
        return float(value)
    return math.nan


def _starts_with_answer(messages: Messages, names: str) -> Messages:
    if messages[0]["role"] != "assistant":
        raise ValueError(
            f"{names} must begin with an assistant turn, or with all messages of `prompt`"
        )
    return messages


def _ends_before_answer(prompt: str | Messages) -> str | Messages:
    if isinstance(prompt, list) and (not prompt or prompt[-1]["role"] == "assistant"):
        raise ValueError(
            "the prompt ends with an assistant turn: it must end with the turn to answer"
        )
    return prompt


def _one_of(row: dict[str, Any], names: tuple[str, str]) -> str:
    for name in names:
        if row.get(name) is not None:
            return name
    raise ValueError(
        f"no `{names[0]}` (nor `{names[1]}`): a preference row needs `prompt`, `chosen` and "
        f"`rejected`; this one has {_keys(row)}"
    )


def _missing(row: dict[str, Any], pairs: tuple[tuple[str, str], ...]) -> str:
    """Return the reason why a row has no pair: one key is missing, or both."""
    for pair in pairs:
        for present, absent in (pair, pair[::-1]):
            if row.get(present) is not None:
                return f"`{present}` but no `{absent}`"
    return "nothing to train on"


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(map(_show, list(row)[:8])) or "no keys"


def _show(value: Any) -> str:
    """Return a value for an error message: short, in ASCII, so that every terminal prints it."""
    if isinstance(value, (list, dict)) and value:
        return "a list" if isinstance(value, list) else "an object"
    shown = ascii(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
