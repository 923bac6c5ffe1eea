"""A dataclass becomes a command line; the comment beside a field is its --help.

    @dataclass
    class Config(RunConfig):
        beta: float = 0.1  # temperature of the implicit reward; smaller strays further

    config = parse(Config, __doc__)      # default < --config file.json < flag

Types of a field: numbers with their valid range (Count, Amount, ...: see config.py), str, bool
(--flag or --no-flag), Literal[...] (one of), list[str] (one or more words). Both --max-tokens and
--max_tokens are accepted. An unknown flag or key, or a value that does not fit or is outside its
range, is refused with the nearest valid name or the range.
"""

import dataclasses
import difflib
import functools
import inspect
import json
import math
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import elsewhere
from flagfile import read_values

T = TypeVar("T")
LARGEST = 2**31 - 1  # of whole numbers: more is a slip of the finger


@dataclass(frozen=True)
class Range:
    """The valid values of a number, part of the type of its field; all are finite.

    above, below: without the end itself, `Range(0, 1, above=True)` is above 0 and at most 1.
    zero: 0 is valid as well, where it means something else.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    zero: bool = False

    def __contains__(self, value: float) -> bool:
        enough = value > self.low if self.above else value >= self.low
        few = value < self.high if self.below else value <= self.high
        inside = enough and few and -math.inf < value < math.inf
        return inside or (self.zero and value == 0)

    def __str__(self) -> str:
        ends = []
        if self.low > -math.inf:
            ends.append(f"{'above' if self.above else 'at least'} {self.low:g}")
        if self.high not in (math.inf, LARGEST):
            ends.append(f"{'below' if self.below else 'at most'} {self.high:.10g}")
        return ("0, or " if self.zero else "") + (" and ".join(ends) or "finite")


# Groups in the order of --help. A script's own flags are "algorithm" if no comment names them.
GROUPS = (
    "data",
    "model",
    "adapters",
    "experts",
    "algorithm",
    "rollout",
    "optimisation",
    "layout",
    "output",
)
MANY = 8  # more choices than this are listed below a flag, not beside it


def parse(cls: type[T], doc: str | None = None, argv: list[str] | None = None) -> T:
    """Fill the dataclass `cls` from its defaults, then `--config FILE`, then flags (sys.argv).

    On --help print `help_text` and exit. On bad input exit with status 2 and one line.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if "-h" in argv or "--help" in argv:
            print(help_text(cls, doc))
            raise SystemExit(0)
        flags = _read_flags(cls, argv)
        values = from_file(cls, flags["config"]) if flags.get("config") else {}
        return cls(**{**values, **flags})
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":  # all ranks have the same flags: say it once
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def from_file(cls: type, path: str) -> dict[str, Any]:
    """Return the values in a JSON or YAML file of flags. ValueError: unknown keys, bad values."""
    values = read_values(path)
    checked = {}
    for key, value in values.items():
        name = _known(cls, key, f"{path}: unknown key")
        words = value if isinstance(value, list) else [value]
        if value == "" and get_origin(get_type_hints(cls)[name]) is list:
            words = []  # a flag that took one word when the file was written
        if any(isinstance(word, (dict, list)) or word is None for word in words):
            raise ValueError(f"{path}: {key} cannot be {json.dumps(value)}")
        checked[name] = _convert(cls, name, [str(word) for word in words], f"{path}: {key}")
    return checked


