"""Chat templates: prompts, answers and conversations to token ids.

Plain text, a folder's own chat template, or a built-in one. With each, a prompt's ids are a prefix
of the ids of prompt + response. Where the tokenizer merges across the border between the two, the
border moves back to the longest common prefix, and every token after it belongs to the response.

Special tokens written inside a message become special ids, as in transformers' apply_chat_template.

What was rendered is what the row says: a template that leaves a text out is found (data/said.py),
and every learned answer ends with a token at which sampling stops.
"""

import hashlib
import json
import re
from typing import Any

from data.chat import Chat, Messages, check_messages, options_of
from data.jinja import BUILT_IN, compile_template, render, variables
from data.said import THINK, left_out
from data.tokenizer import Tokenizer

Span = tuple[int, int]  # start and end of an answer among the ids
Tree = tuple[
    list[int], tuple[list[int], list[int]]
]  # ids of the prompt, (ids, scored) of an answer

# A conversation that shows what a template writes around an answer.
PROBE = (("user", "Where is it?"), ("assistant", "It is there."), ("user", "And now?"))
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


class Template:
    """A chat template: turns prompts, answers and conversations into text and ids.

    name      auto, plain or one of BUILT_IN. auto: the folder's own chat template, or plain if it
              has none; plain: exactly bos, prompt, response, eos
    plain     True for plain
    kwargs    values for the template, such as {"enable_thinking": False}; a row's come first
    source    jinja text of the others; saved as chat_template.jinja for transformers
    stop_ids  ids that end an answer: eos, those of generation_config.json, the end of turn
    end       id that ends an answer in this template: its end of turn, else eos
    tail      ids that the template writes behind the end of a last answer, such as a line end
    hash      hex digest of template and tokenizer
    fingerprint  hex digest of what decides the ids of a row: rows with sampled ids carry it

    ValueError: the tokenizer lacks a token that the template needs, or it never reads a value.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, kwargs: dict[str, Any] | None = None):
        names = ("auto", "plain", *BUILT_IN)
        if name not in names:
            raise ValueError(f"unknown template {name!r}: choose one of {', '.join(names)}")
        folder = tokenizer.chat_template if name == "auto" else None
        self.tokenizer = tokenizer
        self.kwargs = dict(kwargs or {})
        self.plain = name == "plain" or (name == "auto" and folder is None)
        self.name = "plain" if self.plain else name
        self.source = None
        if not self.plain:
            self.source = BUILT_IN[name] if folder is None else folder
        if self.name == "chatml" and "<|im_end|>" not in tokenizer.special:
            # Without its markers in the vocabulary, turns end with eos, a single token.
            self.source = self.source.replace("<|im_end|>", "{{ eos_token }}")
        if self.name != "auto":
            self._check_tokens()
        self.reads: set[str] = set()
        if self.source is not None:
            compile_template(self.source)  # report errors in the template now
            self.reads = variables(self.source)
        self._check_read(self.kwargs)
        decides = [self.kwargs] if self.kwargs else []
        text = json.dumps([self.source, tokenizer.hash, *decides])
        self.hash = hashlib.sha256(text.encode()).hexdigest()
        # The same for one template on one set of ids, wherever the folder keeps the template.
        text = json.dumps([self.source, tokenizer.ids_hash, *decides])
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:32]
        marks = sorted(filter(str.strip, tokenizer.special), key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, marks)) or r"(?!)")
        # What the template writes after an answer, and what of it ends the answer here.
        self.closing, self.close = self._closing()
        self.tail = self._tail()
        end_of_turn = self._end_of_turn()
        self.stop_ids = tokenizer.stops | end_of_turn
        self.end = next(iter(end_of_turn), tokenizer.eos)

    def render(
        self, messages: Messages, generation: bool, options: dict[str, Any] | None = None
    ) -> str:
        """Return the text of messages; generation=True ends it where the assistant's turn begins.

        options: values for the template that come before `kwargs`, tools among them.
        ValueError: the template does not accept the messages, or never reads one of the options.
        """
        if self.plain:
            raise ValueError("plain has no text for messages: choose --template chatml")
        check_messages(messages)
        options = options or {}
        self._check_read(options)
        values = {"tools": None, "documents": None} | self.tokenizer.named | self.kwargs | options
        spoken = [{k: v for k, v in m.items() if k != "learn"} for m in messages]
        for message in spoken:
            if "reasoning_content" in message:  # templates know it by several names
                thought = message["reasoning_content"]
                message |= {"reasoning": thought, "thinking": thought}
        return render(
            self.source, values | {"messages": spoken, "add_generation_prompt": generation}
        )

    def pair(
        self, prompt: str | Messages, responses: list[str | Messages]
    ) -> tuple[list[int], list[tuple[list[int], list[int]]], bool]:
        """Encode a prompt and its responses: (prompt_ids, [(response_ids, scored), ...], moved).

        prompt     text, or messages that end before the answer; a Chat brings tools and options
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
            options = options_of(prompt)
            before = self._messages(prompt, "user")
            head = self.prompt(prompt)
            wholes = []
            for response in responses:
                after = self._messages(response, "assistant")
                if not after or {after[0]["role"], after[-1]["role"]} != {"assistant"}:
                    raise ValueError(
                        "a response must begin and end with an assistant message: fix the row"
                    )
                wholes.append(self._turns(before + after, len(before), options))
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
            ids = self._bos() + self.tokenizer.encode(self._single(prompt, "user"))
        else:
            options = options_of(prompt)
            messages = self._messages(prompt, "user")
            text = self.render(messages, True, options)
            if lost := left_out(text, messages, (), options.get("tools")):
                raise ValueError(_lost(lost))
            ids = self.tokenizer.encode(text)
        _check_border(len(ids))
        return ids

    def conversation(self, messages: Messages) -> list[Tree]:
        """Encode a conversation as trees (prompt_ids, (response_ids, scored)).

        Usually one: the prompt is everything before the first assistant turn, and scored is 1 on
        every assistant turn, end of turn included. Messages after the last one are left out.
        A template may write a turn in another way once others follow (Qwen3 drops its reasoning),
        or leave its end out: then every turn is a tree of its own, written as serving would.
        """
        check_messages(messages)
        options = options_of(messages)
        turns = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
        if not turns:
            raise ValueError("no assistant message: nothing to train on")
        messages = messages[: turns[-1] + 1]
        if self.plain:
            before = Chat(messages[: turns[0]], options)
            prompt, answers, _ = self.pair(before, [messages[turns[0] :]])
            return [(prompt, answers[0])]
        messages = self._messages(messages, "user")
        learned = [k for k in turns if messages[k].get("learn", True)]
        try:
            return [self._tree(messages, 0, options)]
        except _RewrittenError as error:
            if len(learned) == 1:
                raise ValueError(str(error)) from None
        trees = []
        for k in learned:
            earlier = [{**message, "learn": False} for message in messages[:k]]
            trees.append(self._tree([*earlier, messages[k]], k, options))
        return trees

    def marks(self, said: list[tuple[str, str]]) -> set[str]:
        """Return which of "own_ends" and "control" the (role, text) pairs of a row have.

        own_ends: a bos in front of the first or an end of turn behind an answer, not doubled.
        control: another special token within a text, which becomes that token.
        """
        marks = set()
        for k, (role, text) in enumerate(said):
            rest = self._unmarked(text, k == 0, role == "assistant")
            if rest != text:
                marks.add("own_ends")
            if any(match[0] in self.tokenizer.control for match in self._marks.finditer(rest)):
                marks.add("control")
        return marks

    def _tree(self, messages: Messages, first: int, options: dict[str, Any]) -> Tree:
        """Return one tree whose learned turns are the assistant's in messages[first:]."""
        ids, spans = self._turns(messages, first, options)
        border = spans[0][0]
        _check_border(border)
        return ids[:border], (ids[border:], _mask(len(ids), spans)[border:])

    def _bos(self) -> list[int]:
        return [] if self.tokenizer.bos is None else [self.tokenizer.bos]

    def _plain(
        self, prompt: str | Messages, responses: list[str | Messages]
    ) -> tuple[list[int], list[tuple[list[int], list[Span]]]]:
        """Return the ids of the prompt alone, and (ids, answer spans) of prompt + each response."""
        prompt = self._single(prompt, "user")
        wholes = []
        for response in responses:
            response = self._single(response, "assistant")
            if not response.strip():
                raise ValueError("empty response")
            ids = self._bos() + self.tokenizer.encode(prompt + response) + [self.tokenizer.eos]
            wholes.append((ids, [(0, len(ids))]))
        return self._bos() + self.tokenizer.encode(prompt), wholes

    def _turns(
        self, messages: Messages, first: int, options: dict[str, Any]
    ) -> tuple[list[int], list[Span]]:
        """Return the ids of a conversation and the spans of learned turns in messages[first:].

        _RewrittenError: one rendering cannot hold them all as serving would write them.
        """
        last = len(messages) - 1
        learned = [
            k
            for k in range(first, len(messages))
            if messages[k]["role"] == "assistant" and messages[k].get("learn", True)
        ]
        for k in learned:
            calls = messages[k].get("tool_calls")
            if not (messages[k]["content"].strip() or calls):
                raise ValueError("empty response")
        text = self._closed(messages, options)
        if lost := left_out(text, messages, learned, options.get("tools")):
            text = self._own_answer(messages, options, learned, lost)
        ids = self.tokenizer.encode(text)

        def shared(k: int, part: str) -> int:
            """Return how many ids the first k messages, as `part`, share with the whole."""
            if not text.startswith(part.rstrip()):
                raise _RewrittenError(
                    f"the chat template rewrites earlier turns (its text for {k} messages is no "
                    f"prefix of its text for all {len(messages)}), so answers cannot be located: "
                    "choose --template chatml"
                )
            return _common_prefix(self.tokenizer.encode(part), ids)

        spans = []
        for k in learned:
            head = self.render(messages[:k], True, options)
            if k < last or text.startswith(head.rstrip()):
                start = shared(k, head)
            else:  # the answer opens otherwise than the prompt asks for it
                before = self.render(messages[:k], False, options)
                shared(k, before.rstrip())
                start = _common_prefix(self.tokenizer.encode(head), ids)
            end = len(ids) if k == last else shared(k + 1, self._closed(messages[: k + 1], options))
            if self.stop_ids and ids[end - 1] not in self.stop_ids:
                raise _RewrittenError(
                    f"the chat template ends the answer of message {k + 1} without a token at "
                    "which sampling stops: choose --template chatml"
                )
            spans.append((start, end))
        return ids, spans

    def _closed(self, messages: Messages, options: dict[str, Any]) -> str:
        """Return the text of messages that end with an answer, up to the end of that answer."""
        text = self.render(messages, False, options).rstrip()
        if not self.close or messages[-1]["role"] != "assistant":
            return text
        if not self.closing:
            return text + self.close
        if text.endswith(self.closing):
            return text.removesuffix(self.closing) + self.close
        return text

    def _own_answer(
        self, messages: Messages, options: dict[str, Any], learned: list[int], lost: str
    ) -> str:
        """Return the prompt's text, the last answer as the row has it, and its end.

        For templates that cut the reasoning from every answer (R1's distillations), whose prompt
        may end in <think>. _RewrittenError: something else is left out.
        """
        *before, last = messages
        if learned != [len(before)] or THINK not in last["content"] or not self.close:
            raise _RewrittenError(_lost(lost))
        head = self.render(before, True, options)
        answer = last["content"]
        if head.rstrip().endswith("<think>"):
            answer = answer.removeprefix("<think>").lstrip("\n")
        text = head + answer.rstrip() + self.close
        if still := left_out(text, messages, learned, options.get("tools")):
            raise _RewrittenError(_lost(still))
        return text

    def _messages(self, text: str | Messages, role: str) -> Messages:
        """Return messages without a bos in front and ends of turn behind answers of their own."""
        messages = [{"role": role, "content": text}] if isinstance(text, str) else text
        check_messages(messages)
        cleaned = []
        for k, message in enumerate(messages):
            first, answer = k == 0 and role == "user", message["role"] == "assistant"
            cleaned.append(message | {"content": self._unmarked(message["content"], first, answer)})
        return cleaned

    def _single(self, text: str | Messages, role: str) -> str:
        """Return the text for plain: a string, or the content of a single message of that role."""
        if options_of(text):
            names = ", ".join(sorted(options_of(text)))
            raise ValueError(f"plain has no place for {names}: choose --template chatml")
        if not isinstance(text, str):
            check_messages(text)
            if [m["role"] for m in text] != [role]:
                raise ValueError(
                    "plain takes one prompt and one response, not several turns or a system "
                    "message: choose --template chatml"
                )
            more = text[0].keys() - {"role", "content", "learn", "name"}
            if more:
                raise ValueError(f"plain has no place for {min(more)}: choose --template chatml")
            return self._unmarked(text[0]["content"], role == "user", role == "assistant")
        return self._unmarked(text, role == "user", role == "assistant")

    def _unmarked(self, text: str, first: bool, answer: bool) -> str:
        """Return a text without the bos in front (first) and the ends behind it (answer)."""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        if first and bos and text.startswith(bos):
            text = text.removeprefix(bos)
        ends = [end for end in (self.close.strip(), eos) if end]
        while answer and (end := next((e for e in ends if text.rstrip().endswith(e)), "")):
            text = text.rstrip().removesuffix(end)
        return text

    def _check_read(self, options: dict[str, Any]) -> None:
        """Check that the template reads some values. ValueError names one that it does not."""
        for name in sorted(options.keys() - self.reads):
            what = "takes no tools" if name == "tools" else f"never reads `{name}`"
            raise ValueError(f"the chat template {what}: remove them, or use another template")

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

    def _closing(self) -> tuple[str, str]:
        """Return what the template writes after an answer, and what of it ends the answer.

        "<|end|>\\n<|endoftext|>" -> that and "<|end|>". Where it writes nothing, the marker of the
        next turn closes the answer, and without such a marker eos is added to it.
        """
        if self.plain:
            return "", ""
        turns = [{"role": role, "content": text} for role, text in PROBE]
        words = [text for _, text in PROBE]
        try:
            text = self.render(turns[:2], False)
        except ValueError:  # a template may need other turns; the rows will show
            return "", ""
        if words[1] not in text:
            return "", ""
        after = text.rpartition(words[1])[2].rstrip()
        if mark := self._marks.search(after):
            return after, after[: mark.end()]
        if not after:
            try:
                gap = self.render(turns, False).partition(words[1])[2].partition(words[2])[0]
            except ValueError:
                gap = ""
            mark = self._marks.search(gap)
            if mark and not gap[: mark.start()].strip():
                return "", gap[: mark.end()]
        return after, after + self.tokenizer.eos_token

    def _tail(self) -> list[int]:
        """Return the ids that the template writes behind the end of a last answer."""
        if not self.closing:
            return []
        turns = [{"role": role, "content": text} for role, text in PROBE[:2]]
        whole = self.tokenizer.encode(self.render(turns, False))
        closed = self.tokenizer.encode(self._closed(turns, {}))
        return whole[len(closed) :] if whole[: len(closed)] == closed else []

    def _end_of_turn(self) -> set[int]:
        """Return the special token that ends an answer, in a set: empty if there is none."""
        last = self.tokenizer.encode(self.close)[-1:]
        return set(last) & set(self.tokenizer.special.values())


class _RewrittenError(ValueError):
    """One rendering of a conversation cannot hold all its answers as serving would write them."""


def _lost(what: str) -> str:
    return (
        f"the chat template leaves out {what}, so the model would learn something else: change the "
        "row, or choose another --template"
    )


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


def _check_border(border: int) -> None:
    if border < 1:
        raise ValueError(
            "the prompt has no token, but its last one predicts the response's first: give it some "
            "text, or the tokenizer a bos_token"
        )
