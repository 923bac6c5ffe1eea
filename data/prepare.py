"""Convert public data sets into the JSONL that the train scripts read.

    python data/prepare.py ultrafeedback --out prefs           # from the hub (pip install datasets)
    python data/prepare.py gsm8k --out gsm8k --files train.jsonl test.jsonl     # downloaded files

Reads .jsonl, .json (one array, or an object a line), both also as .gz, and .parquet (pip install
pyarrow). Writes a file for each split and kind of row, `train_prefs.jsonl`, `train_sft.jsonl`;
shards of a split, and files of the same name, are joined:

    ultrafeedback  prefs {prompt, chosen, rejected, chosen_reward, rejected_reward};
                   sft {messages}, the chosen side
    ultrachat      sft {messages}
    hh             prefs {chosen, rejected}: transcripts, kept as text by --template plain, turned
                   into messages by the others
    tldr           prefs {prompt, chosen, rejected}; from TRL's files or OpenAI's comparisons
    gsm8k          sft {prompt, response, answer}; the response ends in "A: answer"
    helpsteer2     attributes {prompt, response, attributes};
                   prefs by helpfulness, with chosen_reward and rejected_reward

To add a data set, write one function, row in -> rows out, and one entry of SETS.
"""

import argparse
import gzip
import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

JSON = dict[str, Any]
Result = tuple[str, JSON | str]  # (kind, the row to write), or (kind, why it is skipped)

# Of HelpSteer2, 0 to 4 each.
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


# Functions of SETS: (row, the row before it or None) -> results.


def ultrafeedback(row: JSON, before: JSON | None) -> list[Result]:
    """Convert UltraFeedback as binarized for Zephyr (arXiv 2310.16944).

    https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized

    Pairs with equal scores stay, as in Zephyr's training; rewards are in the row to filter by.
    """
    chosen = _messages(row["chosen"])
    rejected = _messages(row["rejected"])
    rewards = {"chosen_reward": row["score_chosen"], "rejected_reward": row["score_rejected"]}
    demonstration = {"messages": chosen} if chosen[-1]["content"].strip() else "the answer is empty"
    return [_pair(row["prompt"], chosen, rejected, **rewards), ("sft", demonstration)]


def ultrachat(row: JSON, before: JSON | None) -> list[Result]:
    """Convert UltraChat as filtered for Zephyr (arXiv 2310.16944).

    https://huggingface.co/datasets/HuggingFaceH4/ultrachat_200k
    """
    messages = _messages(row["messages"])
    if not all(message["content"].strip() for message in messages):
        return [("sft", "a turn is empty")]
    return [("sft", {"messages": messages})]


def hh(row: JSON, before: JSON | None) -> list[Result]:
    """Convert HH-RLHF (arXiv 2204.05862), pairs of transcripts.

    https://huggingface.co/datasets/Anthropic/hh-rlhf
    """
    prompt, border, chosen = row["chosen"].rpartition("\n\nAssistant:")
    other_prompt, _, rejected = row["rejected"].rpartition("\n\nAssistant:")
    if not border or not prompt.startswith(("\n\nHuman:", "Human:")):
        return [("prefs", "not a transcript of Human and Assistant")]
    if prompt != other_prompt:  # the last answers belong to different questions
        return [("prefs", "the conversations differ before the last answer")]
    if "\n\nHuman:" in chosen + rejected:
        return [("prefs", "the last turn is the Human's")]
    kind, pair = _pair(prompt, chosen, rejected)
    if not isinstance(pair, str):
        pair = {"chosen": row["chosen"], "rejected": row["rejected"]}
    return [(kind, pair)]


def tldr(row: JSON, before: JSON | None) -> list[Result]:
    """Convert summaries of Reddit posts (arXiv 2009.01325), in TRL's form or OpenAI's.

    https://huggingface.co/datasets/trl-lib/tldr-preference
    https://github.com/openai/summarize-from-feedback, comparisons: info {subreddit, title, post},
    summaries, choice
    """
    if "summaries" not in row:
        return [_pair(row["prompt"], row["chosen"], row["rejected"])]
    info = row["info"]
    choice = row["choice"]
    summaries = row["summaries"]
    if not info.get("post"):
        return [("prefs", "not a Reddit post")]  # validation has news articles too
    if choice not in (0, 1) or len(summaries) != 2:
        raise ValueError(
            f"choice {choice} among {len(summaries)} summaries: it must be 0 or 1 of two"
        )
    prompt = (
        f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\n"
        f"POST: {info['post']}\n\nTL;DR:"
    )
    chosen, rejected = (" " + summaries[k]["text"].strip() for k in (choice, 1 - choice))
    return [_pair(prompt, chosen, rejected)]


