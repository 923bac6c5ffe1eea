"""Soak tests by hand: runs that are killed, damaged or long must equal runs that are not.

    python tests/soak.py kills     every script on one and two ranks, 15 kills each; ten minutes
    python tests/soak.py damage    100 runs that resume over a damaged checkpoint or cache
    python tests/soak.py flat      3,000 steps of DPO and REINFORCE: memory and open files stay flat

Real processes and real signals: SIGTERM or SIGKILL, to one rank or all, at random times or in the
middle of saving. Each part prints its seed and counts, and its exit status is 0 only if every final
weight, every row of metrics and every sample is equal bit for bit. test_soak.py runs a short part.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from forked import Ranks  # noqa: E402
from launch import weights_in  # noqa: E402

import checkpoint  # noqa: E402
import hf  # noqa: E402
import runtime  # noqa: E402
import train_distill  # noqa: E402
import train_dpo  # noqa: E402
import train_kto  # noqa: E402
import train_ppo  # noqa: E402
import train_reinforce  # noqa: E402
import train_rm  # noqa: E402
import train_sft  # noqa: E402
import train_steerlm  # noqa: E402
from data import toyworld  # noqa: E402
from disk import lines_of  # noqa: E402
from weights.folder import save_model  # noqa: E402

COMMON = "--device cpu --lr 1e-3 --epochs 9999 --max-tokens 300 --keep 3 --timeout-minutes 2"
ONLINE = "--group-size 2 --max-new-tokens 8 --reward regex:[aeiou]"
SCRIPTS = {  # name: (script, rows of the toy world, flags); bco_pair carries a mean between steps
    "sft": (train_sft, "sft", "--batch-size 4"),
    "dpo": (train_dpo, "preferences", "--batch-size 4 --loss bco_pair"),
    "kto": (train_kto, "labels", "--batch-size 4"),
    "rm": (train_rm, "preferences", "--batch-size 4"),
    "ppo": (train_ppo, "sft", f"--batch-size 4 {ONLINE} --ppo-epochs 2 --kl-target 1"),
    "reinforce": (train_reinforce, "sft", f"--batch-size 4 {ONLINE} --kl 0.1"),
    "steerlm": (
        train_steerlm,
        "sft",
        "--batch-size 4 --answers 2 --max-new-tokens 8 --ask helpfulness:4 "
        "--model HOME/steered/final --predictor HOME/predictor/final",
    ),
    "distill": (train_distill, "sft", "--batch-size 4 --teacher HOME/model"),
}
LAYOUTS = {1: [""], 2: ["", "--tp 2", "--pp 2", "--zero 2"]}


@dataclass
class Use:
    """Memory (MiB) and open files of one process, by step."""

    steps: list[int] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def read(self, pid: int, step: int) -> None:
        """Add the state of a process, unless it has just ended or nothing has happened since."""
        if self.steps and step < self.steps[-1] + 10:
            return
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            files = len(os.listdir(f"/proc/{pid}/fd"))
        except (OSError, IndexError):
            return
        self.steps.append(step)
        self.memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        self.files.append(files)


# ---- runs ----------------------------------------------------------------------------------------


def make_inputs(home: Path) -> None:
    """Write a toy world, a random model of one layer, and what SteerLM needs under `home`."""
    sizes = {"sft": 64, "preferences": 64, "labels": 64, "attributes": 64}
    words = [word for name, n in sizes.items() for word in (f"--{name}", str(n))]
    toyworld.main(["make", "--out", str(home / "world"), *words])
    tokenizer = str(home / "world" / "tokenizer")
    flags = hf.New(width=16, layers=2, heads=2, ffn=32, std=0.2, tokenizer=tokenizer)
    save_model(hf.new_model(flags), home / "model", tokenizer)
    shared = ["--model", home / "model", "--data", home / "world" / "attributes.jsonl"]
    shared += ["--max-steps", 2, "--device", "cpu"]
    runs = [
        (train_sft, ["--attributes", "--out", home / "steered"]),
        (train_rm, ["--loss", "regression", "--out", home / "predictor"]),
    ]
    for script, more in runs:
        argv = [str(word) for word in [*shared, *more]]
        ranks = Ranks(1, lambda _: script.main(argv), home / "logs")  # noqa: B023 - runs now
        if ranks.wait() != [0]:
            sys.exit(ranks.text(0))


def words_of(name: str, home: Path, out: Path, steps: int, layout: str) -> list[str]:
    """Return the flags of a script's run; a later flag replaces an earlier one."""
    _, rows, more = SCRIPTS[name]
    files = f"--model HOME/model --data HOME/world/{rows}.jsonl --out {out} --resume auto"
    if "--model" in more:
        files = files.replace("--model HOME/model ", "")
    saving = f"--max-steps {steps} --save-every {max(2, steps // 15)}"
    words = f"{files} {COMMON} {saving} {more} {layout}"
    return words.replace("HOME", str(home)).split()


