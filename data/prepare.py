"""Public data sets into the JSONL that the train scripts read.

    python data/prepare.py ultrafeedback --out prefs                       # from the hub (pip install datasets)
    python data/prepare.py gsm8k --out gsm8k --files train.jsonl test.jsonl  # files you already have

Files may be .jsonl, .json (one array, or an object a line), either of them .gz, or .parquet (pip install pyarrow).
A split gives a file a kind of row, `train_prefs.jsonl`, `train_sft.jsonl`; shards and files of one name are joined:

    ultrafeedback  prefs {prompt, chosen, rejected, chosen_reward, rejected_reward}, sft {messages}: the chosen side
    hh             prefs {chosen, rejected}: transcripts, which the templates split (plain) or turn into messages (chat)
    tldr           prefs {prompt, chosen, rejected}; files in TRL's form or OpenAI's comparisons
    gsm8k          sft {prompt, response, answer}; the response ends in "A: answer"
    helpsteer2     attributes {prompt, response, attributes}, prefs by helpfulness with chosen_reward, rejected_reward

Another data set is one function, a row in -> rows out, and one line of SETS.
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
from typing import Any

JSON = dict[str, Any]
Result = tuple[str, JSON | str]  # (kind, the row to write), or (kind, why there is none)

HELPSTEER = (
    "helpfulness",
    "correctness",
    "coherence",
    "complexity",
    "verbosity",
)  # its attributes, each 0 to 4


def ultrafeedback(row: JSON, before: JSON | None) -> list[Result]:
    """https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized, of Zephyr (arXiv 2310.16944).

    Equal scores stay, as in Zephyr's training: the rewards are in the row for those who want them out.
    """
    chosen, rejected = (
        [{"role": m["role"], "content": m["content"]} for m in row[k]]
        for k in ("chosen", "rejected")
    )
    rewards = {"chosen_reward": row["score_chosen"], "rejected_reward": row["score_rejected"]}
    demonstration = {"messages": chosen} if chosen[-1]["content"].strip() else "the answer is empty"
    return [_pair(row["prompt"], chosen, rejected, **rewards), ("sft", demonstration)]


def hh(row: JSON, before: JSON | None) -> list[Result]:
    """https://huggingface.co/datasets/Anthropic/hh-rlhf (arXiv 2204.05862): pairs of transcripts."""
    sides = [row["chosen"], row["rejected"]]
    (prompt, border, chosen), (other, _, rejected) = (
        side.rpartition("\n\nAssistant:") for side in sides
    )
    if not border or not prompt.startswith(("\n\nHuman:", "Human:")):
        return [("prefs", "not a transcript of Human and Assistant")]
    if prompt != other:  # the last answers belong to different questions
        return [("prefs", "the conversations part before the last answer")]
    if "\n\nHuman:" in chosen + rejected:
        return [("prefs", "the last turn is the Human's")]
    kind, pair = _pair(prompt, chosen, rejected)
    return [(kind, pair if isinstance(pair, str) else {"chosen": sides[0], "rejected": sides[1]})]


def tldr(row: JSON, before: JSON | None) -> list[Result]:
    """Summaries of Reddit posts (arXiv 2009.01325): https://huggingface.co/datasets/trl-lib/tldr-preference, or the
    comparisons of https://github.com/openai/summarize-from-feedback: info {subreddit, title, post}, summaries, choice.
    """
    if "summaries" not in row:
        return [_pair(row["prompt"], row["chosen"], row["rejected"])]
    info, choice = row["info"], row["choice"]
    if not info.get("post"):
        return [("prefs", "not a Reddit post")]  # validation holds news articles too
    if choice not in (0, 1) or len(row["summaries"]) != 2:
        raise ValueError(
            f"choice {choice} among {len(row['summaries'])} summaries: it must be 0 or 1 of two"
        )
    prompt = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {info['post']}\n\nTL;DR:"
    chosen, rejected = (" " + row["summaries"][k]["text"].strip() for k in (choice, 1 - choice))
    return [_pair(prompt, chosen, rejected)]


def gsm8k(row: JSON, before: JSON | None) -> list[Result]:
    """https://huggingface.co/datasets/openai/gsm8k (arXiv 2110.14168), its <<1+1=2>> for a calculator removed."""
    solution, border, answer = row["answer"].rpartition("####")
    solution = re.sub(r"<<.*?>>", "", solution).strip()
    answer = answer.strip().replace(",", "")
    if not border or not answer or not solution or not row["question"].strip():
        return [("sft", "no question, no solution or no '####' before the answer")]
    return [
        (
            "sft",
            {"prompt": row["question"], "response": f"{solution}\nA: {answer}", "answer": answer},
        )
    ]


def helpsteer2(row: JSON, before: JSON | None) -> list[Result]:
    """https://huggingface.co/datasets/nvidia/HelpSteer2 (arXiv 2406.08673): neighbours answer one prompt."""
    first, *turns = re.split(
        r"\n?<extra_id_1>(User|Assistant)\n", row["prompt"]
    )  # turns: role, text, role, text, ...
    roles, texts = ["User", *turns[::2]], [first, *turns[1::2]]
    prompt = (
        [{"role": role.lower(), "content": text} for role, text in zip(roles, texts)]
        if turns
        else first
    )
    rated = {
        "prompt": prompt,
        "response": row["response"],
        "attributes": {name: row[name] for name in HELPSTEER},
    }
    rows = [("attributes", rated if row["response"].strip() else "the answer is empty")]
    if before is not None and before["prompt"] == row["prompt"]:
        worse, better = sorted((before, row), key=lambda r: r["helpfulness"])
        rewards = {"chosen_reward": better["helpfulness"], "rejected_reward": worse["helpfulness"]}
        tie = better["helpfulness"] == worse["helpfulness"]
        rows += [
            ("prefs", "a tie")
            if tie
            else _pair(prompt, better["response"], worse["response"], **rewards)
        ]
    return rows


