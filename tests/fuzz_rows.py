"""Rows with random keys and values, in every container: each is used, or refused with its place.

    python tests/fuzz_rows.py --rows 100000 --seed 0     half a minute

Every file is tokenised with --max-bad-rows as large as it needs. No error but those of rows may
come up, every row is counted as a tree, dropped or bad, and every bad row has a file, a number and
a reason. test_keys.py runs a short part.
"""

import argparse
import csv
import gzip
import io
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import chat_templates  # noqa: E402

from data.dataset import load_dataset  # noqa: E402
from data.encode import ROWS  # noqa: E402
from data.templates import Template  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402

KEYS = (
    "prompt response completion input output instruction context question query answer messages "
    "conversations chosen rejected chosen_response system system_prompt history tools functions "
    "chat_template_kwargs label preference attributes helpfulness responses weights weight images "
    "text id source completions kto_tag response_ids tokenizer margin chosen_reward"
).split()
ROLES = "system user assistant human gpt tool developer function_call observation pirate".split()
MORE = (
    "weight train reasoning_content thinking tool_calls tool_call_id name refusal images id"
).split()
WORDS = ["four", "2+2?", "<think>\nhm\n</think>\n\nyes", "</s>", "<|im_end|>", "<s>", "é", "\u2028"]
ODD = [None, True, False, 0, 1, -1, 0.5, 1e400, 2**70, "", " ", [], {}, [[]], [1], "\ud800"]
CALL = {"function": {"name": "calc", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "calc"}}


def text(rng: random.Random) -> str:
    """Return a text of a few words, some of which are markers."""
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))


def value(rng: random.Random, key: str, depth: int = 0) -> Any:
    """Return a value for a key: often one that fits it, sometimes another."""
    if rng.random() < 0.04:
        return rng.choice(ODD)
    if key in ("tools", "functions"):
        return rng.choice(([TOOL], [TOOL["function"]], json.dumps([TOOL]), "{", [{}]))
    if key == "tool_calls":
        return rng.choice(([CALL], [], [{"name": "calc", "arguments": '{"x": 1}'}], CALL, [1]))
    if key == "chat_template_kwargs":
        return rng.choice(({"enable_thinking": False}, {"other": 1}, [], "x"))
    if key in ("label", "kto_tag"):
        return rng.choice((True, False, 1, 0, "yes"))
    if key == "history":
        return rng.choice(([["q", "a"]], [["q"]], "q", []))
    if key in ("weights", "responses", "completions", "attributes", "response_ids"):
        one = {"response": text(rng), "overall_score": rng.randint(1, 5)}
        return [rng.choice((text(rng), rng.random(), one, 3)) for _ in range(rng.randint(0, 3))]
    if key in ("weight", "margin", "helpfulness", "chosen_reward", "id"):
        return rng.choice((0, 1, 2.5, "x", float("nan")))
    lists = ("messages", "conversations", "chosen", "rejected", "prompt", "response")
    if key in lists and depth == 0 and rng.random() < (0.9 if key in lists[:2] else 0.3):
        return [message(rng) for _ in range(rng.randint(0, 5))]
    return text(rng)


def message(rng: random.Random) -> Any:
    """Return a message, {role, content} or {from, value}, with a stranger key now and then."""
    if rng.random() < 0.03:
        return rng.choice(ODD)
    role, content = rng.choice((("role", "content"), ("role", "content"), ("from", "value")))
    parts = [{"type": "text", "text": text(rng)}, {"type": "image_url"}, "x"]
    said = rng.choice((text(rng), text(rng), text(rng), rng.sample(parts, 1), None))
    new = {role: rng.choice(ROLES), content: said}
    for key in rng.sample(MORE, rng.choice((0, 0, 1, 2))):
        new[key] = value(rng, key, 1)
    return new


