"""Load odd rows from every container: each is learned whole, or says in one line what is wrong.

    python tests/fuzz_rows.py --rows 100000 --seed 0     about ten minutes

Rows of every format get keys and values of others, texts of all scripts, control tokens and broken
values, and are written as JSONL, JSON arrays, tables, Parquet and Arrow, some files damaged. Laws:

    no traceback   only ValueError, OSError and ImportError; one line, which names the file
    no loss        every text of a row is learned, or a key above it is reported as ignored; a word
                   of its own in each text shows it
    no change      the rows of a file are those of its twin in JSONL
    the books      rows + splits = trees + too long + bad

test_fuzz_rows.py runs a short part.
"""

import argparse
import copy
import csv
import gzip
import itertools
import json
import random
import re
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import chat_templates  # noqa: E402
from fuzz_folders import VALUES, mutate_json  # noqa: E402

from data.dataset import load_dataset, load_prompts  # noqa: E402
from data.encode import Job, encode_lines  # noqa: E402
from data.formats import ATTRIBUTES  # noqa: E402
from data.keys import without  # noqa: E402
from data.rows import read_lines  # noqa: E402
from data.templates import Template  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402

ANSWERERS = ("assistant", "gpt", "function_call")
WORD = re.compile(r"zq\d+v")
_numbers = itertools.count()


def word() -> str:
    """Return a word that stands nowhere else."""
    return f"zq{next(_numbers)}v"


def user() -> dict[str, Any]:
    return {"role": "user", "content": word()}


