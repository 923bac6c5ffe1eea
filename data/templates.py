"""Chat templates: prompts, answers and conversations to token ids.

Plain text, a folder's own chat template, or a built-in one. With each, a prompt's ids are a prefix
of the ids of prompt + response. Where the tokenizer merges across the border between the two, the
border moves back to the longest common prefix, and every token after it belongs to the response.

Special tokens written inside a message become special ids, as in transformers' apply_chat_template.
"""

import functools
import hashlib
import json
import re
from datetime import datetime

import jinja2
import jinja2.sandbox

from data.tokenizer import Tokenizer

Messages = list[dict[str, str]]  # [{"role": "user", "content": "..."}, ...]

Span = tuple[int, int]  # start and end of an answer among the ids

NAMES = ("auto", "plain", "chatml", "zephyr", "llama2", "llama3")
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}END\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (  # the system message is part of the first user turn; every user turn starts with bos
    "{% for m in messages %}"
    "{% set last = loop.previtem.role if loop.previtem is defined else '' %}"
    "{% if m.role == last or m.role == 'system' and last %}"
    "{{ raise_exception('llama2 takes one system message first, "
    "then user and assistant in turn') }}"
    "{% elif m.role == 'user' %}{{ bos_token }}[INST] "
    "{% set system = '<<SYS>>\n' + loop.previtem.content + '\n<</SYS>>\n\n' "
    "if last == 'system' else '' %}"
    "{{ (system + m.content) | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


class Template:
    """A chat template: turns prompts, answers and conversations into text and ids.

    name      one of NAMES. auto: the folder's own chat template, or plain if it has none;
              plain: exactly bos, prompt, response, eos
    plain     True for plain
    source    jinja text of the others; saved as chat_template.jinja for transformers
    stop_ids  ids that end an answer: eos, those of generation_config.json, the end of turn
    end       id that ends an answer in this template: its end of turn, else eos
    hash      hex digest of template and tokenizer
    fingerprint  hex digest of what decides the ids of a row: rows with sampled ids carry it

    ValueError: the tokenizer lacks a token that the template needs.
    """

    def __init__(self, name: str, tokenizer: Tokenizer):
        if name not in NAMES:
            raise ValueError(f"unknown template {name!r}: choose one of {', '.join(NAMES)}")
        folder = tokenizer.chat_template if name == "auto" else None
        self.tokenizer = tokenizer
        self.plain = name == "plain" or (name == "auto" and folder is None)
        self.name = "plain" if self.plain else name
        # Without its markers in the vocabulary, chatml ends turns with eos, a single token.
        end = "<|im_end|>" if "<|im_end|>" in tokenizer.special else "{{ eos_token }}"
        built_in = {
            "chatml": CHATML.replace("END", end),
            "zephyr": ZEPHYR,
            "llama2": LLAMA2,
            "llama3": LLAMA3,
        }
        self.source = None if self.plain else folder or built_in[name]
        if self.name != "auto":
            self._check_tokens()
        if self.source is not None:
            _compile(self.source)  # report errors in the template now
        self.hash = hashlib.sha256(json.dumps([self.source, tokenizer.hash]).encode()).hexdigest()
        # The same for one template on one set of ids, wherever the folder keeps the template.
        ids = json.dumps([self.source, tokenizer.ids_hash])
        self.fingerprint = hashlib.sha256(ids.encode()).hexdigest()[:32]
        end_of_turn = self._end_of_turn()
        self.stop_ids = tokenizer.stops | end_of_turn
        self.end = next(iter(end_of_turn), tokenizer.eos)

    def render(self, messages: Messages, generation: bool) -> str:
        """Return the text of messages; generation=True ends it where the assistant's turn begins.

        ValueError: the template does not accept the messages.
        """
        if self.plain:
            raise ValueError("plain has no text for messages: choose --template chatml")
        _check_messages(messages)
        try:
            return _compile(self.source).render(
                messages=messages,
                add_generation_prompt=generation,
                tools=None,
                documents=None,
                bos_token=self.tokenizer.bos_token,
                eos_token=self.tokenizer.eos_token,
            )
        except Exception as error:  # a template is a program of others: any failure is the row's
            raise ValueError(f"the chat template refuses this row: {error}") from error

    def pair(
        self, prompt: str | Messages, responses: list[str | Messages]
    ) -> tuple[list[int], list[tuple[list[int], list[int]]], bool]:
        """Encode a prompt and its responses: (prompt_ids, [(response_ids, scored), ...], moved).

        prompt     text, or messages that end before the answer
        responses  texts or messages, usually one assistant message each
        scored     0/1 a token: 1 on assistant tokens, end of turn included
        moved      True where the tokenizer merged across the border, which leaves fewer prompt ids
                   than the prompt has alone

        "the hap" with ["py.", " cat"], where the tokenizer knows "happy" and "hap": the prompt is
        [bos the], the responses [happy . eos] and [hap cat eos], moved is True.

        ValueError(reason): the row is unusable.
        """
        if self.plain:
            head, wholes = self._plain(prompt, responses)
        else:
            before = _messages(prompt, "user")
            head = self.prompt(before)
            wholes = []
            for response in responses:
                after = _messages(response, "assistant")
                if not after or {after[0]["role"], after[-1]["role"]} != {"assistant"}:
                    raise ValueError(
                        "a response must begin and end with an assistant message: fix the row"
                    )
                wholes.append(self._turns(before + after, len(before)))
        border = _common_prefix(head, *(ids for ids, _ in wholes))
        _check_border(border)
        answers = []
        for ids, spans in wholes:
            (_, first_end), *rest = spans
            # From the border on, even where it moved: the tokens behind it must be predicted.
            scored = _mask(len(ids), [(border, first_end), *rest])
            answers.append((ids[border:], scored[border:]))
        return head[:border], answers, border < len(head)

    def prompt(self, prompt: str | Messages) -> list[int]:
        """Encode a prompt, text or messages that end before the answer. ValueError(reason)."""
        if self.plain:
            ids = self._bos() + self.tokenizer.encode(_single(prompt, "user"))
        else:
            ids = self.tokenizer.encode(self.render(_messages(prompt, "user"), True))
        _check_border(len(ids))
        return ids

    def conversation(self, messages: Messages) -> tuple[list[int], tuple[list[int], list[int]]]:
        """Encode a conversation: (prompt_ids, (response_ids, scored)).

        The prompt is everything before the first assistant turn; scored is 1 on every assistant
        turn, end of turn included. Messages after the last one are left out.
        """
        _check_messages(messages)
        turns = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
        if not turns:
            raise ValueError("no assistant message: nothing to train on")
        messages = messages[: turns[-1] + 1]
        if self.plain:
            prompt, answers, _ = self.pair(messages[: turns[0]], [messages[turns[0] :]])
            return prompt, answers[0]
        ids, spans = self._turns(messages, 0)
        border = spans[0][0]
        _check_border(border)
        return ids[:border], (ids[border:], _mask(len(ids), spans)[border:])

    def _bos(self) -> list[int]:
        return [] if self.tokenizer.bos is None else [self.tokenizer.bos]

    def _plain(
        self, prompt: str | Messages, responses: list[str | Messages]
    ) -> tuple[list[int], list[tuple[list[int], list[Span]]]]:
        """Return the ids of the prompt alone, and (ids, answer spans) of prompt + each response."""
        prompt = _single(prompt, "user")
        wholes = []
        for response in responses:
            response = _single(response, "assistant")
            if not response.strip():
                raise ValueError("empty response")
            ids = self._bos() + self.tokenizer.encode(prompt + response) + [self.tokenizer.eos]
            wholes.append((ids, [(0, len(ids))]))
        return self._bos() + self.tokenizer.encode(prompt), wholes

    def _turns(self, messages: Messages, first: int) -> tuple[list[int], list[Span]]:
        """Return the ids of a conversation and the spans of assistant turns in messages[first:]."""
        text = self.render(messages, False).rstrip()
        ids = self.tokenizer.encode(text)

        def shared(k: int, generation: bool) -> int:
            """Return how many ids the first k messages share with the whole."""
            part = self.render(messages[:k], generation)
            if not text.startswith(part.rstrip()):
                raise ValueError(
                    f"the chat template rewrites earlier turns (its text for {k} messages is no "
                    f"prefix of its text for all {len(messages)}), so answers cannot be located: "
                    "choose --template chatml"
                )
            part_ids = self.tokenizer.encode(part if generation else part.rstrip())
            return _common_prefix(part_ids, ids)

        spans = []
        for k in range(first, len(messages)):
            if messages[k]["role"] == "assistant" and messages[k].get("learn", True):
                if not messages[k]["content"].strip():
                    raise ValueError("empty response")
                end = len(ids) if k == len(messages) - 1 else shared(k + 1, False)
                spans.append((shared(k, True), end))
        return ids, spans

    def _check_tokens(self) -> None:
        """Check the special tokens of a built-in template. ValueError names the missing ones."""
        special = LLAMA3_TOKENS if self.name == "llama3" else ()
        missing = [text for text in special if text not in self.tokenizer.special]
        if self.tokenizer.eos is None and self.name != "llama3":
            missing.append("an eos_token")
        if self.tokenizer.bos is None and self.name in ("llama2", "llama3"):
            missing.append("a bos_token")
        if missing:
            raise ValueError(
                f"template {self.name} needs special tokens that this tokenizer lacks "
                f"({', '.join(missing)}): choose another --template, or name them in "
                "tokenizer_config.json"
            )

    def _end_of_turn(self) -> set[int]:
        """Return the special token that ends an answer, in a set: empty if there is none."""
        if self.plain:
            return set()
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            text = self.render(turns, False)
        except ValueError:  # a template may need other turns; the rows will show
            return set()
        last = self.tokenizer.encode(text.rstrip())[-1:]
        return set(last) & set(self.tokenizer.special.values())


@functools.lru_cache
def _compile(source: str) -> jinja2.Template:
    """Compile a chat template in jinja's sandbox, with the functions that transformers provides."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = _tojson  # jinja's own escapes < and > for HTML
    env.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    # {% generation %} only marks the assistant's text, which is located here by prefixes instead.
    source = re.sub(r"{%(-?)\s*generation\s*(-?)%}", r"{%\1 if true \2%}", source)
    source = re.sub(r"{%(-?)\s*endgeneration\s*(-?)%}", r"{%\1 endif \2%}", source)
    try:
        return env.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(
            f"the folder's chat template cannot be parsed ({error}): choose --template chatml"
        ) from error


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _common_prefix(*lists: list[int]) -> int:
    """Return the length of the longest prefix that all lists share."""
    for i, tokens in enumerate(zip(*lists)):
        if len(set(tokens)) > 1:
            return i
    return min(map(len, lists))


def _mask(length: int, spans: list[Span]) -> list[int]:
    """Return 1 inside the spans and 0 elsewhere; _mask(5, [(1, 3)]) is [0, 1, 1, 0, 0]."""
    mask = [0] * length
    for start, end in spans:
        mask[start:end] = [1] * (end - start)
    return mask


def _messages(text: str | Messages, role: str) -> Messages:
    messages = [{"role": role, "content": text}] if isinstance(text, str) else text
    _check_messages(messages)
    return messages


def _single(text: str | Messages, role: str) -> str:
    """Return the text for plain: a string, or the content of a single message of that role."""
    if isinstance(text, str):
        return text
    _check_messages(text)
    if [m["role"] for m in text] != [role]:
        raise ValueError(
            "plain takes one prompt and one response, not several turns or a system message: "
            "choose --template chatml"
        )
    return text[0]["content"]


def _check_messages(messages: Messages) -> None:
    def is_message(m: object) -> bool:
        if not isinstance(m, dict):
            return False
        return isinstance(m.get("role"), str) and isinstance(m.get("content"), str)

    if not isinstance(messages, list) or not all(map(is_message, messages)):
        raise ValueError(
            'messages must be a list of {"role": "...", "content": "..."} with text in both'
        )


def _check_border(border: int) -> None:
    if border < 1:
        raise ValueError(
            "the prompt has no token, but its last one predicts the response's first: give it some "
            "text, or the tokenizer a bos_token"
        )
