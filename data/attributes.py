"""SteerLM's attributes (arXiv 2310.05344): the line that carries them, and where a prompt holds it.

    quality:4,toxicity:0,humor:0,creativity:0,helpfulness:4,correctness:4,coherence:4,...

A line may have any subset of ATTRIBUTES, always in this order. A template says where the line
goes; the default is NeMo-Aligner's place, between prompt and response. The folder of a model that
was trained with such lines has an attributes.json, with the template and the attributes it knows.
"""

import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import sources
from data.chat import Messages, as_chat, as_row, options_of
from data.formats import ATTRIBUTES, attribute_row, known_attributes
from data.keys import canonical
from data.rows import read_rows, write_rows
from disk import write_text
from parallel import Mesh

TEMPLATE = "{prompt}<extra_id_2>{attributes}\n"
WORST, BEST = 0, 4
UNWANTED = ("toxicity", "humor", "creativity")  # best at 0, as in NeMo-Aligner
FILE = "attributes.json"


# ---- the line ----------------------------------------------------------------------------------


def line(values: dict[str, float]) -> str:
    """Return the attribute line of some values, in the fixed order; a NaN is left out.

    Example: {"verbosity": 1.0, "helpfulness": 3.6} -> "helpfulness:4,verbosity:1".
    """
    known = [name for name in ATTRIBUTES if not math.isnan(values.get(name, math.nan))]
    return ",".join(f"{name}:{whole(values[name])}" for name in known)


def whole(value: float) -> int:
    """Return the nearest whole number from 0 to 4."""
    return max(WORST, min(BEST, math.floor(value + 0.5)))


def read_line(text: str, known: tuple[str, ...] = ATTRIBUTES) -> dict[str, float]:
    """Parse an attribute line: "helpfulness:4,verbosity:1" -> {"helpfulness": 4.0, ...}.

    ValueError: a name that is not known, or a value that is no whole number from 0 to 4.
    """
    values = {}
    for item in text.split(","):
        if not item.strip():
            continue
        name, colon, number = (part.strip() for part in item.partition(":"))
        known_attributes([name], known)
        if not colon or number not in map(str, range(WORST, BEST + 1)):
            raise ValueError(
                f"attribute {item.strip()!r} must be NAME:VALUE with a value from {WORST} to {BEST}"
            )
        values[name] = float(number)
    return values


def best(names: tuple[str, ...]) -> dict[str, float]:
    """Return the best value of each attribute: 4, or 0 for an unwanted one."""
    return {name: float(WORST if name in UNWANTED else BEST) for name in names}


# ---- prompts with a line -----------------------------------------------------------------------


def condition(prompt: str | Messages, values: dict[str, float], template: str) -> str | Messages:
    """Return the prompt with its attribute line, in its last message if it has several.

    A prompt without any value stays as it is.
    """
    text = line(values)

    def with_line(content: str) -> str:
        if not text:
            return content
        return template.replace("{attributes}", text).replace("{prompt}", content)

    if isinstance(prompt, str):
        return with_line(prompt)
    last = {**prompt[-1], "content": with_line(prompt[-1]["content"])}
    return as_chat([*prompt[:-1], last], options_of(prompt))


ConditionedRows = tuple[list[dict], tuple[str, ...]]  # rows, and the attributes in their prompts


