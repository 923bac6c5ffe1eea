"""Find what a chat template has left out of a row: its rendering must hold every text.

White space is not compared, because templates trim texts and put line ends between them.
"""

import json
from collections.abc import Collection, Iterator
from typing import Any

Messages = list[dict[str, Any]]

THINK = "</think>"  # ends the reasoning in an answer


def left_out(text: str, messages: Messages, learned: Collection[int], tools: Any = None) -> str:
    """Return words for the first thing of a row that its rendering lacks, "" if it has all.

    learned: numbers of the messages that are learned. Earlier answers may lose their reasoning, as
    templates of reasoning models drop it when they serve a conversation.
    """
    whole = _squash(text)
    at = 0
    for k, message in enumerate(messages):
        start = at
        for what, forms in _parts(message, k in learned):
            squashed = [_squash(form) for form in forms]
            if not all(squashed):
                continue
            # A system message may be moved, and calls may stand in any order.
            ordered = what in ("text", "reasoning") and message["role"] not in _MOVABLE
            places = [whole.find(form, start if ordered else 0) for form in squashed]
            if max(places) < 0:
                return f"the {what} of message {k + 1} ({message['role']})"
            if ordered:
                place, form = min((p, f) for p, f in zip(places, squashed) if p >= 0)
                at = max(at, place + len(form))
    for tool in tools or []:
        if _squash(tool["function"]["name"]) not in whole:
            return f"the tool {tool['function']['name']}"
    return ""


_MOVABLE = ("system", "developer")


def _parts(message: dict[str, Any], whole: bool) -> Iterator[tuple[str, list[str]]]:
    """Yield (what it is, the forms that it may take in a rendering) of what a message says."""
    content = message["content"]
    if message["role"] == "assistant" and not whole:
        content = content.rpartition(THINK)[2]
    yield "text", [content, json.dumps(content, ensure_ascii=False)]
    if whole and message.get("reasoning_content"):
        yield "reasoning", [message["reasoning_content"]]
    for call in message.get("tool_calls", ()):
        function = call["function"]
        yield "tool call", [function["name"]]
        for value in _leaves(function.get("arguments")):
            yield "tool call", value


def _leaves(value: Any) -> Iterator[list[str]]:
    """Yield the forms of every key, text and number in the arguments of a call."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield [str(key), json.dumps(str(key))]
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif value is not None:
        texts = {str(value), json.dumps(value), json.dumps(value, ensure_ascii=False)}
        inner = {json.dumps(text, ensure_ascii=False)[1:-1] for text in texts}
        yield sorted(texts | inner, key=len)


def _squash(text: str) -> str:
    """Return a text without white space."""
    return "".join(text.split())
