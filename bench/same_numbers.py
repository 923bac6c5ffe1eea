"""Prove that a change to the code changes no number: record all of them, compare two recordings.

    python bench/same_numbers.py record --out before.json
    python bench/same_numbers.py compare before.json after.json [--tolerance 1e-12]

`record` runs the scripts of the checkout in the current folder, or else of the one this file lies
in: every algorithm on a toy world and a tiny model, in fp32 and fp64, in one process, two and four.
It keeps the metrics of every step, but for times and memory; the SHA-256 of every tensor of the
models that come out; and the rows that are written. `--only WORDS` takes the cases with these words
in their names. A case that fails is recorded as such, and told.

`compare` prints every difference, and for each case "same bits" or the largest difference. It exits
with 1 if there is one. With --tolerance, differences up to it are told and forgiven. A difference
is relative to the larger number, or to 1 where both are smaller; a tensor's is that of its sum,
norm and dot product with fixed numbers, relative to its norm.

Every process has one thread, so that the numbers do not depend on how many cores there are. They do
depend on the kind of CPU and on the version of torch: record before and after on one machine.
"""

import argparse
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

HERE = Path(__file__).resolve().parents[1]
ROOT = Path.cwd() if Path("train_sft.py").exists() else HERE
OLD = (ROOT / "train_rejection.py").exists()  # before best_of_n.py
MEMORY = Path("/dev/shm")  # where files cost no time, if there is such a place
LIMIT = 300.0  # seconds that a command may take
LAST_WORDS = 5.0  # seconds that the other ranks have to fail as well once one has

# ---- what is run ---------------------------------------------------------------------------------

# A case is one or more command lines. A word of capitals stands for what is here, or for
#   HOME/...  the folder of all cases: models, and OUT of every case that others need
#   WORLD/... data and tokenizer
#   OUT       the folder of the case, whose metrics and models are recorded; where a line trains
#             into OUT/trained, those of that folder are recorded instead
#   DTYPE     fp32, fp64 or bf16
#   LAYOUT    flags of the layout; a line without it runs in one process
# A flag that is given twice has the value that comes last.
SHORT = {
    "TRAIN": "--lr 1e-2 --batch-size 12 --epochs 3 --max-steps 4 --warmup 0.5 --weight-decay 0.1 "
    "--max-tokens 200 --dtype DTYPE LAYOUT --out OUT",
    "LLAMA": "--model HOME/llama",
    "PAIRS": "--data WORLD/preferences.jsonl --eval-data WORLD/preferences_test.jsonl "
    "--eval-every 2",
    "LABELS": "--data WORLD/labels.jsonl --eval-data WORLD/labels_test.jsonl --eval-every 2",
    "ANSWERS": "--data WORLD/sft.jsonl --eval-data WORLD/sft_test.jsonl --eval-every 2",
    "RATINGS": "--data WORLD/attributes.jsonl --eval-data WORLD/attributes_test.jsonl "
    "--eval-every 2",
    "GROUPS": "--data WORLD/groups.jsonl --eval-data WORLD/groups_test.jsonl --eval-every 2",
    "PROMPTS": "--data WORLD/sft.jsonl --eval-data WORLD/prompts_test.jsonl --eval-every 2",
    "SFT": "train_sft.py LLAMA ANSWERS TRAIN",
    "DPO": "train_dpo.py LLAMA PAIRS TRAIN",
    "KTO": "train_kto.py LLAMA LABELS TRAIN",
    "RM": "train_rm.py LLAMA PAIRS TRAIN",
    "REGRESSION": "train_rm.py --loss regression LLAMA RATINGS TRAIN",
    "ONLINE": "LLAMA PROMPTS TRAIN --lr 3e-3 --batch-size 6 --max-new-tokens 10 "
    "--no-eos-penalty 0.5 --log-samples 2 --kl 0.1",
    "PPO": "train_ppo.py ONLINE --group-size 2 --critic-lr 2e-2",
    "REINFORCE": "train_reinforce.py ONLINE --group-size 4",
    "WORTH": "--reward HOME/words.py:worth",
    "JUDGE": "--reward HOME/judge/final",
    "BEST": "LLAMA --data WORLD/sft.jsonl WORTH --group-size 6 --top 2 --prompts 30 "
    "--max-new-tokens 16",
    "STEERED": "--model HOME/steered/final",
    "PREDICTOR": "--predictor HOME/predictor/final",
    "LINE": "--attribute-template {prompt}<|attr|>{attributes}",
    "ASKED": "helpfulness:4,toxicity:0,verbosity:1",
    # Stopped after a step and gone on with, or gone on with from an earlier checkpoint.
    "STOPPED": "--max-minutes 1e-6",
    "AGAIN": "--resume auto",
    "BCO_PAIR": "DPO --loss bco_pair",
    "KTO_BCO": "KTO --loss bco",
    "ADAPTIVE": "PPO WORTH --kl-target 0.5 --ppo-epochs 2",
    "TWICE": "REINFORCE WORTH --minibatches 2",
}
LAYOUTS = {  # name: processes, flags
    "one": (1, ""),
    "tp2": (2, "--tp 2"),
    "dp2": (2, "--zero 2"),
    "cp2": (2, "--cp 2"),
    "pp2": (2, "--pp 2"),
    "dp2 zero1": (2, ""),
    "tp2 dp2": (4, "--tp 2 --zero 2"),
    "tp2 pp2": (4, "--tp 2 --pp 2"),
    "cp2 tp2": (4, "--cp 2 --tp 2"),
    "pp2 dp2": (4, "--pp 2 --zero 2"),
}
MAIN_LAYOUTS = ("one", "tp2", "dp2", "cp2", "pp2")
OTHER_LAYOUTS = ("dp2 zero1", "tp2 dp2", "tp2 pp2", "cp2 tp2", "pp2 dp2")
FAMILIES = {  # name: flags of a new model
    "llama": "--family llama --kv-heads 2",
    "other": "--family llama --kv-heads 2 --seed 1",
    "sharp": "--family llama --kv-heads 2 --std 0.7",
    "qwen2": "--family qwen2 --kv-heads 2 --tied",
    "qwen3": "--family qwen3 --kv-heads 2 --head-size 6 --layers 3",
    "mistral": "--family mistral --kv-heads 2 --sliding-window 9",
    "gpt_neox": "--family gpt_neox",
}