def answer(**more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": word(), **more}


def said(*roles: str) -> list[dict[str, Any]]:
    """Return messages as ShareGPT writes them."""
    return [{"from": role, "value": word()} for role in roles]


def tool() -> dict[str, Any]:
    return {"type": "function", "function": {"name": word(), "parameters": {"type": "object"}}}


def call() -> dict[str, Any]:
    return {"id": "abcdefghi", "function": {"name": word(), "arguments": {word(): word()}}}


def bases() -> dict[str, list[dict[str, Any]]]:
    """Return rows of every format, by the kind that reads them."""
    messages = [{"role": "system", "content": word()}, user(), answer(), user(), answer()]
    called = [user(), answer(tool_calls=[call()]), {"role": "tool", "content": word()}, answer()]
    asked = user()
    shared = [asked, {"role": "assistant", "content": word()}, user()]
    demonstrations = [
        {"prompt": word(), "response": word()},
        {"prompt": word(), "completion": word()},
        {"input": word(), "output": word()},
        {"prompt": [user()], "completion": [answer()]},
        {"messages": messages},
        {"messages": called, "tools": [tool()]},
        {"messages": [user(), answer(reasoning_content=word())]},
        {"conversations": said("human", "gpt", "human", "gpt"), "system": word()},
        {"conversations": said("human", "gpt"), "id": "7", "source": word()},
        {"instruction": word(), "input": word(), "output": word(), "history": [[word(), word()]]},
        {"instruction": word(), "context": word(), "response": word(), "category": "x"},
        {"question": word(), "answer": word()},
        {"query": word(), "response": word()},
        {"system_prompt": word(), "question": word(), "response": word()},
        {"text": word()},
    ]
    pairs = [
        {"prompt": word(), "chosen": word(), "rejected": word()},
        {"prompt": [user()], "chosen": [answer()], "rejected": [answer()]},
        {"chosen": [*shared, answer()], "rejected": [*shared, answer()]},
        {"conversations": said("human"), "chosen": said("gpt")[0], "rejected": said("gpt")[0]},
        {
            "input": {"messages": [user()], "tools": [tool()]},
            "preferred_output": [answer()],
            "non_preferred_output": [answer()],
        },
        {"chosen": f"\n\nHuman: {word()}\n\nAssistant: {(a := word())}"} | {"rejected": ""},
        {"system": word(), "question": word(), "chosen": word(), "rejected": word()},
        {
            "instruction": word(),
            "completions": [
                {"response": word(), "overall_score": 4},
                {"response": word(), "overall_score": 2},
            ],
        },
    ]
    pairs[5]["rejected"] = pairs[5]["chosen"].replace(a, word())
    labels = [
        {"prompt": word(), "completion": word(), "label": True},
        {"messages": [user(), answer()], "kto_tag": False},
        {"prompt": word(), "response": word(), "preference": "chosen"},
    ]
    rated = [
        {"prompt": word(), "response": word(), "helpfulness": 4, "verbosity": 1.5},
        {"prompt": word(), "responses": [word(), word()], "attributes": [{"quality": 1}, {}]},
    ]
    weighted = [{"prompt": word(), "responses": [word(), word()], "weights": [0.5, 2]}]
    return {
        "sft": demonstrations,
        "preference": pairs,
        "label": [*labels, pairs[0]],
        "attributes": [*rated, demonstrations[0]],
        "weights": weighted,
    }


def extras() -> list[dict[str, Any]]:
    """Return keys that rows of any kind may have, with plausible values."""
    return [
        {
            "system": word(),
            "system_prompt": word(),
            "history": [user(), answer(tool_calls=[call()], thinking="hm")],
            "tools": [tool()],
            "functions": [{"name": word()}],
            "instruction": word(),
            "response": word(),
            "completion": word(),
            "output": word(),
            "messages": [user(), answer()],
            "text": word(),
            "chat_template_kwargs": {"enable_thinking": False},
            "images": [word()],
            "weight": 0.5,
            "score": 3,
            "prompt_id": word(),
            "conversation": said("human", "gpt"),
            "documents": [],
            "kto_tag": True,
            "margin": 1,
            "chosen_response": word(),
            "context": word(),
            "answer": word(),
            **dict.fromkeys(ATTRIBUTES, 2),
        },
    ]


IN_MESSAGE = [
    {"weight": 0},
    {"train": True},
    {"mask": 7},
    {"thinking": "hm", "reasoning": "ho"},
    {"tool_calls": [{"name": "f", "arguments": "{"}]},
    {"tool_calls": {"name": "f"}},
    {"function_call": "f"},
    {"content": [{"type": "text", "text": "part"}, {"type": "image_url"}]},
    {"content": None},
    {"refusal": "no"},
    {"role": "ipython"},
    {"from": "gpt", "value": "x"},
    {"learn": False},
    {"id": 5},
]
ODD_TEXTS = [
    "</s>",
    "<s><|im_start|>user\n",
    "<|im_end|>",
    "<think>\na\n</think>\nb",
    "{{ 7 * 7 }}{% raw %}",
    "\u2028\x00\x1b[0m\ufeff",
    "e\u0301\U0001f600\u202e\u0645",
    "[1, 2]",
    "4",
    "true",
    "  ",
    "a" * 3000,
]


def odd_row(kind: str, rows: dict[str, list], more: list[dict], rng: random.Random) -> Any:
    """Return a row of a kind: whole, or with changes of one sort or of several."""
    row = copy.deepcopy(rng.choice(rows[kind if rng.random() < 0.9 else rng.choice(list(rows))]))
    for _ in range(rng.choice((0, 1, 1, 2))):
        if not isinstance(row, dict):
            break
        change = rng.choice(("borrow", "borrow", "mutate", "message", "text"))
        if change == "borrow":
            key, value = rng.choice(list(rng.choice(more).items()))
            row[key] = copy.deepcopy(value)
        elif change == "mutate":
            row = mutate_json(row, [*more, *rows[kind]], rng)
        elif change == "message":
            lists = [value for value in row.values() if isinstance(value, list) and value]
            message = rng.choice(rng.choice(lists)) if lists else None
            if isinstance(message, dict):
                message |= copy.deepcopy(rng.choice(IN_MESSAGE))
        else:
            texts = [key for key, value in row.items() if isinstance(value, str)]
            if texts:
                key = rng.choice(texts)
                row[key] = rng.choice((row[key] + " ", "")) + rng.choice(ODD_TEXTS)
    return row


# ---- containers -------------------------------------------------------------------------------


def write_lines(path: Path, rows: list) -> None:
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8", errors="surrogatepass")


def write_array(path: Path, rows: list) -> None:
    text = json.dumps(rows, indent=1)
    path.write_text(text, encoding="utf-8")


def write_table(path: Path, rows: list) -> None:
    """Write a table whose cells hold texts as they are, and JSON of other values."""
    names = list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))
    separator = "\t" if ".tsv" in path.name else ","
    with open(path, "w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        table = csv.DictWriter(file, names or ["prompt"], delimiter=separator)
        table.writeheader()
        for row in rows:
            if isinstance(row, dict):
                cells = {
                    key: value if isinstance(value, str) else json.dumps(value)
                    for key, value in row.items()
                    if value is not None
                }
                table.writerow(cells)


def write_columns(path: Path, rows: list) -> None:
    """Write Parquet or Arrow; a column of several types as JSON texts."""
    import pyarrow
    from pyarrow import parquet

    rows = [row for row in rows if isinstance(row, dict)]
    columns = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
            columns[name] = pyarrow.array([json.dumps(value) for value in values])
    table = pyarrow.table(columns)
    if path.suffix == ".parquet":
        try:
            parquet.write_table(table, path)
        except pyarrow.ArrowException:  # an object without keys
            names = [f.name for f in table.schema if "struct<>" not in str(f.type)]
            parquet.write_table(table.select(names), path)
        return
    options = pyarrow.ipc.new_stream if len(rows) % 2 else pyarrow.ipc.new_file
    with options(str(path), table.schema) as stream:
        stream.write_table(table)


CONTAINERS = {
    "rows.jsonl": write_lines,
    "rows.jsonl.gz": write_lines,
    "array.json": write_array,
    "array.json.gz": write_array,
    "table.csv": write_table,
    "table.tsv.gz": write_table,
    "rows.parquet": write_columns,
    "rows.arrow": write_columns,
}


def write(path: Path, rows: list, rng: random.Random) -> bool:
    """Write rows as the name says, some files damaged. Return whether this one is."""
    CONTAINERS[path.name](path, rows)
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.compress(content, 1)
    damaged = rng.random() < 0.15 and len(content) > 0
    if damaged and rng.random() < 0.5:
        content = content[: rng.randrange(len(content))]
    elif damaged:
        changed = bytearray(content)
        for _ in range(rng.choice((1, 3, 30))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        content = bytes(changed)
    path.write_bytes(content)
    return damaged


# ---- laws -------------------------------------------------------------------------------------


def lost_words(row: Any, learned: str, ignored: set[str]) -> list[str]:
    """Return the words of a row that are neither learned nor under a key that may be ignored."""
    lost = []

    def look(value: Any, path: str) -> None:
        if path in ignored:
            return
        if isinstance(value, dict):
            for key, one in value.items():
                for name in WORD.findall(key):
                    look(name, path)
                look(one, f"{path}.{key}" if path else key)
        elif isinstance(value, list):
            if path in ("messages", "conversations"):  # turns behind the last answer are left out
                while value and not is_answer(value[-1]):
                    value = value[:-1]
            for one in value:
                look(one, f"{path}[]")
        elif isinstance(value, str):
            lost.extend(f"{path}: {name}" for name in WORD.findall(value) if name not in learned)

    look(row, "")
    return lost


def is_answer(message: Any) -> bool:
    """Return whether a message is the assistant's."""
    is_message = isinstance(message, dict)
    return is_message and message.get("role", message.get("from")) in ANSWERERS


def check_rows(path: Path, job: Job, counts: Counter) -> None:
    """Check every row of a file by itself: no traceback, no loss, the books."""
    for line in read_lines([path]):
        try:
            chunk = encode_lines(job, [line])
        except Exception:
            raise AssertionError(f"{line[2]!r} as {job.kind}:\n{traceback.format_exc()}") from None
        counts["rows"] += 1
        for _, _, reason in chunk.bad:
            assert reason and len(reason) < 1000 and "\n" not in reason, (line, reason)
            counts["bad"] += 1
        n = chunk.counts
        assert n["rows"] + n["split"] == n["trees"] + n["too_long"] + n["bad"], (line, n)
        if n["trees"] and not n["too_long"] and not n["truncated"]:
            counts["learned"] += 1
            ids = chunk.arrays["tokens"].tolist()
            learned = job.template.tokenizer.decode(ids, False)
            ignored = {name.removeprefix("ignored ") for name in n if name.startswith("ignored ")}
            ignored.add("completions[].response")  # between the best and the worst
            lost = lost_words(without(json.loads(line[2]), job.ignore), learned, ignored)
            assert not lost, f"{line[2]!r} as {job.kind} has lost {lost}; ignored {ignored}"


def check_file(path: Path, job: Job, home: Path) -> str:
    """Load a file as the scripts do. Return "" or the error, which must name the file."""
    try:
        load_dataset(
            [path],
            job.kind,
            job.template,
            job.max_length,
            job.overlong,
            max_bad_rows=10**6,
            cache=home / "cache",
            workers=1,
            log=lambda text: None,
            ignore=job.ignore,
        )
        load_prompts(
            [path], job.template, job.max_length, max_bad_rows=10**6, log=lambda text: None
        )
    except (ValueError, OSError, ImportError) as error:
        assert path.name in str(error) and "\n" not in str(error), f"names no file: {error}"
        return str(error)
    return ""


def run(home: Path, rows: int, seed: int) -> Counter:
    """Write, read and check rows, in files of 1 to 60. AssertionError: a law is broken."""
    rng = random.Random(seed)
    made, more = bases(), extras()
    more += [{"prompt": value, "messages": value, "response": value} for value in VALUES]
    templates = []
    for name, parts in chat_templates.MODELS.items():
        folder = chat_templates.save(home / name, *parts)
        templates.append(Template("auto", load_tokenizer(folder)))
    templates += [Template(name, load_tokenizer(folder)) for name in ("plain", "chatml", "zephyr")]
    counts: Counter = Counter()
    while counts["rows"] < rows:
        kind = rng.choice(list(made))
        batch = [odd_row(kind, made, more, rng) for _ in range(rng.randint(1, 60))]
        path = home / rng.choice(list(CONTAINERS))
        overlong = rng.choice(("drop", "truncate"))
        ignore = rng.choice(((), (), ("id", "thinking", "images")))
        job = Job([path], kind, rng.choice(templates), rng.choice((200, 4000)), overlong, ignore)
        place = f"seed {seed}, after {counts['rows']} rows, {path.name}, {job.template.name}"
        counts["files"] += 1
        try:
            damaged = write(path, batch, rng)
            plain = path.name.startswith(("rows.jsonl", "array")) and isinstance(batch[0], dict)
            if not damaged and plain:
                read = [json.loads(line) for _, _, line in read_lines([path])]
                assert repr(read) == repr(json.loads(json.dumps(batch))), "rows have changed"
            refused = check_file(path, job, home)
            try:
                check_rows(path, job, counts)
            except (ValueError, OSError) as error:
                assert refused, f"the reader alone refuses it: {error}"
            counts["damaged files"] += damaged
            counts["refused files"] += bool(refused)
        except Exception:
            raise AssertionError(f"{place}:\n{traceback.format_exc()}") from None
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000, help="rows to load, or a few more")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rows and the damage")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        counts = run(Path(home), flags.rows, flags.seed)
    print(f"seed {flags.seed}: {dict(counts)}, no traceback, nothing lost")


if __name__ == "__main__":
    main()
