"""Measure what --engine-correction saves when the sampler is not the policy, on the toy world.

    python bench/off_policy.py --out runs/off                   one seed
    python bench/off_policy.py --out runs/off --seeds 0 1 2

REINFORCE on the true reward, as in demo.py, with samplers that are off on purpose:

    hot      samples at temperature 1.3, and the run believes that it was 1
    stale    samples from the weights of 4 updates ago

Both report the log-probs of what they drew, as an engine that is off would. The gain is the share
of good answers to held-out prompts, less that of the start; the table gives it beside that of a run
with the policy's own samples.
"""

import argparse
import copy
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before the folder of this file

from data.toyworld import score_file
from stages import Stage, run_stages

WORLD = "--base 8000 --sft 3000 --preferences 1 --labels 1 --attributes 1 --attributes-test 1"
SCRATCH = "--lr 2e-3 --batch-size 8 --warmup 0.05 --weight-decay 0.05"
LATE = 4  # updates
HOT = 1.3
CORRECTIONS = {
    "none": "--engine-correction none",
    "truncate": "--engine-correction truncate",
    "mask": "--engine-correction mask",
    "truncate, whole": "--engine-correction truncate --engine-by sequence",
}
ROOT = Path(__file__).resolve().parents[1]


def hot(generate: Any) -> Any:
    """Return a sampler that draws hotter than it is told, and reports what it drew from."""

    def draw(model: Any, ids: list, limit: int, temperature: float, *args: Any, **more: Any) -> Any:
        samples = generate(model, ids, limit, HOT * temperature, *args, **more)
        return [sample._replace(policy_logps=sample.logps) for sample in samples]

    return draw


def stale(generate: Any) -> Any:
    """Return a sampler with the weights of some updates ago."""
    kept: list = []

    def draw(model: Any, *args: Any, **more: Any) -> Any:
        kept.append(copy.deepcopy(model))
        del kept[: -LATE - 1]
        return generate(kept[0], *args, **more)

    return draw


def train(sampler: str, argv: list[str]) -> None:
    """Run train_reinforce.py in this process with a sampler that is off."""
    import train_reinforce
    from sampling import source

    if sampler != "own":
        source.generate = {"hot": hot, "stale": stale}[sampler](source.generate)
    train_reinforce.main(argv)


def conditions() -> dict[str, tuple[str, str]]:
    """Return name -> (sampler, correction) of every run."""
    names = {"own samples": ("own", "none")}
    for sampler in ("hot", "stale"):
        names |= {f"{sampler}, {how}": (sampler, how) for how in CORRECTIONS}
    return names


def starts(out: Path, seeds: list[int]) -> list[Stage]:
    """Return the stages that make a world and a policy to start from, a seed each."""
    stages = []
    for seed in seeds:
        home, end = out / f"seed_{seed}", f"--seed {seed}"
        lines = [
            f"-m data.toyworld make --out {home}/world {end} {WORLD}",
            f"hf.py new --out {home}/new --family llama --width 96 --layers 2 --heads 4 "
            f"--kv-heads 2 --ffn 256 --std 0.1 --tokenizer {home}/world/tokenizer {end}",
            f"train_sft.py --model {home}/new --data {home}/world/base.jsonl --out {home}/base "
            f"--template plain {SCRATCH} {end}",
            f"train_sft.py --model {home}/base/final --data {home}/world/sft.jsonl "
            f"--out {home}/sft {SCRATCH} {end}",
            answers(home, "sft", seed),
        ]
        stages.append(Stage(f"start, seed {seed}", "", lines, home / "start.log"))
    return stages


def answers(home: Path, name: str, seed: int) -> str:
    """Return the command that answers the held-out prompts with a model."""
    return (
        f"generate.py --model {home}/{name}/final --data {home}/world/prompts_test.jsonl "
        f"--out {home}/{name}.jsonl --temperature 0.7 --max-new-tokens 64 --seed {seed}"
    )


def folder_of(name: str) -> str:
    """Return the folder of a condition, "hot, none" -> "hot_none"."""
    return name.replace(", ", "_").replace(" ", "_")


def gain_of(home: Path, name: str, seed: int, steps: int) -> float:
    """Train under one condition, unless it was before, and return the gain in good answers."""
    sampler, how = conditions()[name]
    folder = folder_of(name)
    if not (home / folder / "final").exists():
        argv = (
            f"--model {home}/sft/final --data {home}/world/sft.jsonl --batch-size 16 "
            f"--group-size 4 --no-eos-penalty 1 --max-new-tokens 48 --warmup 0.05 --lr 1e-3 "
            f"--reward data/toyworld.py:reward --kl 0.06 --max-steps {steps} --seed {seed} "
            f"--resume auto --out {home}/{folder} {CORRECTIONS[how]}"
        )
        me = [sys.executable, __file__, "--train", sampler, *argv.split()]
        subprocess.run(me, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        command = answers(home, folder, seed)
        subprocess.run([sys.executable, *command.split()], check=True, cwd=ROOT)
    own = score_file(home / f"{folder}.jsonl")["good"]
    return own - score_file(home / "sft.jsonl")["good"]


def main() -> None:
    """Run every condition and print the table."""
    if sys.argv[1:2] == ["--train"]:
        train(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/off", help="folder; default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--steps", type=int, default=40, help="of REINFORCE; default: %(default)s")
    flags = parser.parse_args()
    out = Path(flags.out).resolve()
    for done in run_stages(starts(out, flags.seeds)):
        print(done.line(""), flush=True)
    gains: dict[str, list[float]] = {name: [] for name in conditions()}
    for seed in flags.seeds:
        for name in conditions():
            gains[name].append(gain_of(out / f"seed_{seed}", name, seed, flags.steps))
            print(f"seed {seed}, {name}: {gains[name][-1]:+.3f}", flush=True)
    whole = statistics.mean(gains["own samples"])
    print(f"\n{'sampler, correction':<24}{'gain':>8}{'of own':>9}    each seed")
    for name, values in gains.items():
        mean = statistics.mean(values)
        each = "  ".join(f"{value:+.3f}" for value in values)
        print(f"{name:<24}{mean:>+8.3f}{mean / whole:>9.0%}    {each}")


if __name__ == "__main__":
    main()