def spelled(old: list[str], new: list[str]) -> list[str]:
    """Choose the command lines of this checkout, where scripts were replaced by others."""
    return old if OLD else new


@dataclass
class Case:
    """Describe something to run and to record.

    lines   commands, one after the other; none: the case fails
    layout  of the lines with LAYOUT in them; a list has one a line
    work    or a function that is called with HOME and the type, and returns rows
    rows    name of rows that are written -> their JSONL file
    shared  whether to compare only what both recordings have: metrics, keys of rows, models
    first   step before which no metrics are kept
    always  whether to run it whatever --only says: others need its OUT
    models  folders in OUT whose weights are recorded
    """

    lines: list[str] = field(default_factory=list)
    dtype: str = "fp32"
    layout: str | list[str] = "one"
    work: Callable[[Path, str], dict[str, list]] | None = None
    rows: dict[str, str] = field(default_factory=dict)
    shared: bool = False
    first: int = 0
    always: bool = False
    models: tuple[str, ...] = ("final", "best", "critic")


SAMPLES = {"samples": "OUT/samples.jsonl"}

# How a new model of random weights is made.
NEW_MODEL = spelled(["hf.py new"], ["hf.py new"])[0]

# In fp32 and fp64, in all main layouts.
EVERYWHERE = {
    "sft": Case(["SFT"]),
    "dpo": Case(["DPO"]),
    "kto": Case(["KTO --desirable-weight 1.3"]),
    "kto bco": Case(["KTO_BCO"]),
    "rm": Case(["RM"]),
    "rm regression": Case(["REGRESSION"]),
    "ppo": Case(["ADAPTIVE --minibatches 2"], rows=SAMPLES),
    "ppo judge": Case(
        [
            "PPO JUDGE --gamma 0.95 --lam 0.9 --entropy-weight 0.01 --kl-estimator k3 "
            "--ppo-epochs 2 --critic-warmup 1 --clip-value 0"
        ],
        rows=SAMPLES,
    ),
    "rloo": Case(["REINFORCE WORTH --advantage rloo"], rows=SAMPLES),
    "grpo": Case(
        [
            "REINFORCE WORTH --advantage grpo --aggregate sequence --kl-in loss --kl-estimator k3 "
            "--rollout-epochs 2 --minibatches 2"
        ],
        rows=SAMPLES,
    ),
    "reinforce++": Case(["REINFORCE JUDGE --advantage reinforce++"], rows=SAMPLES),
    "best of n": Case(
        spelled(
            old=["train_rejection.py BEST TRAIN"],
            new=[
                "best_of_n.py BEST --batch-size 12 --max-tokens 200 --dtype DTYPE LAYOUT --out OUT",
                "train_sft.py LLAMA --data OUT/kept.jsonl TRAIN --out OUT/trained",
            ],
        ),
        rows={"kept": "OUT/kept.jsonl", "pairs": "OUT/pairs.jsonl"},
        shared=True,
        first=1,
    ),
    "steerlm predictor": Case(
        spelled(
            old=["train_steerlm.py --stage attributes LLAMA RATINGS TRAIN"],
            new=["REGRESSION"],
        ),
        shared=True,
    ),
    "steerlm sft": Case(
        spelled(
            old=["train_steerlm.py --stage sft LLAMA RATINGS LINE --attribute-dropout 0.3 TRAIN"],
            new=["train_sft.py --attributes LLAMA RATINGS LINE --attribute-dropout 0.3 TRAIN"],
        ),
        shared=True,
    ),
    "steerlm bootstrap": Case(
        spelled(
            old=[
                "train_steerlm.py --stage bootstrap STEERED PREDICTOR --data WORLD/sft.jsonl "
                "--answers 2 --max-new-tokens 24 --ask ASKED TRAIN"
            ],
            new=[
                "train_steerlm.py STEERED PREDICTOR --data WORLD/sft.jsonl "
                "--answers 2 --max-new-tokens 24 --ask ASKED TRAIN"
            ],
        ),
        rows={"bootstrap": "OUT/bootstrap.jsonl"},
        shared=True,
    ),
    "steerlm2": Case(
        spelled(
            old=[
                "train_steerlm.py --loss steerlm2 STEERED PREDICTOR --prior HOME/other "
                "--spread 0.7 GROUPS TRAIN --batch-size 4 --max-tokens 320"
            ],
            new=[
                "train_steerlm.py --loss steerlm2 --answers 0 STEERED PREDICTOR --prior HOME/other "
                "--spread 0.7 GROUPS TRAIN --batch-size 4 --max-tokens 320"
            ],
        ),
        shared=True,
    ),
}
# In fp64, in one process.
ALONE = {
    "dpo aot": Case(["DPO --loss aot"]),
    "dpo aot_unpaired": Case(["DPO --loss aot_unpaired"]),
    "dpo apo_down": Case(["DPO --loss apo_down"]),
    "dpo apo_zero": Case(["DPO --loss apo_zero"]),
    "dpo bco_pair": Case(["DPO --loss bco_pair"]),
    "dpo discopop": Case(["DPO --loss discopop"]),
    "dpo exo_pair": Case(["DPO --loss exo_pair --label-smoothing 0.001"]),
    "dpo hinge": Case(["DPO --loss hinge"]),
    "dpo ipo": Case(["DPO --loss ipo --average-logps"]),
    "dpo nca_pair": Case(["DPO --loss nca_pair"]),
    "dpo robust": Case(["DPO --loss robust --label-smoothing 0.1"]),
    "dpo rpo_bwd_kl": Case(["DPO --loss rpo_bwd_kl"]),
    "dpo rpo_fwd_kl": Case(["DPO --loss rpo_fwd_kl"]),
    "dpo rpo_sq": Case(["DPO --loss rpo_sq --reward-scale 0.5"]),
    "dpo sigmoid_norm": Case(["DPO --loss sigmoid_norm"]),
    "dpo simpo": Case(["DPO --loss simpo --beta 2"]),
    "dpo sppo_hard": Case(["DPO --loss sppo_hard"]),
    "dpo label smoothing": Case(["DPO --label-smoothing 0.1"]),
    "dpo sft weight": Case(["DPO --sft-weight 0.1"]),
    "dpo reference free": Case(["DPO --reference-free"]),
    "dpo other reference": Case(["DPO --ref HOME/other"]),
    "dpo unshared prompts": Case(["DPO --no-share-prompts"]),
    "dpo recomputed": Case(["DPO --checkpoint-activations --schedule linear --clip 0.1"]),
    "sft plain": Case(["SFT --template plain --schedule constant --no-shuffle --seed 3"]),
    "sft truncated": Case(["SFT --max-length 40 --overlong truncate --clip 0 --log-every 2"]),
    "sft chatml": Case(["SFT --template chatml --max-length 60 --overlong drop"]),
    "kto apo_zero": Case(["KTO --loss apo_zero_unpaired"]),
    "kto pairs": Case(["train_kto.py LLAMA PAIRS TRAIN --undesirable-weight 1.2"]),
    "rm margin": Case(["RM --loss margin_bt --centering 0.01"]),
    "rm scaled": Case(["RM --loss scaled_bt --centering 0.01"]),
    "rm two attributes": Case(["REGRESSION --attributes helpfulness verbosity"]),
    "ppo critic": Case(
        ["PPO --reward length:4 --critic HOME/judge/final --ref HOME/other --kl-estimator abs"],
        rows=SAMPLES,
    ),
    "dapo": Case(
        ["REINFORCE WORTH --loss dapo --rollout-epochs 2 --temperature 0.8"], rows=SAMPLES
    ),
    "gspo": Case(
        ["REINFORCE WORTH --loss gspo --aggregate sequence --minibatches 2"], rows=SAMPLES
    ),
    "cispo": Case(["REINFORCE WORTH --loss cispo --minibatches 3"], rows=SAMPLES),
    "dr_grpo": Case(["REINFORCE WORTH --advantage dr_grpo --aggregate constant"], rows=SAMPLES),
    "plain reinforce": Case(
        ["REINFORCE --reward regex:[aeiou] --loss reinforce --kl 0"], rows=SAMPLES
    ),
}
# In fp32 and fp64, in one process: what writes rows and trains nothing.
WRITTEN = {
    "score judge": Case(
        [
            "score.py --model HOME/judge/final --data WORLD/sft.jsonl --out OUT/one.jsonl "
            "--dtype DTYPE",
            "score.py --model HOME/judge/final --data WORLD/preferences.jsonl "
            "--out OUT/pairs.jsonl --dtype DTYPE --max-tokens 200",
        ],
        rows={"one": "OUT/one.jsonl", "pairs": "OUT/pairs.jsonl"},
    ),
    "score attributes": Case(
        [
            "score.py --model HOME/predictor/final --data WORLD/groups.jsonl "
            "--out OUT/scored.jsonl --dtype DTYPE"
        ],
        rows={"scored": "OUT/scored.jsonl"},
    ),
    "score likelihood": Case(
        [
            "score.py LLAMA --ref HOME/other --data WORLD/sft.jsonl --out OUT/likely.jsonl "
            "--dtype DTYPE"
        ],
        rows={"likely": "OUT/likely.jsonl"},
    ),
    "annotate": Case(
        spelled(
            old=[
                "train_steerlm.py --stage annotate --model HOME/predictor/final "
                "--data WORLD/sft.jsonl --out OUT --dtype DTYPE"
            ],
            new=[
                "score.py --attributes --model HOME/predictor/final "
                "--data WORLD/sft.jsonl --out OUT/annotated.jsonl --dtype DTYPE"
            ],
        ),
        rows={"annotated": "OUT/annotated.jsonl"},
        shared=True,
    ),
    "generate": Case(
        [
            "generate.py LLAMA --data WORLD/prompts_test.jsonl --out OUT/one.jsonl "
            "--max-new-tokens 24 --temperature 0.7 --seed 4 --dtype DTYPE",
            "generate.py STEERED --data WORLD/prompts_test.jsonl --out OUT/three.jsonl "
            "--max-new-tokens 24 --n 3 --top-k 30 --attributes ASKED --dtype DTYPE",
        ],
        rows={"one": "OUT/one.jsonl", "three": "OUT/three.jsonl"},
    ),
}
# In fp32 and fp64, in one process and dp2.
RESUMED = {
    "resumed sft": Case(["SFT STOPPED", "SFT AGAIN"]),
    "resumed dpo": Case(["BCO_PAIR STOPPED", "BCO_PAIR AGAIN"]),
    "resumed dpo, step 2": Case(["BCO_PAIR --save-every 2", "BCO_PAIR --resume OUT/step_2"]),
    "resumed kto": Case(["KTO_BCO STOPPED", "KTO_BCO AGAIN"]),
    "resumed ppo": Case(["ADAPTIVE --save-every 2", "ADAPTIVE --resume OUT/step_2"], rows=SAMPLES),
    "resumed grpo": Case(["TWICE STOPPED", "TWICE AGAIN"], rows=SAMPLES),
}
# What others need; in fp64, so that a difference in rounding stays small in them.
NEEDED = {
    "judge": Case(["RM --model HOME/sharp --epochs 9 --max-steps 10"]),
    "predictor": Case(
        [
            "REGRESSION --model HOME/sharp --epochs 20 --max-steps 60 --max-tokens 600 "
            "--eval-every 30"
        ],
    ),
    "steered": EVERYWHERE["steerlm sft"],
}


