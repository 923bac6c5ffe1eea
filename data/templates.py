"""Prompts, answers and conversations to token ids: plain text, a folder's own chat template, or a built-in one.

Whatever the template, a prompt's ids are a prefix of the ids of prompt + response. Where the tokenizer merges across
the border, the border moves back to the longest common prefix, and every token after it belongs to the response.

Special tokens written inside a message are recognised as such, as in Hugging Face's apply_chat_template.
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

NAMES = ("auto", "plain", "chatml", "zephyr", "llama2", "llama3")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}END\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (  # the system message lies inside the first user turn; every user turn opens with bos
    "{% for m in messages %}{% set last = loop.previtem.role if loop.previtem is defined else '' %}"
    "{% if m.role == last or m.role == 'system' and last %}"
    "{{ raise_exception('llama2 takes one system message first, then user and assistant in turn') }}"
    "{% elif m.role == 'user' %}{{ bos_token }}[INST] "
    "{% set system = '<<SYS>>\n' + loop.previtem.content + '\n<</SYS>>\n\n' if last == 'system' else '' %}"
    "{{ (system + m.content) | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


class Template:
    """How messages become text and ids.

    name      auto (the folder's own chat template, or plain where it has none), plain, chatml, zephyr, llama2, llama3.
              plain is exactly: bos, prompt, response, eos. ValueError if the tokenizer lacks a token that it needs.
    plain     True for plain
    source    the jinja text of the others; written to a folder as chat_template.jinja, it makes transformers agree
    stop_ids  ids that end an answer: eos, generation_config.json's, and the template's end of turn
    hash      hex digest of template and tokenizer
    """

    def __init__(self, name: str, tokenizer: Tokenizer):
        if name not in NAMES:
            raise ValueError(f"unknown template {name!r}: choose one of {', '.join(NAMES)}")
        folder = tokenizer.chat_template if name == "auto" else None
        self.tokenizer = tokenizer
        self.plain = name == "plain" or name == "auto" and folder is None
        self.name = "plain" if self.plain else name
        # chatml without markers in the vocabulary: they are plain text, and turns end with eos, a single token.
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
            _compile(self.source)
        self.hash = hashlib.sha256(json.dumps([self.source, tokenizer.hash]).encode()).hexdigest()
        self.stop_ids = tokenizer.stops | self._end_of_turn()

    def render(self, messages: Messages, generation: bool) -> str:
        """The text of messages; generation=True ends it where the assistant is to speak. ValueError if it cannot be."""
        if self.plain:
            raise ValueError("plain has no text for messages: choose --template chatml")
        _check_messages(messages)
        tokens = {"bos_token": self.tokenizer.bos_token, "eos_token": self.tokenizer.eos_token}
        try:
            return _compile(self.source).render(
                messages=messages,
                add_generation_prompt=generation,
                tools=None,
                documents=None,
                **tokens,
            )
        except (
            Exception
        ) as error:  # a template is a foreign program: whatever it trips over is this row's error
            raise ValueError(f"the chat template refuses this row: {error}") from error

    def pair(
        self, prompt: str | Messages, responses: list[str | Messages]
    ) -> tuple[list[int], list[tuple], bool]:
        """A prompt and its responses -> (prompt_ids, [(response_ids, scored), ...], moved).

        prompt     text, or messages that end before the answer
        responses  texts or messages, usually one assistant message each
        scored     0/1 a token: 1 on assistant tokens, end of turn included
        moved      True where the tokenizer merged across the border, so that the prompt is shorter than its own ids
        ValueError(reason) for a row that cannot be used.
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
                        "a response must begin and end with an assistant message: mend the row"
                    )
                wholes.append(self._turns(before + after, len(before)))
        border = _common(head, *(ids for ids, _ in wholes))
        _check_border(border)
        answers = []
        for ids, spans in wholes:
            (_, first_end), *rest = (
                spans  # a moved border belongs to the first answer: it is what must be predicted
            )
            scored = _mask(len(ids), [(border, first_end), *rest])
            answers.append((ids[border:], scored[border:]))
        return head[:border], answers, border < len(head)

    def prompt(self, prompt: str | Messages) -> list[int]:
        """The ids of a prompt that waits for its answer, (text, or messages that end before it). ValueError(reason)."""
        if self.plain:
            bos = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
            ids = bos + self.tokenizer.encode(_single(prompt, "user"))
        else:
            ids = self.tokenizer.encode(self.render(_messages(prompt, "user"), True))
        _check_border(len(ids))
        return ids

    def conversation(self, messages: Messages) -> tuple[list[int], tuple[list[int], list[int]]]:
        """A conversation -> (prompt_ids, (response_ids, scored)): scored is 1 on every assistant turn, its end of turn
        included; the prompt is all before the first. Messages after the last assistant turn are left out."""
        _check_messages(messages)
        turns = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
        if not turns:
            raise ValueError("no assistant message: nothing to learn from")
        if self.plain:
            prompt, answers, _ = self.pair(
                messages[: turns[0]], [messages[turns[0] : turns[-1] + 1]]
            )
            return prompt, answers[0]
        ids, spans = self._turns(messages[: turns[-1] + 1], 0)
        border = spans[0][0]
        _check_border(border)
        return ids[:border], (ids[border:], _mask(len(ids), spans)[border:])

    def _plain(
        self, prompt: str | Messages, responses: list[str | Messages]
    ) -> tuple[list[int], list[tuple]]:
        """The prompt's own ids, and of each response (ids of the whole, spans of its answers)."""
        bos = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        prompt = _single(prompt, "user")
        head, wholes = bos + self.tokenizer.encode(prompt), []
        for response in responses:
            response = _single(response, "assistant")
            if not response.strip():
                raise ValueError("empty response")
            ids = bos + self.tokenizer.encode(prompt + response) + [self.tokenizer.eos]
            wholes.append((ids, [(0, len(ids))]))
        return head, wholes

    def _turns(self, messages: Messages, first: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a rendered conversation and (start, end) of each assistant turn among messages[first:]."""
        text = self.render(messages, False).rstrip()
        ids = self.tokenizer.encode(text)

        def shared(k: int, generation: bool) -> int:
            part = self.render(messages[:k], generation)
            if not text.startswith(part.rstrip()):
                raise ValueError(
                    f"the chat template rewrites earlier turns (its text for the first {k} messages does not begin its "
                    f"text for all {len(messages)}), so answers cannot be told apart in it: choose --template chatml"
                )
            return _common(self.tokenizer.encode(part if generation else part.rstrip()), ids)

        spans = []
        for k in range(first, len(messages)):
            if messages[k]["role"] == "assistant":
                if not messages[k]["content"].strip():
                    raise ValueError("empty response")
                end = len(ids) if k == len(messages) - 1 else shared(k + 1, False)
                spans.append((shared(k, True), end))
        return ids, spans

    def _check_tokens(self) -> None:
        special = {"llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")}.get(
            self.name, ()
        )
        missing = [text for text in special if text not in self.tokenizer.special]
        if self.tokenizer.eos is None and self.name != "llama3":
            missing.append("an eos_token")
        if self.tokenizer.bos is None and self.name in ("llama2", "llama3"):
            missing.append("a bos_token")
        if missing:
            raise ValueError(
                f"template {self.name} needs special tokens that this tokenizer lacks ({', '.join(missing)}): choose "
                "another --template, or name them in tokenizer_config.json"
            )

    def _end_of_turn(self) -> set[int]:
        """The special token that closes an answer, as a set that is empty where there is none."""
        if self.plain:
            return set()
        try:
            text = self.render(
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], False
            )
        except ValueError:  # a template may want more than this; its rows will say so
            return set()
        return set(self.tokenizer.encode(text.rstrip())[-1:]) & set(self.tokenizer.special.values())


@functools.lru_cache
def _compile(source: str) -> jinja2.Template:
    """A chat template in jinja's sandbox, with what transformers offers to templates and nothing else."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = _tojson  # jinja's own escapes < and > for HTML
    env.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    # {% generation %} only marks what the assistant says; here that is found from the text.
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


def _common(*lists: list[int]) -> int:
    """Length of the longest prefix that all share."""
    for i, tokens in enumerate(zip(*lists)):
        if len(set(tokens)) > 1:
            return i
    return min(map(len, lists))


def _mask(length: int, spans: list[tuple[int, int]]) -> list[int]:
    mask = [0] * length
    for start, end in spans:
        mask[start:end] = [1] * (end - start)
    return mask


def _messages(text: str | Messages, role: str) -> Messages:
    messages = [{"role": role, "content": text}] if isinstance(text, str) else text
    _check_messages(messages)
    return messages


def _single(text: str | Messages, role: str) -> str:
    """The text that plain takes: a string, or the only message of that role."""
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
    for m in messages if isinstance(messages, list) else [None]:
        if (
            not isinstance(m, dict)
            or not isinstance(m.get("role"), str)
            or not isinstance(m.get("content"), str)
        ):
            raise ValueError(
                'messages must be a list of {"role": "...", "content": "..."} with text in both'
            )


def _check_border(border: int) -> None:
    if border < 1:
        raise ValueError(
            "the prompt has no token of its own, but its last one predicts the response's first: give it "
            "some text, or the tokenizer a bos_token"
        )