def start(name: str, world: int, words: list[str], logs: Path) -> Ranks:
    """Start a script on some ranks."""
    script = SCRIPTS[name][0]

    def body(rank: int) -> None:
        runtime.PATIENCE = 2.0
        runtime.run(lambda: script.main(words))

    return Ranks(world, body, logs)


def finish(name: str, world: int, words: list[str], logs: Path, use: Use | None = None) -> str:
    """Run a script to its end and return what rank 0 said. Exits where a rank fails."""
    ranks = start(name, world, words, logs)
    out = Path(words[words.index("--out") + 1])
    while use and ranks.processes[0].is_alive():
        use.read(ranks.processes[0].pid, last_step(out))
        time.sleep(0.02)
    if ranks.wait() != [0] * world:
        fail(f"{name} on {world} rank(s) failed", ranks)
    return ranks.text(0)


def fail(why: str, ranks: Ranks) -> None:
    """Exit with the end of what every rank said."""
    said = (f"--- rank {r}: {ranks.text(r)[-2000:]}" for r in range(len(ranks.processes)))
    sys.exit("\n".join([f"FAILED: {why}", *said]))


def last_step(out: Path) -> int:
    """Return the last step in metrics.jsonl, 0 without one; reads only the end of the file."""
    try:
        with open(out / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            lines = file.read().split(b"\n")
    except OSError:
        return 0
    for line in reversed(lines[:-1]):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def rows_of(path: Path) -> list[dict]:
    """Return the rows of a log without times and memory."""
    rows = [json.loads(line) for line in lines_of(path.read_text())] if path.exists() else []
    for row in rows:
        for key in [k for k in row if "second" in k or "memory" in k]:
            del row[key]
    return rows


def difference(whole: Path, other: Path) -> str:
    """Return what differs between two finished runs; "" where nothing does."""
    for path in sorted(whole.glob("final/**/*.safetensors")):
        folder = path.parent.relative_to(whole)
        one, two = weights_in(whole / folder), weights_in(other / folder)
        wrong = [key for key in one if key not in two or not torch.equal(one[key], two[key])]
        if one.keys() != two.keys() or wrong:
            return f"{len(wrong)} of {len(one)} weights of {folder}, first {wrong[:1]}"
    for log in ("metrics.jsonl", "samples.jsonl", "bootstrap.jsonl"):
        if rows_of(whole / log) != rows_of(other / log):
            return log
    if not any(whole.glob("final/**/*.safetensors")) or not rows_of(whole / "metrics.jsonl"):
        return "nothing to compare"
    return ""


# ---- kills ---------------------------------------------------------------------------------------


def strike(ranks: Ranks, out: Path, rng: random.Random, steps: int) -> str:
    """Send a random signal at a random moment; return words for it, "" if the run ended first."""
    world = len(ranks.processes)
    number = rng.choice((signal.SIGTERM, signal.SIGKILL))
    moment = rng.choice(("any time", "any time", "saving", "starting"))
    victims = rng.choice(([rng.randrange(world)], list(range(world))))
    at = last_step(out) + rng.randrange(1, max(2, steps // 6))
    began, delay = time.monotonic(), rng.uniform(0.0, 0.6)
    left = set(out.glob(".*.partial"))  # by an earlier kill
    while all(process.is_alive() for process in ranks.processes):
        if moment == "starting" and time.monotonic() > began + delay:
            break
        if moment == "saving" and set(out.glob(".*.partial")) - left:
            break
        if moment == "any time" and last_step(out) >= at:
            time.sleep(rng.uniform(0.0, 0.02))
            break
        time.sleep(0.001)
    alive = [rank for rank in victims if ranks.processes[rank].is_alive()]
    for rank in alive:
        os.kill(ranks.processes[rank].pid, number)
    who = f"{len(victims)} of {world}"
    return f"{signal.Signals(number).name}, {moment}, {who}" if alive else ""


def check_codes(codes: list[int | None], kind: str, ranks: Ranks) -> None:
    """Exit where a rank hung, or ended as neither the signal nor the others' end explains.

    While the ranks find each other, only torchrun's agent sees that one of them is dead.
    """
    allowed: set[int | None] = {0, -signal.SIGTERM, -signal.SIGKILL, 1}
    if "starting" in kind and "1 of 2" in kind:
        allowed.add(None)
    if any(code not in allowed for code in codes):
        fail(f"exit codes {codes} after {kind}", ranks)
    if kind.startswith("SIGTERM") and len(codes) == 1 and codes[0] == 1:
        fail("SIGTERM ended a run with an error", ranks)


def kill_run(
    name: str, world: int, layout: str, kills: int, steps: int, home: Path, rng: random.Random
) -> Counter:
    """Kill a run some times, let it end, and compare it with one that nobody killed.

    Returns how often each kind of kill struck. Exits where the two differ.
    """
    what = f"{name} {world} {layout}".strip().replace(" ", "_")
    whole, killed, logs = home / f"{what}.whole", home / f"{what}.killed", home / f"{what}.logs"
    finish(name, world, words_of(name, home, whole, steps, layout), logs / "whole")
    words = words_of(name, home, killed, steps, layout)
    struck: Counter = Counter()
    for n in range(kills):
        ranks = start(name, world, words, logs / str(n))
        kind = strike(ranks, killed, rng, steps)
        codes = ranks.wait(seconds=20)
        if not kind:
            if codes != [0] * world:
                fail(f"{what} ended by itself with {codes}", ranks)
            break
        check_codes(codes, kind, ranks)
        struck[kind] += 1
        if (killed / "final").exists():
            break
    if not (killed / "final").exists():
        finish(name, world, words, logs / "last")
    wrong = difference(whole, killed)
    if wrong:
        sys.exit(f"FAILED: {what} after {dict(struck)}: {wrong} differs; kept in {home}")
    for folder in (whole, killed, logs):
        shutil.rmtree(folder)
    return struck


def kills(flags: argparse.Namespace, home: Path) -> None:
    """Kill every script on one and two ranks."""
    rng = random.Random(flags.seed)
    total: Counter = Counter()
    for name in flags.scripts:
        for world in flags.ranks:
            began = time.monotonic()
            layout = rng.choice(LAYOUTS[world])
            struck = kill_run(name, world, layout, flags.kills, flags.steps, home, rng)
            total += struck
            seconds = time.monotonic() - began
            print(
                f"{name} on {world} {layout}: {struck.total()} kills, equal bit for bit "
                f"({seconds:.0f} s)",
                flush=True,
            )
    for kind, count in sorted(total.items()):
        print(f"{count:4d}  {kind}")
    print(f"{total.total()} kills, seed {flags.seed}: every run equal bit for bit")


# ---- damage --------------------------------------------------------------------------------------


def flip(path: Path, rng: random.Random) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    """Cut the file short."""
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def zero(path: Path, rng: random.Random) -> None:
    """Put zeros in the place of up to 512 bytes that are not all zero, as a lost block would."""
    content = bytearray(path.read_bytes())
    at = rng.choice([place for place, byte in enumerate(content) if byte])
    content[at : at + 512] = bytes(len(content[at : at + 512]))
    path.write_bytes(content)


def grow(path: Path, rng: random.Random) -> None:
    """Append random bytes."""
    with open(path, "ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 64)))


DAMAGE: dict[str, Callable[[Path, random.Random], None]] = {
    "bit flipped": flip,
    "cut": cut,
    "block of zeros": zero,
    "bytes appended": grow,
    "deleted": lambda path, rng: path.unlink(),
}


def damage(flags: argparse.Namespace, home: Path) -> None:
    """Resume over one damaged file of the newest checkpoint or of the cache, many times."""
    rng = random.Random(flags.seed)
    total: Counter = Counter()
    whole, stopped, logs = home / "whole", home / "stopped", home / "logs"
    words = words_of("dpo", home, whole, flags.steps, "")
    finish("dpo", 1, words, logs)
    half = words_of("dpo", home, stopped, flags.steps, "")
    ranks = start("dpo", 1, half, logs)
    while last_step(stopped) < flags.steps // 2 and ranks.processes[0].is_alive():
        time.sleep(0.001)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    if ranks.wait() != [0] or (stopped / "final").exists():
        fail("the run to damage did not stop", ranks)
    for n in range(flags.runs):
        out = home / f"damaged_{n}"
        shutil.copytree(stopped, out)
        newest = checkpoint.newest(out)
        folder = rng.choice((newest, out / "cache"))
        files = [path for path in folder.rglob("*") if path.is_file()]
        path = rng.choice([path for path in sorted(files) if path.stat().st_size])
        kind = rng.choice(sorted(DAMAGE))
        DAMAGE[kind](path, rng)
        place = "cache" if "cache" in path.parts else "checkpoint"
        finish("dpo", 1, words_of("dpo", home, out, flags.steps, ""), logs)
        wrong = difference(whole, out)
        if wrong:
            sys.exit(f"FAILED: {kind}: {path.relative_to(out)}: {wrong} differs; kept in {home}")
        total[f"{place}, {kind}"] += 1
        shutil.rmtree(out)
    for kind, count in sorted(total.items()):
        print(f"{count:4d}  {kind}")
    print(f"{total.total()} damaged files, seed {flags.seed}: every run equal bit for bit")


# ---- long runs -----------------------------------------------------------------------------------


def growth(values: list[float]) -> float:
    """Return the median of the last quarter minus that of the second."""
    quarter = len(values) // 4
    return statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter])


def flat(flags: argparse.Namespace, home: Path) -> None:
    """Run long with kills, and watch memory and open files of every process of 400 steps or more.

    Exits where a process gains more than 4 MiB from its second quarter to its last, or any file.
    """
    for name in flags.scripts:
        whole, killed, logs = home / f"{name}.w", home / f"{name}.k", home / "logs"
        uses = [Use()]
        finish(name, 1, words_of(name, home, whole, flags.steps, ""), logs, uses[0])
        words = words_of(name, home, killed, flags.steps, "")
        marks = [flags.steps * n // (flags.kills + 1) for n in range(1, flags.kills + 1)]
        for n, mark in enumerate(marks):
            ranks, use = start(name, 1, words, logs), Use()
            uses.append(use)
            while ranks.processes[0].is_alive() and last_step(killed) < mark:
                use.read(ranks.processes[0].pid, last_step(killed))
                time.sleep(0.02)
            if not ranks.processes[0].is_alive():
                fail(f"{name} ended by itself", ranks)
            os.kill(ranks.processes[0].pid, (signal.SIGTERM, signal.SIGKILL)[n % 2])
            ranks.wait()
        uses.append(Use())
        finish(name, 1, words, logs, uses[-1])
        wrong = difference(whole, killed)
        if wrong:
            sys.exit(f"FAILED: {name}: {wrong} differs; kept in {home}")
        for use in uses:
            if use.steps[-1] - use.steps[0] < 400:
                continue
            memory, files = growth(use.memory), growth(use.files)
            held, opened = statistics.median(use.memory), statistics.median(use.files)
            print(
                f"{name}, steps {use.steps[0]} to {use.steps[-1]}: {held:.0f} MiB, grown by "
                f"{memory:+.1f}; {opened:.0f} open files, grown by {files:+.0f}",
                flush=True,
            )
            if memory > 4 or files > 0:
                sys.exit("FAILED: not flat")
        print(f"{name}: {flags.steps} steps, {flags.kills} kills, equal bit for bit", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(required=True)
    seed = {"type": int, "default": 0, "help": "seed of all that is random"}
    choice = {"nargs": "+", "choices": list(SCRIPTS), "help": "scripts to run"}

    part = parts.add_parser("kills", help="kill runs at random times")
    part.add_argument("--scripts", default=list(SCRIPTS), **choice)
    part.add_argument("--ranks", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    part.add_argument("--kills", type=int, default=15, help="kills of one run")
    part.add_argument("--steps", type=int, default=60, help="steps of one run")
    part.add_argument("--seed", **seed)
    part.set_defaults(do=kills)

    part = parts.add_parser("damage", help="damage checkpoints and caches")
    part.add_argument("--runs", type=int, default=100, help="files to damage, one a run")
    part.add_argument("--steps", type=int, default=60, help="steps of one run")
    part.add_argument("--seed", **seed)
    part.set_defaults(do=damage)

    part = parts.add_parser("flat", help="watch memory and open files of long runs")
    part.add_argument("--scripts", default=["dpo", "reinforce"], **choice)
    part.add_argument("--steps", type=int, default=3000, help="steps of one run")
    part.add_argument("--kills", type=int, default=3, help="kills of one run, evenly spaced")
    part.set_defaults(do=flat)

    flags = parser.parse_args(argv)
    torch.set_num_threads(1)
    home = Path(tempfile.mkdtemp(prefix="soak-"))
    make_inputs(home)
    flags.do(flags, home)
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
