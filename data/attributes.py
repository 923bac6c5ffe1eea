"""SteerLM's attribute line (arXiv 2310.05344): how values become text, where the text goes, and how a folder keeps it.

    quality:4,toxicity:0,humor:0,creativity:0,helpfulness:4,correctness:4,coherence:4,complexity:4,verbosity:4

Any subset will do, always in this order. The template says where the line goes; the default is NeMo-Aligner's place,
between the prompt and the answer. A model that was trained with such lines has an attributes.json in its folder.
"""

import json
import math
import random
from pathlib import Path

from data.formats import ATTRIBUTES, Messages, attribute_row, known_attributes

TEMPLATE = "{prompt}<extra_id_2>{attributes}\n"
WORST, BEST = 0, 4
UNWANTED = ("toxicity", "humor", "creativity")  # 0 at the best setting, as NeMo-Aligner has it
FILE = "attributes.json"


def line(values: dict[str, float]) -> str:
    """Values (NaN = not given) -> "helpfulness:4,verbosity:1", whole numbers in the fixed order."""
    return ",".join(
        f"{name}:{whole(values[name])}"
        for name in ATTRIBUTES
        if not math.isnan(values.get(name, math.nan))
    )


def whole(value: float) -> int:
    """The nearest whole number from 0 to 4."""
    return max(WORST, min(BEST, math.floor(value + 0.5)))


def read_line(text: str, known: tuple[str, ...] = ATTRIBUTES) -> dict[str, float]:
    """ "helpfulness:4,verbosity:1" -> values. ValueError: an unknown name (with the known ones), or no number 0-4."""
    values = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, colon, number = (part.strip() for part in item.partition(":"))
        known_attributes([name], known)
        if not colon or number not in map(str, range(WORST, BEST + 1)):
            raise ValueError(
                f"attribute {item!r} must be NAME:VALUE with a value from {WORST} to {BEST}"
            )
        values[name] = float(number)
    return values


def best(names: tuple[str, ...]) -> dict[str, float]:
    """The setting that one would ask for."""
    return {name: float(WORST if name in UNWANTED else BEST) for name in names}


def condition(prompt: str | Messages, values: dict[str, float], template: str) -> str | Messages:
    """The prompt with its attribute line; of messages the last gets it. Without any value it stays as it is."""
    text = line(values)

    def mark(said: str) -> str:
        return template.replace("{attributes}", text).replace("{prompt}", said) if text else said

    if isinstance(prompt, str):
        return mark(prompt)
    return [*prompt[:-1], {**prompt[-1], "content": mark(prompt[-1]["content"])}]


def conditioned(
    rows: list[dict], template: str, dropout: float, seed: int
) -> tuple[list[dict], tuple[str, ...]]:
    """Rows whose prompts carry their attribute line, one a response; and the attributes that occur.

    dropout: share of the values left out of their lines at random, as (seed, row) decides. ValueError names the row.
    """
    made, seen = [], set()
    for number, row in enumerate(rows):
        try:
            found = attribute_row(row)
            if found.prompt is None:
                raise ValueError(
                    "a conversation: --stage annotate turns it into `prompt` and `response`"
                )
        except ValueError as error:
            raise ValueError(f"row {number + 1} of --data: {error}") from None
        chance = random.Random(f"{seed} {number}")
        for i, response in enumerate(found.responses):
            given = {
                name: column[i]
                for name, column in found.columns.items()
                if not math.isnan(column[i])
            }
            values = {name: value for name, value in given.items() if chance.random() >= dropout}
            seen |= values.keys()
            made.append({"prompt": condition(found.prompt, values, template), "response": response})
    if not seen:
        raise ValueError("no row of --data has an attribute: --stage annotate writes them")
    return made, tuple(name for name in ATTRIBUTES if name in seen)


def check_template(template: str) -> str:
    r"""The template with a typed \n as a line break. ValueError: a place holder is missing."""
    for key in ("{prompt}", "{attributes}"):
        if template.count(key) != 1:
            raise ValueError(f"--attribute-template {template!r} must hold {key} once")
    return template.replace("\\n", "\n")


def save(folder: str | Path, template: str, names: tuple[str, ...]) -> None:
    """Writes attributes.json beside a model's weights."""
    (Path(folder) / FILE).write_text(
        json.dumps({"template": template, "attributes": names}, indent=2) + "\n"
    )


def load(folder: str | Path) -> tuple[str, tuple[str, ...]] | None:
    """(template, names) of a folder, None where the model was not trained with attributes."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    return found["template"], tuple(found["attributes"])