def gsm8k(row: JSON, before: JSON | None) -> list[Result]:
    """Convert GSM8K (arXiv 2110.14168); its calculator marks, <<1+1=2>>, are removed.

    https://huggingface.co/datasets/openai/gsm8k
    """
    solution, border, answer = row["answer"].rpartition("####")
    solution = re.sub(r"<<.*?>>", "", solution).strip()
    answer = answer.strip().replace(",", "")
    if not border or not answer or not solution or not row["question"].strip():
        return [("sft", "no question, no solution or no '####' before the answer")]
    demonstration = {
        "prompt": row["question"],
        "response": f"{solution}\nA: {answer}",
        "answer": answer,
    }
    return [("sft", demonstration)]


def helpsteer2(row: JSON, before: JSON | None) -> list[Result]:
    """Convert HelpSteer2 (arXiv 2406.08673); neighbouring rows answer the same prompt.

    https://huggingface.co/datasets/nvidia/HelpSteer2
    """
    prompt = _helpsteer_prompt(row["prompt"])
    attributes = {name: row[name] for name in HELPSTEER}
    rated = {"prompt": prompt, "response": row["response"], "attributes": attributes}
    results = [("attributes", rated if row["response"].strip() else "the answer is empty")]
    if before is None or before["prompt"] != row["prompt"]:
        return results
    worse, better = sorted((before, row), key=lambda r: r["helpfulness"])
    if better["helpfulness"] == worse["helpfulness"]:
        return [*results, ("prefs", "a tie")]
    rewards = {"chosen_reward": better["helpfulness"], "rejected_reward": worse["helpfulness"]}
    return [*results, _pair(prompt, better["response"], worse["response"], **rewards)]


def _helpsteer_prompt(text: str) -> str | list[JSON]:
    """Return a prompt of one turn as text, of several as messages.

    "Hi\\n<extra_id_1>Assistant\\nHello.\\n<extra_id_1>User\\nTea?" -> three messages
    """
    first, *turns = re.split(r"\n?<extra_id_1>(User|Assistant)\n", text)  # role, text, role, ...
    if not turns:
        return first
    messages = [{"role": "user", "content": first}]
    for role, content in zip(turns[::2], turns[1::2]):
        messages.append({"role": role.lower(), "content": content})
    return messages


def _messages(messages: list[JSON]) -> list[JSON]:
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _pair(
    prompt: str | list[JSON], chosen: str | list[JSON], rejected: str | list[JSON], **more: float
) -> Result:
    """Return a preference row, or the reason to skip one."""
    answers = [
        side if isinstance(side, str) else side[-1]["content"] for side in (chosen, rejected)
    ]
    if not all(answer.strip() for answer in answers):
        return "prefs", "an answer is empty"
    if answers[0].strip() == answers[1].strip():
        return "prefs", "chosen equals rejected"
    return "prefs", {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


# name: (name on the hub, configuration, splits, row function). A split that is listed as NAME_KIND
# gives that kind of row alone.
SETS = {
    "ultrafeedback": (
        "HuggingFaceH4/ultrafeedback_binarized",
        None,
        ("train_prefs", "test_prefs", "train_sft", "test_sft"),
        ultrafeedback,
    ),
    "ultrachat": ("HuggingFaceH4/ultrachat_200k", None, ("train_sft", "test_sft"), ultrachat),
    "hh": ("Anthropic/hh-rlhf", None, ("train", "test"), hh),
    "tldr": ("trl-lib/tldr-preference", None, ("train", "validation"), tldr),
    "gsm8k": ("openai/gsm8k", "main", ("train", "test"), gsm8k),
    "helpsteer2": ("nvidia/HelpSteer2", None, ("train", "validation"), helpsteer2),
}
KINDS = ("prefs", "sft", "attributes")


def read_file(path: Path) -> Iterator[tuple[str, JSON]]:
    """Yield (place, row) for the rows of a file; a place is file:line or file:row.

    Errors name the file and say what can be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give --files the data files themselves")
    if path.suffix == ".parquet":
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise ImportError(f"{path} needs pyarrow: pip install pyarrow") from error
        batches = (batch.to_pylist() for batch in ParquetFile(path).iter_batches())
        rows = itertools.chain.from_iterable(batches)
        yield from ((f"{path}:{n}", row) for n, row in enumerate(rows, 1))
    elif path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            for n, line in enumerate(file, 1):
                try:
                    if n == 1 and line.lstrip().startswith(
                        "["
                    ):  # one array, on any number of lines
                        rows = json.loads(line + file.read())
                        yield from ((f"{path}:{k}", row) for k, row in enumerate(rows, 1))
                    elif line.strip():
                        yield f"{path}:{n}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path}:{n}: not JSON ({error}): download the file again"
                    ) from None
    else:
        raise ValueError(f"{path}: unknown kind of file: give .jsonl, .jsonl.gz, .json or .parquet")


def read_split(name: str, split: str) -> Iterator[tuple[str, JSON]]:
    """Yield (place, row) for the rows of a split on the Hugging Face hub."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            "the hub needs the package datasets: pip install datasets, or give --files"
        ) from error
    hub, configuration, _, _ = SETS[name]
    for n, row in enumerate(load_dataset(hub, configuration, split=split), 1):
        yield f"{hub} {split}:{n}", row


