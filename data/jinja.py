"""Chat templates: four built in, and a safe way to run those of others, as transformers does.

A folder's template reaches no Python object and is stopped after SECONDS, or before it fills the
memory. It may read the messages, the named special tokens, and what a row or --template-kwargs
gives it.
"""

import functools
import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox

SECONDS = 5.0  # for one rendering, which takes about a millisecond
LONGEST = 1 << 26  # characters of a text, or items of a list, that a template may make
LARGEST = 1 << 14  # bits of a whole number

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
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
BUILT_IN = {"chatml": CHATML, "zephyr": ZEPHYR, "llama2": LLAMA2, "llama3": LLAMA3}


@functools.lru_cache
def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template in jinja's sandbox, with the functions that transformers provides.

    ValueError: it is no jinja.
    """
    try:
        with _limit(SECONDS):
            return _environment().from_string(_without_marks(source))
    except Exception as error:  # also Python's own, which compiles what jinja has written
        message = " ".join(str(getattr(error, "msg", error)).split())
        raise ValueError(
            f"the folder's chat template cannot be parsed ({message}): choose --template chatml"
        ) from error


def variables(source: str) -> set[str]:
    """Return the names that a chat template reads from outside, such as messages and tools."""
    environment = _environment()
    names = jinja2.meta.find_undeclared_variables(environment.parse(_without_marks(source)))
    return names - environment.globals.keys()


def render(source: str, values: dict[str, Any]) -> str:
    """Return the text of a chat template. ValueError: it refuses the values, or does not end."""
    template = compile_template(source)
    try:
        with _limit(SECONDS):
            text = template.render(**values)
            if len(text) > LONGEST:
                raise _TooLong(f"it writes {len(text):,} characters")
            return text
    except Exception as error:  # any failure is the row's
        raise ValueError(f"the chat template refuses this row: {error}") from error


def read_kwargs(text: str) -> dict[str, Any]:
    """Return the values that --template-kwargs gives, {} for "". ValueError: no JSON object."""
    try:
        kwargs = json.loads(text or "{}")
    except (ValueError, RecursionError):
        kwargs = None
    if not isinstance(kwargs, dict):
        raise ValueError(
            f"--template-kwargs {text!r} is no JSON object: write it as in "
            """'{"enable_thinking": false}'"""
        )
    return kwargs


class _TooLong(Exception):
    """A template runs for more than SECONDS, or makes more than a memory holds."""


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also bounds what one step can make: no signal interrupts a step."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Return left * right or left ** right. _TooLong: it would be too long."""
        for one, other in ((left, right), (right, left)):
            if isinstance(other, int) and hasattr(one, "__len__"):
                _bound(len(one) * other, LONGEST)
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            _bound(bits * right if operator == "**" else bits + right.bit_length(), LARGEST)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        for value in args:  # "a".ljust(10000000000)
            if type(value) is int:
                _bound(abs(value), LONGEST)
        return super().call(context, function, *args, **kwargs)


def _bound(size: int, limit: int) -> None:
    if size > limit:
        raise _TooLong("it makes something too large")


def _center(text: str, width: int = 80) -> str:
    _bound(width, LONGEST)
    return str(text).center(width)


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise _TooLong in the body after some seconds; only a main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise _TooLong(f"it still runs after {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@functools.lru_cache
def _environment() -> _Sandbox:
    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["center"] = _center
    env.filters["tojson"] = _tojson  # jinja's own escapes < and > for HTML
    env.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return env


def _without_marks(source: str) -> str:
    """Return a template without {% generation %}, which only marks the assistant's text."""
    source = re.sub(r"{%(-?)\s*generation\s*(-?)%}", r"{%\1 if true \2%}", source)
    return re.sub(r"{%(-?)\s*endgeneration\s*(-?)%}", r"{%\1 endif \2%}", source)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