def _pair(
    prompt: str | list[JSON], chosen: str | list[JSON], rejected: str | list[JSON], **more: float
) -> Result:
    """A preference row, or why these two answers teach nothing."""
    answers = [
        side if isinstance(side, str) else side[-1]["content"] for side in (chosen, rejected)
    ]
    if not all(answer.strip() for answer in answers):
        return "prefs", "an answer is empty"
    if answers[0].strip() == answers[1].strip():
        return "prefs", "chosen equals rejected"
    return "prefs", {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


SETS = {  # name: (on the hub, configuration, splits, row function); a split listed as ..._kind gives that kind alone
    "ultrafeedback": (
        "HuggingFaceH4/ultrafeedback_binarized",
        None,
        ("train_prefs", "test_prefs", "train_sft", "test_sft"),
        ultrafeedback,
    ),
    "hh": ("Anthropic/hh-rlhf", None, ("train", "test"), hh),
    "tldr": ("trl-lib/tldr-preference", None, ("train", "validation"), tldr),
    "gsm8k": ("openai/gsm8k", "main", ("train", "test"), gsm8k),
    "helpsteer2": ("nvidia/HelpSteer2", None, ("train", "validation"), helpsteer2),
}
KINDS = ("prefs", "sft", "attributes")


def read_file(path: Path) -> Iterator[tuple[str, JSON]]:
    """The rows of a file, each with its place (file:line, or file:row). Errors say what can be read."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give --files the data files themselves")
    if path.suffix == ".parquet":
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise ImportError(f"{path} needs pyarrow: pip install pyarrow") from error
        rows = itertools.chain.from_iterable(
            batch.to_pylist() for batch in ParquetFile(path).iter_batches()
        )
        yield from ((f"{path}:{n}", row) for n, row in enumerate(rows, 1))
    elif path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for n, line in enumerate(file, 1):
                try:
                    if n == 1 and line.lstrip().startswith(
                        "["
                    ):  # one array, however it is broken into lines
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
    """The rows of a split on the Hugging Face hub, each with its place."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            "the hub needs datasets: pip install datasets, or give --files already downloaded"
        ) from error
    hub, configuration, _, _ = SETS[name]
    for n, row in enumerate(load_dataset(hub, configuration, split=split), 1):
        yield f"{hub} {split}:{n}", row


def converted(
    name: str, split: str, rows: Iterator[tuple[str, JSON]]
) -> Iterator[tuple[str, bytes | str]]:
    """(output file, its next line) or (output file, why a row is skipped). ValueError names the place of a bad row."""
    hub, _, splits, function = SETS[name]
    only = split.rpartition("_")[2] if split in splits and split.endswith(KINDS) else None
    before = None
    for place, row in rows:
        try:
            results = function(row, before)
            lines = [
                (k, r if isinstance(r, str) else json.dumps(r, ensure_ascii=False).encode())
                for k, r in results
            ]
            own = str(
                row.get("split") or ""
            )  # OpenAI's files mix splits and say in each row which it is
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            what = f"no column {error}" if isinstance(error, KeyError) else error
            has = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            advice = "check that the file belongs to this data set"
            raise ValueError(
                f"{place}: not a row of {name} ({hub}): {what}; the row has {has}: {advice}"
            ) from error
        target = own if re.fullmatch(r"\w+", own) else split.removesuffix(f"_{only}")
        yield from (
            (f"{target}_{kind}.jsonl", line) for kind, line in lines if only in (None, kind)
        )
        before = row


def write(out: Path, lines: Iterable[tuple[str, bytes | str]]) -> Counter:
    """Write each line to its file in `out`; how often (file, None = written, or the reason of a skip) came.

    The files get their names together at the end; when anything fails before, none does.
    """
    out.mkdir(parents=True, exist_ok=True)
    files, counts = {}, Counter()
    try:
        for file, line in lines:
            counts[file, line if isinstance(line, str) else None] += 1
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
    """The command. ValueError when nothing could be written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=SETS, help="the data set")
    parser.add_argument("--out", required=True, type=Path, help="folder for the JSONL files")
    parser.add_argument(
        "--files", nargs="+", type=Path, help="downloaded files of the data set, instead of the hub"
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="first N rows of each split or file; 0 is all"
    )
    args = parser.parse_args(argv)
    if args.files:
        ending = re.compile(
            r"(-\d+-of-\d+.*)?\.(parquet|jsonl?)(\.gz)?$"
        )  # train-00000-of-00002.parquet -> train
        sources = [(ending.sub("", file.name), read_file(file)) for file in args.files]
    else:
        sources = [(split, read_split(args.name, split)) for split in SETS[args.name][2]]
    limited = ((split, itertools.islice(rows, args.limit or None)) for split, rows in sources)
    counts = write(
        args.out, (line for split, rows in limited for line in converted(args.name, split, rows))
    )
    if not any(reason is None for _, reason in counts):
        reasons = (
            ", ".join(f"{n} x {reason}" for (_, reason), n in counts.items())
            or "the input is empty"
        )
        raise ValueError(f"nothing to write to {args.out} ({reasons}): check --files")
    for file in dict.fromkeys(file for file, _ in counts):
        skipped = [
            f"{n} x {reason}" for (name, reason), n in counts.items() if name == file and reason
        ]
        print(
            f"{args.out / file}: {counts[file, None]} written"
            + f"; skipped {', '.join(skipped)}" * bool(skipped)
        )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"prepare.py: {error}")
