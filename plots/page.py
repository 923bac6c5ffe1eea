"""One self-contained HTML page of some runs: numbers, curves, samples, flags, environment."""

import html
import io
import json
from pathlib import Path
from typing import Any

SAMPLES = 6  # shown of the first logged step and of the last
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; border-bottom: 1px solid #eee; }
td + td, th + th { text-align: right; } th { text-align: left; }
.text td, .text th { text-align: left; vertical-align: top; }
.text td { white-space: pre-wrap; overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; } details { margin: .5rem 0; } summary { cursor: pointer; }
"""


def page(
    paths: dict[str, Path], rows: list[list[str]], figure: Any, samples: dict[str, list[dict]]
) -> str:
    """Return the page.

    paths: name -> folder of each run. rows: of plots.series.table. figure: a matplotlib figure.
    samples: name -> rows of samples.jsonl.
    """
    names = ", ".join(paths)
    parts = [f"<h1>{html.escape(names)}</h1>", numbers(rows), "<h2>Curves</h2>", drawing(figure)]
    for name, folder in paths.items():
        parts.append(f"<h2>{html.escape(name)}</h2>")
        if samples[name]:
            parts.append(answers(samples[name]))
        parts.append(folded("Flags", pairs(read_object(folder / "config.json"))))
        parts.append(folded("Environment", environment(folder)))
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(names)}'
        f"</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def read_object(file: Path) -> dict:
    """Return the JSON object of a file; an empty one if it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def row_of(cells: list[Any], kind: str = "td") -> str:
    """Return a line of an HTML table."""
    return "<tr>" + "".join(f"<{kind}>{html.escape(str(c))}</{kind}>" for c in cells) + "</tr>"


def numbers(rows: list[list[str]]) -> str:
    """Return a table with a header as HTML."""
    return "<table>" + row_of(rows[0], "th") + "".join(map(row_of, rows[1:])) + "</table>"


def pairs(values: dict) -> str:
    """Return names and values as an HTML table."""
    return '<table class="text">' + "".join(row_of([*pair]) for pair in values.items()) + "</table>"


def folded(title: str, content: str) -> str:
    """Return a part that a click opens."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def environment(folder: Path) -> str:
    """Return what OUT/environment.json holds: code, packages, device, hashes of files."""
    flat = {}
    for group, values in read_object(folder / "environment.json").items():
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            flat[f"{group} {name}".strip()] = value
    return pairs(flat)


def answers(samples: list[dict]) -> str:
    """Return the samples of the first logged step and of the last, as two tables."""
    steps = sorted({row["step"] for row in samples})
    text = ""
    for step in dict.fromkeys((steps[0], steps[-1])):
        chosen = [row for row in samples if row["step"] == step][:SAMPLES]
        lines = [row_of(["prompt", "response", "reward"], "th")]
        for row in chosen:
            prompt = row.get("prompt", "")
            prompt = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
            lines.append(row_of([prompt, row.get("response", ""), row.get("reward", "")]))
        text += f'<h3>Samples of step {step}</h3><table class="text">{"".join(lines)}</table>'
    return text


def drawing(figure: Any) -> str:
    """Return a matplotlib figure as an SVG element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