def convert(
    name: str, split: str, rows: Iterator[tuple[str, JSON]]
) -> Iterator[tuple[str, bytes | str]]:
    """Yield (output file, its next line as bytes), or (output file, reason of a skip as text).

    ValueError names the place of a bad row.
    """
    hub, _, splits, function = SETS[name]
    only = split.rpartition("_")[2] if split in splits and split.endswith(KINDS) else None
    before = None
    for place, row in rows:
        try:
            results = function(row, before)
            lines = [(kind, _line(result)) for kind, result in results]
            own_split = str(row.get("split") or "")  # OpenAI's files mix splits
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            reason = f"no column {error}" if isinstance(error, KeyError) else error
            columns = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise ValueError(
                f"{place}: not a row of {name} ({hub}): {reason}; the row has {columns}: "
                "check that the file belongs to this data set"
            ) from error
        target = own_split if re.fullmatch(r"\w+", own_split) else split.removesuffix(f"_{only}")
        for kind, line in lines:
            if only in (None, kind):
                yield f"{target}_{kind}.jsonl", line
        before = row


def _line(result: JSON | str) -> bytes | str:
    """Return a row as JSON, or the reason of a skip unchanged."""
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False).encode()


def write(out: Path, lines: Iterable[tuple[str, bytes | str]]) -> Counter:
    """Write each line to its file in `out`; return {(file, reason): rows}, reason None for written.

    All files are renamed to their names at the end; if anything fails before, none is.
    """
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, BinaryIO] = {}
    counts: Counter = Counter()
    try:
        for file, line in lines:
            reason = line if isinstance(line, str) else None
            counts[file, reason] += 1
            if isinstance(line, bytes):
                if file not in files:
                    files[file] = open(out / f".{file}.{os.getpid()}", "wb")  # noqa: SIM115
                files[file].write(line + b"\n")
        for name, stream in files.items():
            stream.close()
            os.replace(stream.name, out / name)
    finally:
        for stream in files.values():
            stream.close()
            Path(stream.name).unlink(missing_ok=True)
    return counts


def main(argv: list[str] | None = None) -> None:
    """Run the command. ValueError: nothing was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=SETS, help="the data set")
    parser.add_argument("--out", required=True, type=Path, help="folder for the JSONL files")
    parser.add_argument(
        "--files", nargs="+", type=Path, help="downloaded files of the data set; default: the hub"
    )
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="N rows of each split or file; 0: all"
    )
    args = parser.parse_args(argv)
    if args.files:
        # train-00000-of-00002.parquet -> train
        ending = re.compile(r"(-\d+-of-\d+.*)?\.(parquet|jsonl?)(\.gz)?$")
        sources = [(ending.sub("", file.name), read_file(file)) for file in args.files]
    else:
        sources = [(split, read_split(args.name, split)) for split in SETS[args.name][2]]

    def lines() -> Iterator[tuple[str, bytes | str]]:
        for split, rows in sources:
            yield from convert(args.name, split, itertools.islice(rows, args.limit or None))

    counts = write(args.out, lines())
    if not any(reason is None for _, reason in counts):
        reasons = ", ".join(f"{n} x {reason}" for (_, reason), n in counts.items())
        raise ValueError(
            f"nothing to write to {args.out} ({reasons or 'the input is empty'}): check --files"
        )
    for file in dict.fromkeys(file for file, _ in counts):
        reasons = ", ".join(
            f"{n} x {reason}" for (name, reason), n in counts.items() if name == file and reason
        )
        skipped = f"; skipped {reasons}" if reasons else ""
        print(f"{args.out / file}: {counts[file, None]} written{skipped}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"prepare.py: {error}")
