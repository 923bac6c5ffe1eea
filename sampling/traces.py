"""Traces of constitution.py, OUT/trace.jsonl, and the rows that come out of them.

A trace is one line a prompt: {row, prompt, draft, rounds, ended, pairs}. The first line of the file
is the key of the run. Whatever a kill leaves of it, the same command ends with the same lines.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np

from data.rows import write_rows
from sampling.constitution import Constitution
from sampling.judge import LEAST_MASS

# Flags that decide no text: files, which are hashed apart, and the choice among finished pairs.
FREE = set("model data out limit principles rollout_url rollout_timeout".split())
FREE |= {"min_confidence", "consistent"}


def run_key(rows: list[dict], rules: Constitution, model: str, flags: dict) -> dict[str, str]:
    """Return what decides the texts, hashed: model, rows, principles and flags."""
    settings = {name: value for name, value in flags.items() if name not in FREE}
    text = json.dumps([model, rows, rules._asdict(), settings])
    return {"run": hashlib.sha256(text.encode()).hexdigest()}


def finished(path: Path, key: dict[str, str], batch: int, total: int) -> list[dict]:
    """Return the traces of whole batches that a stopped run has left, [] if there was none.

    ValueError: they are those of another run.
    """
    if not path.exists():
        return []
    entries = []
    # Lines end at line feeds alone: an answer may hold other line separators.
    for line in path.read_bytes().split(b"\n"):
        try:
            entries.append(json.loads(line))
        except ValueError:  # cut off in the middle of a line, or the end
            break
    if entries and entries[0] != key:
        raise ValueError(
            f"{path} is from a run with another model, other data, principles or flags: choose "
            "another --out, or remove it"
        )
    done = entries[1:]
    if len(done) < total:  # a batch is computed as a whole: its sums round as they did
        done = done[: len(done) // batch * batch]
    return done


# ---- rows out ------------------------------------------------------------------------------------


def label(logps: list[list[float]]) -> tuple[float, bool, float]:
    """Return P(the first answer is better), whether both orders agree, and the replies' least mass.

    [[ln 0.6, ln 0.2], [ln 0.3, ln 0.1]]: in front the first wins by 0.75, behind it by 0.25, so
    -> (0.5, False, 0.4).
    """
    table = np.array(logps)  # (orders, choices)
    chances = np.exp(table - table.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    in_front, behind = chances[0, 0], chances[1, 1]
    agree = (in_front - 0.5) * (behind - 0.5) > 0
    return float(in_front + behind) / 2, bool(agree), float(np.exp(table).sum(1).min())


def sft_rows(trace: dict, counts: Counter[str]) -> list[dict]:
    """Return the row of a prompt's last revision, [] if it has none that can be learned."""
    if not trace["rounds"]:
        return []
    answer = trace["rounds"][-1]["revision"]
    if not answer or not trace["ended"]:
        counts["revisions that were cut or are empty"] += 1
        return []
    counts["revisions like their draft"] += answer == trace["draft"]
    why = {"draft": trace["draft"], "rounds": trace["rounds"], "row": trace["row"]}
    return [{**trace["prompt"], "response": answer, **why}]


def pair_rows(trace: dict, least: float, consistent: bool, counts: Counter[str]) -> list[dict]:
    """Return the rows of a prompt's pairs that can be learned, the better answer as chosen."""
    rows = []
    for pair in trace["pairs"]:
        probability, agree, mass = label(pair["logps"])
        counts["pairs"] += 1
        counts["agree"] += agree
        counts["unparsable"] += mass < LEAST_MASS
        answers, logps = pair["answers"], pair["logps"]
        if answers[0] == answers[1] or not all(answers) or not all(pair["ended"]):
            counts["pairs of equal, cut or empty answers"] += 1
            continue
        better = int(probability < 0.5)
        confidence = max(probability, 1 - probability)
        if confidence == 0.5 or confidence < least:
            counts["pairs without a label that is sure enough"] += 1
            continue
        if consistent and not agree:
            counts["pairs whose winner depends on the order"] += 1
            continue
        row = {**trace["prompt"], "chosen": answers[better], "rejected": answers[1 - better]}
        row |= {"principle": pair["principle"], "probability": confidence, "consistent": agree}
        # By the place of the chosen answer: [log-prob of the first choice, of the second].
        row["logps"] = {"chosen_first": logps[better], "chosen_second": logps[1 - better]}
        rows.append({**row, "row": trace["row"]})
    return rows


def write_results(traces: list[dict], out: str, least: float, consistent: bool) -> None:
    """Write sft.jsonl and pairs.jsonl, and print what became of the prompts.

    least: probability of a label; consistent: keep only pairs with one winner in both orders.
    """
    counts: Counter[str] = Counter()
    revised = [row for trace in traces for row in sft_rows(trace, counts)]
    compared = [row for trace in traces for row in pair_rows(trace, least, consistent, counts)]
    n = counts.pop("pairs", 0)
    agree, unparsable = counts.pop("agree", 0), counts.pop("unparsable", 0)
    for name, rows in (("sft", revised), ("pairs", compared)):
        write_rows(Path(out) / f"{name}.jsonl", rows)
        print(f"{len(rows)} rows from {len(traces)} prompts in {out}/{name}.jsonl")
    if n:
        print(
            f"{n} comparisons: {agree / n:.3f} have the same winner in both orders; {unparsable} "
            f"with replies unparsable (choices below {LEAST_MASS:.0%} likely)"
        )
    for what, count in counts.items():
        if count:
            print(f"{count} {what}")