def cases() -> dict[str, Case]:
    """List every case by its name, in the order in which they run."""
    models = tuple(f"../{family}" for family in FAMILIES)
    by_name = {"toy world": Case(work=make_world, always=True, models=models)}
    for name, case in NEEDED.items():
        by_name[name] = replace(case, dtype="fp64", always=True)

    def add(name: str, case: Case, dtype: str, *layouts: str) -> None:
        for layout in layouts:
            by_name[f"{name}, {dtype}, {layout}"] = replace(case, dtype=dtype, layout=layout)

    for dtype in ("fp32", "fp64"):
        for name, case in EVERYWHERE.items():
            add(name, case, dtype, *MAIN_LAYOUTS)
        for name, case in WRITTEN.items():
            add(name, case, dtype, "one")
        for name, case in RESUMED.items():
            add(name, case, dtype, "one", "dp2")
        for layout in ("one", "tp2", "pp2"):
            moved = replace(RESUMED["resumed dpo"], dtype=dtype, layout=["dp2", layout])
            by_name[f"resumed dpo, {dtype}, from dp2 to {layout}"] = moved
        for name in ("dpo aot", "dpo bco_pair", "dpo sft weight", "kto pairs"):
            add(name, ALONE[name], dtype, "dp2")
        add("dpo", EVERYWHERE["dpo"], dtype, *OTHER_LAYOUTS)
        for family in ("qwen2", "qwen3", "mistral", "gpt_neox"):
            add(f"sft {family}", Case([f"SFT --model HOME/{family}"]), dtype, *MAIN_LAYOUTS)
        for family in ("qwen2", "gpt_neox"):
            add(f"dpo {family}", Case([f"DPO --model HOME/{family}"]), dtype, "one", "tp2", "pp2")
        for family in ("llama", "qwen2", "qwen3", "mistral", "gpt_neox"):
            by_name[f"sampling {family}, {dtype}"] = Case(work=Sampling(family), dtype=dtype)
    for name, case in ALONE.items():
        add(name, case, "fp64", "one")
    for name in ("sft", "dpo", "rm"):
        add(name, EVERYWHERE[name], "bf16", "one", "tp2", "dp2", "dp2 zero1")
    return by_name


