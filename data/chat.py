"""Messages of a conversation, and what their chat template takes besides."""

from typing import Any

# [{"role": "user", "content": "..."}, ...]; "learn": False on a turn that carries no loss. Keys of
# SPOKEN stand beside the content where the sender has them.
Messages = list[dict[str, Any]]
SPOKEN = ("reasoning_content", "tool_calls", "tool_call_id", "name")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}


class Chat(list):
    """A list of messages with what their chat template takes besides: {"tools": [...], ...}."""

    def __init__(self, messages: Messages, options: dict[str, Any]):
        super().__init__(messages)
        self.options = options


def as_chat(prompt: str | Messages, options: dict[str, Any]) -> str | Messages:
    """Return a prompt that brings options for the chat template, if there are any."""
    if not options:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return Chat(messages, options)


def options_of(chat: Any) -> dict[str, Any]:
    """Return what the template of a chat takes besides its messages: tools, enable_thinking, ..."""
    return chat.options if isinstance(chat, Chat) else {}


def check_messages(messages: Messages) -> None:
    """Check that every message has a role and a text. ValueError: one has not."""

    def is_message(m: object) -> bool:
        if not isinstance(m, dict):
            return False
        return isinstance(m.get("role"), str) and isinstance(m.get("content"), str)

    if not isinstance(messages, list) or not all(map(is_message, messages)):
        raise ValueError(
            'messages must be a list of {"role": "...", "content": "..."} with text in both'
        )


def as_row(prompt: str | Messages) -> dict[str, Any]:
    """Return the keys of a row that hold a prompt and what its chat template takes besides."""
    options = dict(options_of(prompt))
    row: dict[str, Any] = {"prompt": prompt}
    if "tools" in options:
        row["tools"] = options.pop("tools")
    if options:
        row["chat_template_kwargs"] = options
    return row