def condition_rows(files: list[str], template: str, dropout: float, seed: int) -> ConditionedRows:
    """Read rows and put attribute lines into their prompts: {prompt, response} each, and the names.

    A row with several responses becomes several rows. dropout: share of the values to leave out at
    random, as (seed, row number) decides. ValueError names a row that cannot be used.
    """
    result = []
    seen: set[str] = set()
    for number, row in enumerate(all_rows(files)):
        try:
            content, _, options = canonical(row, "attributes")
            parsed = attribute_row(content)
            if parsed.prompt is None:
                raise ValueError(
                    "a conversation: score.py --attributes turns it into `prompt` and `response`"
                )
        except ValueError as error:
            raise ValueError(f"row {number + 1} of {', '.join(files)}: {error}") from None
        rng = random.Random(f"{seed} {number}")
        for i, response in enumerate(parsed.responses):
            values = {}
            for name, column in parsed.columns.items():
                if not math.isnan(column[i]) and rng.random() >= dropout:
                    values[name] = column[i]
            seen |= values.keys()
            prompt = condition(parsed.prompt, values, template)
            result.append({**as_row(as_chat(prompt, options)), "response": response})
    if files and not seen:
        raise ValueError(
            f"no row of {', '.join(files)} has an attribute: score.py --attributes writes them"
        )
    return result, in_order(seen)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return attributes in the order of a line."""
    wanted = set(names)
    return tuple(name for name in ATTRIBUTES if name in wanted)


class Compared(NamedTuple):
    """A prompt with two responses or more, and the attributes that were asked for."""

    prompt: str | Messages
    responses: list[str | Messages]
    asked: dict[str, float]


def compared_rows(files: list[str]) -> list[Compared]:
    """Read rows {prompt, responses: [...], attributes: {...}} of two responses or more.

    ValueError: a row with several sets of attributes, or no row with two responses.
    """
    result = []
    for number, row in enumerate(all_rows(files), 1):
        content, _, options = canonical(row, "attributes")
        parsed = attribute_row(content)
        sets = [dict(zip(parsed.columns, values)) for values in zip(*parsed.columns.values())]
        if parsed.prompt is None or len({line(values) for values in sets}) > 1:
            raise ValueError(
                f"row {number} of {', '.join(files)} must be {{prompt, responses: [...], "
                "attributes: {...}}, with one set of attributes for all responses"
            )
        if len(parsed.responses) > 1:
            asked = {name: value for name, value in sets[0].items() if not math.isnan(value)}
            prompt = as_chat(parsed.prompt, options)
            result.append(Compared(prompt, parsed.responses, asked))
    if files and not result:
        raise ValueError(
            f"every row of {', '.join(files)} has a single response, and --loss steerlm2 compares "
            "several: raise --answers"
        )
    return result


def check_template(template: str) -> str:
    r"""Return an attribute template with every typed \n as a line break.

    ValueError: it lacks one of its placeholders.
    """
    for key in ("{prompt}", "{attributes}"):
        if template.count(key) != 1:
            raise ValueError(f"--attribute-template {template!r} must hold {key} once")
    return template.replace("\\n", "\n")


# ---- what a script trains on, and what its model's folder keeps --------------------------------


class Config(Protocol):
    """The flags of a script that may train with attributes."""

    model: str
    data: list[str]
    eval_data: list[str]
    best_by: str
    out: str
    seed: int
    attributes: bool
    attribute_template: str
    attribute_dropout: float


class Conditioned(NamedTuple):
    """Files to train and evaluate on, with the template and names of the attributes in them."""

    data: list[str]
    eval_data: list[str]
    template: str = ""
    names: tuple[str, ...] = ()  # none: the files have no attribute lines


def condition_files(config: Config, mesh: Mesh) -> Conditioned:
    """Return the files of a run; with --attributes, copies in OUT whose prompts carry their lines.

    Collective: rank 0 writes the copies. ValueError names a file and row that cannot be used.
    """
    if not config.attributes:
        if config.attribute_template or config.attribute_dropout:
            raise ValueError("--attribute-template and --attribute-dropout need --attributes")
        return Conditioned(config.data, config.eval_data)

    sources.refuse_shares(config.data, "with --attributes, which writes one file of all rows")

    def copies() -> Conditioned:
        template = template_of(config.model, config.attribute_template)
        settings = template, config.attribute_dropout, config.seed
        train = condition_rows(sources.paths(config.data, "data"), *settings)
        sets = sources.named_sets(config.eval_data, config.best_by)
        heldout = {name: condition_rows(files, *settings) for name, files in sets.items()}
        return write_files(config.out, template, train, heldout)

    return mesh.ask(copies)


def write_files(
    out: str, template: str, train: ConditionedRows, heldout: dict[str, ConditionedRows]
) -> Conditioned:
    """Write OUT/conditioned_train.jsonl and OUT/conditioned_heldout.jsonl, one for every set."""
    data = [write_rows(Path(out) / "conditioned_train.jsonl", train[0])] if train[0] else []
    eval_data = []
    for name, (rows, _) in heldout.items():
        end = f"_{name}" if name else ""
        path = write_rows(Path(out) / f"conditioned_heldout{end}.jsonl", rows)
        eval_data.append(str(sources.Source(path, name)))
    return Conditioned(data, eval_data, template, train[1])


def all_rows(files: list[str]) -> list[dict]:
    """Return the rows of some JSONL files."""
    return [row for file in files for row in read_rows(file)]


def template_of(model: str, flag: str = "") -> str:
    """Return the attribute template of a run: the flag's, else the model's, else the default."""
    trained = load(model)
    return check_template(flag or (trained[0] if trained else TEMPLATE))


def save(folder: Path, files: Conditioned, mesh: Mesh) -> None:
    """Write attributes.json into a model's folder; nothing if it was trained without attributes."""
    if files.names and mesh.main:
        content = {"template": files.template, "attributes": files.names}
        write_text(folder / FILE, json.dumps(content, indent=2) + "\n")


def load(folder: str | Path) -> tuple[str, tuple[str, ...]] | None:
    """Return (template, names) of a model's folder, None if it was trained without attributes."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    return content["template"], tuple(content["attributes"])