SHAPES = {  # usual keys of a kind of rows
    "sft": (["prompt", "response"], ["messages"], ["conversations"], ["instruction", "output"]),
    "preference": (["prompt", "chosen", "rejected"], ["chosen", "rejected"]),
    "label": (["prompt", "response", "label"], ["prompt", "chosen", "rejected"]),
    "attributes": (["prompt", "response", "helpfulness"], ["prompt", "response"]),
    "weights": (["prompt", "responses", "weights"],),
}


def row(rng: random.Random, kind: str) -> dict[str, Any]:
    """Return a row: a usual shape of a kind with changes, or keys at random."""
    keys = list(rng.choice(SHAPES[kind]))
    keys += rng.sample(KEYS, rng.choice((0, 0, 0, 0, 1, 1, 2, 5)))
    if keys and rng.random() < 0.1:
        keys.pop(rng.randrange(len(keys)))
    return {key: value(rng, key) for key in keys}


def write(folder: Path, rows: list[dict], kind: str) -> Path:
    """Write rows into a container; what it cannot hold is left out of it."""
    path = folder / f"rows.{kind}"
    lines = "".join(json.dumps(one) + "\n" for one in rows)
    if kind in ("jsonl", "jsonl.gz"):
        content = lines.encode()
    elif kind == "json":
        content = json.dumps(rows).encode()
    elif kind in ("csv", "tsv"):
        names = sorted({key for one in rows for key in one}) or ["prompt"]
        buffer = io.StringIO()
        table = csv.DictWriter(buffer, names, delimiter="," if kind == "csv" else "\t")
        table.writeheader()
        for one in rows:
            cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in one.items()}
            table.writerow(cells)
        content = buffer.getvalue().encode(errors="replace")
    else:
        import pyarrow
        import pyarrow.parquet

        names = sorted({key for one in rows for key in one})
        cells = {
            name: [
                None if one.get(name) is None else str(one[name]).encode(errors="replace").decode()
                for one in rows
            ]
            for name in names
        }
        pyarrow.parquet.write_table(pyarrow.table(cells), path)
        return path
    path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    return path


def run(home: Path, rows: int, seed: int, each: int = 500) -> Counter:
    """Tokenise random rows in files of `each`; return counts. AssertionError: a row is lost."""
    rng = random.Random(seed)
    models = ("qwen3", "llama3.1", "r1", "mistral", "phi3")
    templates = []
    for name in models:
        folder = chat_templates.save(home / name, *chat_templates.MODELS[name])
        templates.append(Template("auto", load_tokenizer(folder)))
    templates.append(Template("plain", templates[0].tokenizer))
    counts: Counter = Counter()
    containers = ["jsonl", "jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet"]
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        containers.remove("parquet")
    good = {"prompt": "q", "response": "a", "chosen": "a", "rejected": "b", "label": True}
    good |= {"responses": ["a", "b"], "weights": [1, 0]}
    for n in range(rows // each):
        kind, template = rng.choice(sorted(ROWS)), rng.choice(templates)
        some = [row(rng, kind) for _ in range(each - 1)] + [good]
        container = rng.choice(containers)
        file = write(home, some, container)
        said: list[str] = []
        try:
            data = load_dataset(
                file, kind, template, 400, "drop", each, home / "cache", 1, said.append
            )
        except ValueError as error:  # nothing but the good row, which this kind cannot use
            if "no row is left" not in str(error) and "is left" not in str(error):
                raise AssertionError(f"file {n}, {container}, {kind}: {error}") from error
            counts["files without a row"] += 1
            continue
        c = data.counts
        kept = c["trees"] + c["too_long"] + c["bad"] - c["split"]
        assert c["rows"] == each and kept == each, f"file {n}: {c}"
        bad = [line for line in said if line.startswith("bad row ")]
        assert all(f"{file}:" in line for line in bad), f"file {n}: {bad}"
        counts["used"] += c["trees"] - c["split"]
        counts["bad"] += c["bad"]
        counts["too long"] += c["too_long"]
        counts[container] += each
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000, help="rows to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        counts = run(Path(home), flags.rows, flags.seed)
    print(f"{flags.rows} rows, seed {flags.seed}: {dict(counts)}, no traceback")


if __name__ == "__main__":
    main()
