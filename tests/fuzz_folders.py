"""Mutate published-looking folders and open them: each opens, or says in one line what is wrong.

    python tests/fuzz_folders.py --runs 3000 --seed 0     about three minutes

A mutation changes config.json, generation_config.json, a tokenizer file, the weights' index or the
chat template: values of other kinds, keys of other files, cut or garbled bytes, a missing file. The
error must be a ValueError, OSError or ImportError whose text names the folder or a file in it.
test_folders.py runs a short part.
"""

import argparse
import copy
import json
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402

import hf  # noqa: E402
from data import toyworld  # noqa: E402
from data.templates import Template  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402
from weights.folder import load_model, save_model  # noqa: E402

NUMBERS = [0, 1, -1, 3, 7, 2**31, 2**63, 1e300, 0.5, -0.0, float("nan")]
TEXTS = ["", "x", "</s>", "<s>", "é\ud800"]
OBJECTS = [[], [1], ["a"], [None], [[]], {}, {"a": 1}, {"content": 5}, {"content": "<q>"}]
VALUES: list[Any] = [None, True, False, *NUMBERS, *TEXTS, *OBJECTS]
TEMPLATES = [
    "{{ messages[0]['content'] }}",
    "{% if",
    "{{ 1 / 0 }}",
    "{{ raise_exception('no') }}",
    "",
    "{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}",
]


def folders(home: Path) -> list[Path]:
    """Write tiny folders: sentencepiece and tokenizer.json, one weight file and an index."""
    toyworld.main(["make", "--out", str(home / "world"), *toy_sizes()])
    tokenizer = home / "world" / "tokenizer"
    made = []
    for family in ("llama", "qwen3", "gpt_neox"):
        flags = hf.New(family=family, width=16, layers=1, heads=2, ffn=8, tokenizer=str(tokenizer))
        folder = home / family
        save_model(hf.new_model(flags), folder, str(tokenizer))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3]}))
        (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
        (folder / "added_tokens.json").write_text("{}")
        made.append(folder)
    (home / "llama" / "tokenizer.model").unlink()  # tokenizer.json alone
    index = {"metadata": {}, "weight_map": {}}
    from safetensors import safe_open

    with safe_open(str(home / "qwen3" / "model.safetensors"), "pt") as file:
        index["weight_map"] = dict.fromkeys(file.keys(), "model.safetensors")
    (home / "qwen3" / "model.safetensors.index.json").write_text(json.dumps(index))
    return made


def toy_sizes() -> list[str]:
    """Return flags for a toy world of a few rows."""
    names = "base sft preferences preferences-test labels attributes attributes-test prompts-test"
    return [word for name in names.split() for word in (f"--{name}", "2")]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Return the paths of everything inside a JSON value."""
    paths = [path] if path else []
    if isinstance(value, (dict, list)):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in list(inner)[:400]:
            paths += places(one, (*path, key))
    return paths


def mutate_json(content: Any, others: list[dict], rng: random.Random) -> Any:
    """Return a JSON value with one to three changes."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        paths = places(content)
        if rng.random() < 0.15 or not paths or not isinstance(content, dict):
            return rng.choice(VALUES)
        kind = rng.choice(("set", "set", "set", "drop", "key", "borrow"))
        if kind == "borrow":
            other = rng.choice(others)
            if other:
                key = rng.choice(list(other))
                content[key] = rng.choice((other[key], rng.choice(VALUES)))
            continue
        if kind == "key":
            content[rng.choice(("eos_token", "x_token", "legacy", "17"))] = rng.choice(VALUES)
            continue
        path = rng.choice([p for p in paths if len(p) == 1] if rng.random() < 0.5 else paths)
        owner = content
        for key in path[:-1]:
            owner = owner[key]
        if kind == "drop":
            del owner[path[-1]]
        else:
            owner[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    return content


def mutate(folder: Path, rng: random.Random) -> str:
    """Change one file of a folder and return words for what was done."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".jinja")]
    path = rng.choice(files + [folder / "chat_template.jinja"])
    kind = rng.choice(("json", "json", "json", "json", "cut", "garble", "missing"))
    if path.suffix == ".jinja":
        path.write_text(rng.choice(TEMPLATES))
        return "template"
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif kind == "garble":
        changed = bytearray(content)
        for _ in range(3):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(changed)
    else:
        others = [json.loads(file.read_text()) for file in files if file.suffix == ".json"]
        changed = mutate_json(json.loads(content), others, rng)
        path.write_text(json.dumps(changed), encoding="utf-8", errors="surrogatepass")
    return f"{path.name}, {kind}"


def open_folder(folder: Path) -> str:
    """Open a folder as the scripts do. Return "" or the error; raise what nobody should see."""
    try:
        template = Template("auto", load_tokenizer(folder))
        load_model(folder, torch.float32)
        hf.describe(str(folder))
    except (ValueError, OSError, ImportError) as error:
        return str(error)
    try:
        template.pair("a question", ["an answer"])
    except ValueError as error:  # names the row, in the scripts
        return f"{folder}: {error}"
    return ""


def run(home: Path, runs: int, seed: int) -> Counter:
    """Mutate and open folders; return counts. AssertionError: a traceback, or nothing is named."""
    rng = random.Random(seed)
    made = folders(home)
    counts: Counter = Counter()
    for n in range(runs):
        folder = home / "mutated"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(rng.choice(made), folder)
        what = mutate(folder, rng)
        try:
            said = open_folder(folder)
        except Exception:
            raise AssertionError(f"run {n} ({what}):\n{traceback.format_exc()}") from None
        named = str(folder) in said or "template" in said
        assert not said or named, f"run {n} ({what}) names no file: {said}"
        assert "\n" not in said.strip() or "template" in said, f"run {n}: {said}"
        counts["refused" if said else "opened"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3000, help="folders to mutate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        counts = run(Path(home), flags.runs, flags.seed)
    print(f"{flags.runs} folders, seed {flags.seed}: {dict(counts)}, no traceback")


if __name__ == "__main__":
    main()
