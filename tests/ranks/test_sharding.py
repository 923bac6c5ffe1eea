"""--zero 3: what is gathered, when it is freed, and the scripts that sample.

That five steps are those of one process is held by test_parallel.py, test_lora.py, test_weights.py
and test_distill.py; bytes kept and sent by test_plan.py.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import dataset_of, read_metrics
from launch import launch, weights_in
from test_plan import ODD, REWARD, TIED, pretend

import footprint
import sharding
import train_online_dpo
import train_ppo
import train_reinforce
from data.trees import make_batch
from footprint import Layout
from model import GPT
from optimizer import AdamW
from pipeline import pipeline
from sharding import Flat
from weights.adapters import Lora, attach

TREES = [([1, 2, 3], [[4, 5], [6, 7, 8]]), ([9, 10], [[11], [12, 13]])]


class Watch:
    """Counts the bytes of gathered weights, and how often each part is gathered."""

    def __init__(self, monkeypatch):
        self.now = self.peak = 0
        self.gathers: Counter[str] = Counter()
        gather, free = Flat.gather, Flat.free

        def watched_gather(flat: Flat) -> None:
            absent = not flat.here
            gather(flat)
            if absent:
                self.now += flat.weights.untyped_storage().nbytes()
                self.peak = max(self.peak, self.now)
                self.gathers[sharding.part_of(flat.named[0][0])] += 1

        def watched_free(flat: Flat) -> None:
            held = flat.weights.untyped_storage().nbytes() if flat.sharded else 0
            free(flat)
            self.now -= held - flat.weights.untyped_storage().nbytes() if flat.sharded else 0

        monkeypatch.setattr(Flat, "gather", watched_gather)
        monkeypatch.setattr(Flat, "free", watched_free)


@pytest.mark.parametrize("lora", [None, Lora(2, 4.0)], ids=["whole", "lora"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("c", [ODD, TIED, REWARD], ids=["odd", "tied", "reward"])
def test_two_neighbouring_parts_are_gathered_at_most(c, recompute: bool, lora, monkeypatch):
    """The peak of a step is the formula's, to the byte; between two steps nothing is left."""
    layout = Layout(dp=2, zero=3)
    mesh = pretend(layout, 0)
    try:
        model = GPT(c, mesh)
        model.init_weights(0)
        model.checkpoint_activations = recompute
        if lora:
            attach(model, lora)
        optimizer = AdamW(model, (0.9, 0.95), 1e-8, 0.1, 3)
        watch = Watch(monkeypatch)
        batches = [make_batch(dataset_of(TREES), [i]) for i in range(2)]
        for batch, hidden in pipeline(model, batches, optimizer):
            scores = model.score(hidden, batch, batch.last) if c.outputs else None
            y = model.logps(hidden, batch) if scores is None else scores
            y.square().sum().backward()
        optimizer.step(1e-3, 1.0)
        assert watch.now == 0
        assert watch.peak == footprint.gathered_peak(c, layout, 0, torch.float32, lora)
        flats = {part: len(model.shards.own[part]) for part in model.shards.order}
        for part, n in flats.items():
            twice = part.startswith("blocks") or part == "embed" and c.tied
            assert watch.gathers[part] == n * len(batches) * (2 if twice else 1), part
        before = watch.peak = 0
        with torch.no_grad():
            hidden = model(batches[0])
            _ = model.score(hidden, batches[0], batches[0].last) if c.outputs else None
            _ = None if c.outputs else model.logps(hidden, batches[0])
        assert watch.now == before
        assert 0 < watch.peak <= footprint.gathered_peak(c, layout, 0, torch.float32, lora)
    finally:
        dist.destroy_process_group()


# ---- scripts that sample -------------------------------------------------------------------------

COMMON = "--max-steps 2 --lr 1e-2 --max-tokens 400 --dtype fp64 --device cpu --max-new-tokens 8"
SCRIPTS = {
    # A step of three prompts, or one, leaves ranks with fewer prompts than others, or none.
    "ppo": (train_ppo, "--batch-size 3 --kl 0.1 --ppo-epochs 1 --lora 3"),
    "ppo whole": (train_ppo, "--batch-size 3 --kl 0.1 --ppo-epochs 1 --eval-every 1"),
    "reinforce": (train_reinforce, "--batch-size 1 --group-size 3 --kl 0.1"),
    "online_dpo": (train_online_dpo, "--batch-size 3 --ref-every 1 --ref-samples 1"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_rollouts_are_those_of_one_process(name: str, toy: Path, tmp_path: Path):
    """Metrics and weights within 1e-10 of a run on one rank, critic and reference sharded too."""
    script, own = SCRIPTS[name]
    words = ["--model", str(toy / "model"), "--data", str(toy / "world/sft.jsonl"), *COMMON.split()]
    words += ["--reward", "length:3", *own.split()]
    if "--eval-every" in own:
        words += ["--eval-data", str(toy / "world/prompts_test.jsonl"), "--samples", "1"]
    launch(1, script.main, [*words, "--out", str(tmp_path / "one")])
    launch(2, script.main, [*words, "--zero", "3", "--out", str(tmp_path / "two")])
    for one, two in zip(*(read_metrics(tmp_path / run) for run in ("one", "two")), strict=True):
        same = {k for k in one if "second" not in k and "memory" not in k}
        assert {k: two[k] for k in same} == pytest.approx({k: one[k] for k in same}, abs=1e-10)
    for folder in ("final", "critic") if script is train_ppo else ("final",):
        one, two = (weights_in(tmp_path / run / folder) for run in ("one", "two"))
        assert max((one[n] - two[n]).abs().max().item() for n in one) < 1e-10, folder