# ---- the toy world and the samples ---------------------------------------------------------------

REWARD = """
def worth(prompt, response, row):
    "Prefer many different letters, and the length of the row's own answer."
    wanted = len(row.get("response", "twenty characters..."))
    return len(set(response)) / 10 - abs(len(response) - wanted) / 20
"""
ROWS = {
    "base": 8,
    "sft": 48,
    "preferences": 48,
    "preferences-test": 10,
    "labels": 48,
    "attributes": 48,
    "attributes-test": 10,
    "prompts-test": 6,
}


def make_world(home: Path, dtype: str) -> dict[str, list]:
    """Make data, tokenizer, models of random weights and a reward; return a hash of every file."""
    world = home / "world"
    counts = " ".join(f"--{name} {number}" for name, number in ROWS.items())
    call(f"data/toyworld.py make --out {world} {counts}".split())
    for name in ("sft", "labels"):
        lines = (world / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (world / f"{name}.jsonl").write_text("".join(lines[:36]))
        (world / f"{name}_test.jsonl").write_text("".join(lines[36:]))
    (home / "words.py").write_text(REWARD)
    rated = read_rows(world / "attributes.jsonl")
    groups = []
    for i in range(15):
        some = rated[3 * i : 3 * i + 2 + i % 2]
        answers = [row["response"] for row in some]
        wanted = {"helpfulness": 4, "verbosity": 1 + i % 2}
        groups.append({"prompt": some[0]["prompt"], "responses": answers, "attributes": wanted})
    for name, part in (("groups", groups[:12]), ("groups_test", groups[12:])):
        (world / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    sizes = "--width 32 --layers 2 --heads 4 --std 0.2 --dtype fp64"
    tokenizer = world / "tokenizer"
    for name, flags in FAMILIES.items():
        folder = home / name
        call(f"{NEW_MODEL} --out {folder} --tokenizer {tokenizer} {sizes} {flags}".split())
        stir(folder)
    files = [*sorted(world.glob("*.jsonl")), *sorted(tokenizer.iterdir())]
    hashes = [{"file": file.name, "sha256": digest(file.read_bytes())} for file in files]
    return {"files": hashes}


def stir(folder: Path) -> None:
    """Make norms and biases random, which are ones and zeros; let a llama end answers at times."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    for name in sorted(weights):
        weight = weights[name]
        if weight.dim() == 1:
            weight += 0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    if config["model_type"] == "llama":
        # One direction that all tokens share, and that the head reads as the end.
        weights["model.embed_tokens.weight"][:, 0] += 0.5
        weights["lm_head.weight"][config["eos_token_id"], 0] += 4.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@dataclass
class Sampling:
    """Sample from a model by the library, in every way there is: tokens and log-probs."""

    family: str

    def __call__(self, home: Path, dtype: str) -> dict[str, list]:
        generate = either("generate:generate", "sampling.sampler:generate")
        load_model = either("hf:load_model", "weights.folder:load_model")
        tokenizer = either("data.tokenizer:load_tokenizer")(home / self.family)
        template = either("data.templates:Template")("auto", tokenizer)
        kind = {"fp32": torch.float32, "fp64": torch.float64}[dtype]
        model = load_model(home / self.family, kind, "cpu")
        texts = [row["prompt"] for row in read_rows(home / "world" / "prompts_test.jsonl")]
        short = [template.prompt(text) for text in texts]
        # Long prompts are kept once for their samples.
        long = [template.prompt(" ".join(texts[i:] + texts[:i])) for i in range(3)]
        ways: dict[str, tuple[list[list[int]], dict]] = {
            "greedy": (short, {"temperature": 0.0}),
            "plain": (short, {"temperature": 1.0, "seed": 1}),
            "cool": (short, {"temperature": 0.7, "seed": 2}),
            "top k": (short, {"temperature": 1.2, "top_k": 20}),
            "top p": (short, {"temperature": 1.0, "top_p": 0.8}),
            "top k and p": (short, {"temperature": 0.8, "top_k": 50, "top_p": 0.9}),
            "seeds": (short, {"seeds": [100 + i for i in range(len(short))]}),
            "three each": (short, {"n": 3, "temperature": 0.9}),
            "long": (long, {"temperature": 1.0}),
            "long, four each": (long, {"n": 4, "temperature": 1.0}),
            "no repeat": (short, {"temperature": 0.3, "no_repeat": 6}),
            "stop texts": (short, {"stop_texts": ["e", "."], "decode": tokenizer.decode}),
        }
        parts = ("tokens", "logps", "policy_logps", "ended")
        drawn: dict[str, list] = {}
        for name, (prompts, flags) in ways.items():
            for batch in (1, 8):
                samples = generate(
                    model, prompts, 12, stop_ids=template.stop_ids, batch_size=batch, **flags
                )
                drawn[f"{name}, batch {batch}"] = [
                    {part: getattr(sample, part) for part in parts} for sample in samples
                ]
        return drawn


def either(*places: str) -> Any:
    """Find a function at the first of some places, "module:name", that this checkout has."""
    for place in places:
        module, _, name = place.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"this checkout has none of {', '.join(places)}")


def call(words: list[str]) -> None:
    """Run a script by its main, with the words that would follow it on a command line."""
    module = words[0].removesuffix(".py").replace("/", ".")
    importlib.import_module(module).main(words[1:])


# ---- processes -----------------------------------------------------------------------------------


class Failed(Exception):
    """Say what a command did not do as it should, and the last lines that it printed."""


def forked(ranks: int, work: Callable[[], Any], log: Path) -> Any:
    """Call a function in forked processes, as torchrun would; return what the first one returned.

    A process alone has none of torchrun's variables. Failed: one of them raised, died or took too
    long; whatever happens, none is left.
    """
    sys.stdout.flush()
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe() for _ in range(ranks)]
    processes = [fork.Process(target=_rank, args=(rank, pipes, work, log)) for rank in range(ranks)]
    store = None
    try:
        for process in processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()  # so that a rank that dies ends its pipe
        if ranks > 1:  # after the forks: a store must not be freed in a child
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for ours, _ in pipes:
            ours.send(store.port if store else 0)
        answers = _collect([ours for ours, _ in pipes])
    finally:
        for process in processes:
            if process.pid:
                process.kill()
                process.join()
        for ours, _ in pipes:
            ours.close()
        store = None
    for rank, (good, said) in answers.items():  # the first to fail is the first to say so
        if not good:
            *before, reason = said.strip().splitlines()
            printed = log.read_text(errors="replace").splitlines() if log.exists() else []
            traced = "\n".join([*before, "it printed:", *printed[-5:]])
            raise Failed(f"rank {rank}: {reason}\n{traced}")
    return answers[0][1]


def _rank(
    rank: int, pipes: list[tuple[Connection, Connection]], work: Callable[[], Any], log: Path
) -> None:
    """Be a rank: call the function, send back what it returned or raised, and end."""
    for ours, theirs in pipes:
        ours.close()
        if theirs is not pipes[rank][1]:
            theirs.close()
    pipe = pipes[rank][1]
    port = pipe.recv()
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(variable, None)
    if port:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(pipes)),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)  # the parent's pool of threads does not live through a fork
    answer: tuple[bool, Any]
    try:
        answer = (True, work())
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while others still talk to it
            dist.destroy_process_group()
    except BaseException:
        answer = (False, traceback.format_exc())
    sys.stdout.flush()
    pipe.send(answer)
    pipe.close()
    os._exit(0)


def _collect(pipes: list[Connection]) -> dict[int, tuple[bool, Any]]:
    """Wait for all ranks: rank -> (whether it went well, what it returned or said)."""
    answers: dict[int, tuple[bool, Any]] = {}
    until = time.monotonic() + LIMIT
    while len(answers) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in answers}
        for pipe in wait(list(waiting), max(0.0, until - time.monotonic())):
            rank = waiting[pipe]
            try:
                answers[rank] = pipe.recv()
            except EOFError:
                answers[rank] = (False, "died without a word")
            if not answers[rank][0]:
                until = min(until, time.monotonic() + LAST_WORDS)
        if time.monotonic() >= until:
            late = [rank for rank in range(len(pipes)) if rank not in answers]
            return answers | {rank: (False, "did not answer") for rank in late}
    return answers


# ---- recording -----------------------------------------------------------------------------------


def record(out: Path, only: str) -> int:
    """Run the cases and write what they computed; return how many failed."""
    sys.path[0] = str(ROOT)  # in place of this folder
    warm_up()
    started = time.monotonic()
    entries: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        for name, case in cases().items():
            if not case.always and only not in name:
                continue
            began = cpu_seconds()
            try:
                entry = run(name, case, Path(folder))
                said = counted(entry)
            except Exception as error:
                entry = {"failed": f"{type(error).__name__}: {error}"}
                said = entry["failed"]
            entry["cpu_seconds"] = round(cpu_seconds() - began, 2)
            entries[name] = entry
            print(f"{name:<40}{entry['cpu_seconds']:>6.1f} s  {said}", flush=True)
    failed = sum("failed" in entry for entry in entries.values())
    about = {
        "torch": torch.__version__,
        "cpu": f"{processor()} with {torch.backends.cpu.get_cpu_capability()}",
        "python": sys.version.split()[0],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"about": about, "cases": entries}, indent=1) + "\n")
    spent = f"{time.monotonic() - started:.0f} s, {cpu_seconds():.0f} s of a core"
    print(f"{len(entries)} cases in {spent}, {failed} failed; recorded in {out}")
    return failed


def cpu_seconds() -> float:
    """Return the time on a core of all processes that have ended, and of this one."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def processor() -> str:
    """Return the name of the processor, by which libraries choose how they compute."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def counted(entry: dict[str, Any]) -> str:
    """Say how much was recorded of a case."""
    rows = sum(len(part) for part in entry["rows"].values())
    weights = sum(len(digests) - 1 for digests in entry["models"].values())
    numbers = {"steps": len(entry["steps"]), "rows": rows, "tensors": weights}
    return ", ".join(f"{number} {kind}" for kind, number in numbers.items() if number)


def warm_up() -> None:
    """Import once, before the forks, what every one of them would import."""
    torch.set_num_threads(1)
    warm = torch.nn.Parameter(torch.ones(2))
    warm.grad = torch.ones(2)
    torch.optim.AdamW([warm], fused=True).step()  # imports for seconds at its first step
    lines = [line for case in cases().values() for line in case.lines]
    scripts = {command(line, "one", "fp32", HERE, HERE)[1][0] for line in lines}
    for script in sorted(scripts):
        try:
            importlib.import_module(script.removesuffix(".py").replace("/", "."))
        except Exception:  # its cases will say so
            print(f"{script} cannot be imported")


def run(name: str, case: Case, home: Path) -> dict[str, Any]:
    """Run a case and read what it computed."""
    out = home / name.replace(", ", "_").replace(" ", "_")
    out.mkdir()
    log = out / "printed.log"
    rows: dict[str, list] = {}
    if case.work is not None:
        rows = forked(1, partial(case.work, home, case.dtype), log)
    elif not case.lines:
        raise Failed("it has no command lines for this checkout yet: see the tables at the top")
    layouts = case.layout if isinstance(case.layout, list) else [case.layout] * len(case.lines)
    for line, layout in zip(case.lines, layouts, strict=True):
        processes, words = command(line, layout, case.dtype, home, out)
        forked(processes, partial(call, words), log)
    for key, file in case.rows.items():
        rows[key] = read_rows(Path(filled(file, home, out)))
    trained = out / "trained" if (out / "trained").exists() else out
    models = {}
    for model in case.models:
        if (trained / model).exists():
            models[model.removeprefix("../")] = tensors(trained / model)
    steps = read_steps(trained / "metrics.jsonl", case.first)
    if not rows and not (steps and "final" in models):
        raise Failed("it left no metrics and no model")
    if not case.always:
        shutil.rmtree(out)
    return {"shared": case.shared, "steps": steps, "rows": rows, "models": models}


def command(line: str, layout: str, dtype: str, home: Path, out: Path) -> tuple[int, list[str]]:
    """Fill in a command line: return how many processes it takes, and its words."""
    processes, flags = LAYOUTS[layout]
    known = {**SHORT, "DTYPE": dtype, "LAYOUT": flags}
    words = line.split()
    alone = True
    while any(word in known for word in words):
        alone = alone and "LAYOUT" not in words
        words = " ".join(known.get(word, word) for word in words).split()
    return 1 if alone else processes, [filled(word, home, out) for word in words]


def filled(word: str, home: Path, out: Path) -> str:
    """Fill in the folder that a word begins with."""
    for name, folder in (("HOME", home), ("WORLD", home / "world"), ("OUT", out)):
        if word == name or word.startswith(f"{name}/"):
            return f"{folder}{word.removeprefix(name)}"
    return word


def read_rows(path: Path) -> list[dict]:
    """Read the rows of a JSONL file."""
    if not path.exists():
        raise Failed(f"it did not write {path.name}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_steps(path: Path, first: int) -> dict[str, dict[str, float]]:
    """Read the metrics of every step and its evaluation, but for times, rates and memory."""
    steps: dict[str, dict[str, float]] = {}
    for row in read_rows(path) if path.exists() else []:
        kept = {name: value for name, value in row.items() if name != "step" and not varies(name)}
        if kept and row["step"] >= first:
            steps.setdefault(str(row["step"]), {}).update(kept)
    return steps


def varies(name: str) -> bool:
    """Say whether a metric is a time, a rate or an amount of memory."""
    return name in ("mfu", "memory_gb") or name.endswith(("seconds", "tokens_per_second"))


def tensors(folder: Path) -> dict[str, list]:
    """Digest every weight of a folder: SHA-256, sum, norm, dot product with fixed numbers.

    Names are those of Hugging Face. The first entry, "all", holds the SHA-256 of them all.
    """
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    digests: dict[str, list] = {}
    for name, weight in sorted(weights.items()):
        bits = weight.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        kind = f"{weight.dtype} {tuple(weight.shape)} "
        flat = weight.double().flatten()
        probe = torch.arange(len(flat), dtype=torch.float64).cos()
        numbers = [flat.sum().item(), flat.norm().item(), flat.dot(probe).item()]
        digests[name] = [digest(kind.encode() + bits), *numbers]
    together = "".join(f"{name} {numbers[0]}\n" for name, numbers in digests.items())
    return {"all": [digest(together.encode())], **digests}


def digest(content: bytes) -> str:
    """Return the SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()


# ---- comparing -----------------------------------------------------------------------------------


MISSING = "(not there)"


@dataclass
class Difference:
    """Tell where two recordings differ, what they say, and by how much.

    gap      infinity where it is no number that differs
    allowed  the thing is in one recording only, and the case is one of which that is expected
    """

    where: str
    one: Any
    other: Any
    gap: float = math.inf
    allowed: bool = False

    def __str__(self) -> str:
        size = "" if math.isinf(self.gap) else f"  ({self.gap:.1e})"
        return f"{self.where}: {shortened(self.one)} | {shortened(self.other)}{size}"


def shortened(value: Any) -> str:
    """Write a value in at most 200 characters."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def differences(where: str, one: Any, other: Any, shared: bool) -> Iterator[Difference]:
    """Find all differences of two things out of JSON; `shared` allows keys of one of them only."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            place = f"{where} {key}"
            if key in one and key in other:
                yield from differences(place, one[key], other[key], shared)
            else:
                a = one.get(key, MISSING)
                b = other.get(key, MISSING)
                yield Difference(place, a, b, allowed=shared)
    elif isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            yield Difference(f"{where} length", len(one), len(other))
        for i, (a, b) in enumerate(zip(one, other)):
            yield from differences(f"{where} {i}", a, b, shared)
    elif is_number(one) and is_number(other):
        if repr(float(one)) != repr(float(other)):
            gap = abs(one - other) / max(1.0, abs(one), abs(other))
            yield Difference(where, one, other, gap if math.isfinite(gap) else math.inf)
    elif one != other:
        yield Difference(where, one, other)


def is_number(value: Any) -> bool:
    """Say whether a value is a number, which true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def weight_differences(one: dict, other: dict, shared: bool) -> Iterator[Difference]:
    """Find the tensors of two recordings whose bits differ; {model: digests} each."""
    for model in sorted({*one, *other}):
        if model not in one or model not in other:
            said = ["there" if model in part else MISSING for part in (one, other)]
            yield Difference(model, said[0], said[1], allowed=shared and model != "final")
            continue
        for name in sorted({*one[model], *other[model]} - {"all"}):
            if name not in one[model] or name not in other[model]:
                said = ["there" if name in part[model] else MISSING for part in (one, other)]
                yield Difference(f"{model} {name}", said[0], said[1])
                continue
            bits, *mine = one[model][name]
            other_bits, *theirs = other[model][name]
            if bits != other_bits:
                norm = max(mine[1], theirs[1], 1e-300)
                gap = max(abs(a - b) for a, b in zip(mine, theirs)) / norm
                yield Difference(f"{model} {name}", bits[:12], other_bits[:12], gap)


def of_case(one: dict, other: dict) -> Iterator[Difference]:
    """Find all differences of a case."""
    if "failed" in one or "failed" in other:
        said = [part.get("failed", "ran").splitlines()[0] for part in (one, other)]
        yield Difference("failed", said[0], said[1])
        return
    shared = one["shared"] or other["shared"]
    if sorted(one["steps"]) != sorted(other["steps"]):
        yield Difference("steps", sorted(one["steps"]), sorted(other["steps"]))
    for step in one["steps"]:
        if step in other["steps"]:
            yield from differences(f"step {step}", one["steps"][step], other["steps"][step], shared)
    yield from differences("rows", one["rows"], other["rows"], shared)
    yield from weight_differences(one["models"], other["models"], shared)


def compare(before: Path, after: Path, tolerance: float | None) -> int:
    """Print every difference of two recordings; return how many are not forgiven."""
    one, other = (json.loads(path.read_text()) for path in (before, after))
    if one["about"] != other["about"]:
        print(f"note: recorded with {one['about']} and with {other['about']}")
    same = 0
    bad = 0
    names = [*one["cases"], *(name for name in other["cases"] if name not in one["cases"])]
    for name in names:
        if name not in one["cases"] or name not in other["cases"]:
            print(f"{name}: only in {before if name in one['cases'] else after}")
            bad += 1
            continue
        every = list(of_case(one["cases"][name], other["cases"][name]))
        differences = [difference for difference in every if not difference.allowed]
        alone = [difference.where for difference in every if difference.allowed]
        expected = f"; only one has, as expected: {', '.join(alone)}" if alone else ""
        if not differences:
            same += 1
            print(f"{name}: same bits{expected}")
            continue
        largest = max(difference.gap for difference in differences)
        size = f"largest {largest:.1e}" if math.isfinite(largest) else "not only in rounding"
        print(f"{name}: {len(differences)} differences, {size}{expected}")
        for difference in differences:
            forgiven = tolerance is not None and difference.gap <= tolerance
            bad += not forgiven
            print(f"    {difference}{'  within the tolerance' if forgiven else ''}")
    told = f"{bad} differences" + ("" if tolerance is None else f" above {tolerance:g}")
    print(f"{same} of {len(names)} cases have the same bits; {told}")
    return bad


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run all cases and write what they compute")
    recording.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the recording, JSON"
    )
    recording.add_argument(
        "--only", default="", metavar="WORDS", help="only cases with these words in their names"
    )
    comparing = commands.add_parser("compare", help="print every difference of two recordings")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument(
        "--tolerance", type=float, help="forgive differences up to this; default: none"
    )
    flags = parser.parse_args()
    if flags.command == "record":
        sys.exit(1 if record(flags.out, flags.only) else 0)
    sys.exit(1 if compare(flags.before, flags.after, flags.tolerance) else 0)


if __name__ == "__main__":
    main()