def to_json(config: Any) -> str:
    """Return the whole config as JSON that --config reads back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


# ---- help --------------------------------------------------------------------------------------


class Field(NamedTuple):
    """A field as its class writes it."""

    meaning: str  # the comment beside it, and comment lines right below
    group: str  # the comment line after a blank line above it; "" without one


def written_fields(cls: type) -> dict[str, Field]:
    """Return every field of a dataclass and its parents as their source writes them.

        # data
        seed: int = 0  # of data order   ->   {"seed": Field("of data order and sampling", "data")}
        # and sampling

    A field that a child writes again keeps its group.
    """
    fields: dict[str, Field] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        names = "|".join(base.__dict__.get("__annotations__", {}))
        group, name, blank = "", "", True
        for line in inspect.getsource(base).splitlines():
            if opened := re.match(rf"    ({names}):", line):
                name = opened[1]
                fields[name] = Field("", fields[name].group if name in fields else group)
            alone = re.match(r"    # (.*)$", line)
            beside = re.search(r"\s{2}# (.*)$", line)
            if alone and blank:
                group = alone[1]
            elif name and (alone or beside):
                text = (alone or beside)[1]
                known = fields[name]
                fields[name] = Field(f"{known.meaning} {text}".strip(), known.group)
            blank = not line.strip()
    return fields


def help_text(cls: type, doc: str | None) -> str:
    """Return the help: the docstring, then flags in groups, each with its default and meaning.

    A paragraph of the docstring that opens with "Letters:" is for readers of the code: left out.
    """
    paragraphs = (doc or "").strip().split("\n\n")
    lines = ["\n\n".join(text for text in paragraphs if not text.startswith("Letters:"))]
    own = "algorithm" if hasattr(cls, "model") else "flags"
    written = written_fields(cls)
    groups: dict[str, list[str]] = {}
    for f in dataclasses.fields(cls):
        groups.setdefault(written[f.name].group or own, []).extend(_help_lines(cls, f, written))

    def place(group: str) -> int:
        name = group.partition(":")[0]
        return GROUPS.index(name if name in GROUPS else "algorithm")

    for group in sorted(groups, key=place):
        lines += ["", f"{group}:" if ":" not in group else group, *groups[group]]
    return "\n".join(lines)


def _help_lines(cls: type, f: dataclasses.Field, written: dict[str, Field]) -> list[str]:
    """Return the lines of one flag: its name and values, then its meaning and default, indented."""
    hint, flag = get_type_hints(cls)[f.name], f.name.replace("_", "-")
    default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    choices = [str(choice) for choice in get_args(hint)] if get_origin(hint) is Literal else []
    text = written[f.name].meaning
    if hint is bool:
        head = f"--no-{flag}" if default else f"--{flag}"
    elif len(choices) > MANY:
        head = f"--{flag} NAME"
        text += f"; one of {', '.join(choices)}"
    elif choices:
        head = f"--{flag} {'|'.join(choices)}"
    else:
        head = f"--{flag} " + {int: "N", float: "X", str: "TEXT"}.get(hint, "TEXT [TEXT ...]")
    notes = [str(valid)] if (valid := ranges(cls).get(f.name)) else []
    if not isinstance(default, bool) and default not in ("", []):
        notes.append(f"default {default}")
    if notes:
        text += f" ({'; '.join(notes)})"
    indent = " " * 8
    wrap = textwrap.TextWrapper(
        100, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    return [f"  {head}", *wrap.wrap(text)]


# ---- values ------------------------------------------------------------------------------------


def _known(cls: type, name: str, complaint: str, dashes: str = "") -> str:
    """Return the field that a flag or key means. ValueError: none; names the nearest.

    dashes: what stands before a name, "--" for flags.
    """
    names = [f.name for f in dataclasses.fields(cls)]
    plain = name.replace("-", "_")
    if plain in names:
        return plain
    near = difflib.get_close_matches(plain, names, n=1, cutoff=0.5)
    hint = "; --help lists them"
    if theirs := elsewhere.flag_hint(plain, names):
        hint = f": here it is {theirs}" if theirs.startswith("--") else f": {theirs}"
    elif near:
        hint = f": did you mean {dashes}{near[0].replace('_', '-')}?"
    raise ValueError(f"{complaint} {dashes}{name}{hint}")


def _read_flags(cls: type, argv: list[str]) -> dict[str, Any]:
    """Return the values that a command line gives. ValueError: an unknown flag or a bad value."""
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    at = 0
    while at < len(argv):
        word = argv[at]
        at += 1
        if not word.startswith("--"):
            raise ValueError(f"unexpected word {word!r}: flags start with --, --help lists them")
        name, equals, attached = word[2:].partition("=")
        positive = True
        if name.startswith(("no-", "no_")) and hints.get(name[3:].replace("-", "_")) is bool:
            name, positive = name[3:], False
        name = _known(cls, name, "unknown flag", "--")
        flag = "--" + name.replace("_", "-")
        if hints[name] is bool and not equals:
            values[name] = positive
            continue
        words = [attached] if equals else []
        while not equals and at < len(argv) and not _is_flag(argv[at]):
            words.append(argv[at])
            at += 1
            if get_origin(hints[name]) is not list:
                break
        if not words:
            raise ValueError(f"{flag} needs a value")
        value = _convert(cls, name, words, flag)
        values[name] = value if positive else not value
    return values


def _is_flag(word: str) -> bool:
    return word.startswith("--") and len(word) > 2


def _convert(cls: type, name: str, words: list[str], label: str) -> Any:
    """Return the value of a field from words. ValueError: they do not fit its type."""
    hint = get_type_hints(cls)[name]
    if get_origin(hint) is list:
        return words
    if len(words) != 1:
        raise ValueError(f"{label} takes one value, not {len(words)}")
    word = words[0]
    if get_origin(hint) is Literal:
        choices = {str(choice): choice for choice in get_args(hint)}
        if word in choices:
            return choices[word]
        near = difflib.get_close_matches(word, choices, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        if theirs := elsewhere.value_hint(name, word):
            meant = f" ({theirs})"
        raise ValueError(f"{label} must be one of {', '.join(choices)}, not {word!r}{meant}")
    if hint is bool:
        if word.lower() in ("true", "false"):
            return word.lower() == "true"
        raise ValueError(f"{label} must be true or false, not {word!r}")
    try:
        value = hint(word)
    except ValueError:
        kind = {int: "a whole number", float: "a number"}.get(hint)
        raise ValueError(f"{label} must be {kind}, not {word!r}") from None
    valid = ranges(cls).get(name)
    if valid and value not in valid:
        raise ValueError(f"{label} must be {valid}, not {word}")
    return value


@functools.cache
def ranges(cls: type) -> dict[str, Range]:
    """Return the valid range of every field that has one."""
    hints = get_type_hints(cls, include_extras=True)
    extras = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: extra[0] for name, extra in extras.items() if extra}


def check_ranges(config: Any) -> None:
    """Raise ValueError for a field outside its range, however the config was made."""
    cls: type = type(config)
    for name, valid in ranges(cls).items():
        if getattr(config, name) not in valid:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be {valid}, not {getattr(config, name)}")
