"""LoRA under every algorithm: five steps in float64 equal a plain loop, on every layout.

The plain loop runs one response at a time, computes y = W x + s B (A x), and has the reference by
leaving the adapter out. It starts from the adapter that the script starts from.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from launch import launch
from online import drawn
from plain import PlainModel, PlainTrainer, encode
from safetensors.torch import load_file
from torch import Tensor

import hf
import train_dpo
import train_kto
import train_ppo
import train_reinforce
import train_rm
from data.rows import read_rows
from parallel import Mesh
from sampling import updates
from weights.adapters import Lora, attach
from weights.folder import load_model, save_model
from weights.peft import save_adapter

LAYOUTS = ["", "dp2", "dp2 zero2", "tp2", "cp2", "pp2", "tp2 pp2"]
SIZES = {"width": 24, "layers": 3, "heads": 6, "kv_heads": 3, "ffn": 37, "std": 0.3}
SCALE = 2.0  # α / r, with α = 2 r by default
NEAR = 1e-10
COMMON = (
    "--lora 3 --dtype fp64 --device cpu --max-tokens 400 --weight-decay 0.1 --seed 0 --no-shuffle"
)
OFFLINE = "--batch-size 4 --max-steps 5 --lr 1e-2 --warmup 0.25 --template plain"
REWARD = r"regex:[aeiou]\s"  # which random responses earn now and then
# One rollout, five updates at a constant rate.
ONLINE = (
    f"--batch-size 6 --max-steps 1 --lr 1e-2 --warmup 0 --schedule constant --max-new-tokens 8 "
    f"--no-eos-penalty 0.2 --kl 0.3 --reward {REWARD}"
)


class PlainScorer(PlainModel):
    """A plain model whose head gives one score at every token."""

    def __init__(self, folder: Path, head: Tensor | None = None):
        super().__init__(folder, torch.float64)
        self.head = self.weights.pop("score.weight", head)
        self.weights.pop("lm_head.weight", None)

    def scores(self, prompt: list[int], response: list[int]) -> Tensor:
        """Return the scores at all tokens, (prompt + response,)."""
        self.weights["lm_head.weight"] = self.head
        scores = self.logits(torch.tensor(prompt + response))[:, 0]
        del self.weights["lm_head.weight"]
        return scores

    def trained(self) -> list[Tensor]:
        return [*super().trained(), self.head]


class Bench:
    """The models and the rows of these tests."""

    def __init__(self, toy: Path, folder: Path):
        self.world = toy / "world"
        self.toy, self.folder = toy, folder
        tokenizer = self.world / "tokenizer"
        model = hf.new_model(hf.New(**SIZES, dtype="fp64", tokenizer=str(tokenizer)))
        save_model(model, folder / "model", tokenizer)
        scorer = load_model(folder / "model", torch.float64, scores=("reward",))
        generator = torch.Generator().manual_seed(5)
        scorer.score_head.weight.data.normal_(0, 0.1, generator=generator)
        save_model(scorer, folder / "scorer", tokenizer)

    def start(self, name: str, scores: tuple[str, ...] | None = None) -> Path:
        """Write the adapter that a run from a folder begins with; return its folder."""
        lora = Lora(3, 6.0)
        model = attach(load_model(self.folder / name, torch.float64, scores=scores), lora, 0)
        path = self.folder / f"start_{name}"
        save_adapter(model, path, name, lora)
        return path

    def trees(self, file: str, keys: list[str]) -> tuple[list[dict], list[tuple]]:
        """Return twenty rows with different prompts, and their (prompt, responses)."""
        rows = {row["prompt"]: row for row in list(read_rows(self.world / file))[:48]}
        rows = list(rows.values())[:20]
        return rows, encode(self.world / "tokenizer" / "tokenizer.model", rows, keys)


@pytest.fixture(scope="module")
def bench(toy: Path, tmp_path_factory) -> Bench:
    return Bench(toy, tmp_path_factory.mktemp("lora"))


def check(script, words: str, bench: Bench, out: Path, **wanted: PlainModel) -> None:
    """Run a script on every layout; its adapters, by folder, are those of the plain models."""
    for layout in LAYOUTS:
        sizes = {word[:-1]: int(word[-1]) for word in layout.split()}
        world = math.prod(n for axis, n in sizes.items() if axis != "zero")
        flags = [f"--{axis} {n}" for axis, n in sizes.items() if axis != "dp"]
        folder = out / (layout or "one").replace(" ", "_")
        launch(world, script.main, f"{words} {' '.join(flags)} --out {folder}".split())
        for name, plain in wanted.items():
            trained = load_file(folder / name / "adapter_model.safetensors")
            expected = dict(plain.adapter)
            if isinstance(plain, PlainScorer):
                expected["score.weight"] = plain.head
            assert len(trained) == len(expected) >= 2 * 7 * 3
            for tensor, value in expected.items():
                error = (trained[f"base_model.model.{tensor}"] - value).abs().max()
                assert error < NEAR, (layout, name, tensor, error)


def without_adapter(model: PlainModel, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Return what `compute` gives with the adapter off: the reference."""
    scale, model.adapter_scale = model.adapter_scale, 0.0
    with torch.no_grad():
        result = compute()
    model.adapter_scale = scale
    return result


def test_dpo(bench: Bench, tmp_path: Path):
    """-log σ(β (Δ log π - Δ log π_ref))."""
    rows, trees = bench.trees("preferences.jsonl", ["chosen", "rejected"])
    model = PlainModel(bench.folder / "model", torch.float64)
    model.adapt(bench.start("model"), SCALE)
    trainer = PlainTrainer(model, 5, 1e-2)

    def margins(mine: range) -> list[Tensor]:
        return [
            model.logps(prompt, chosen).sum() - model.logps(prompt, rejected).sum()
            for prompt, (chosen, rejected) in (trees[i] for i in mine)
        ]

    for step in range(5):
        mine = range(4 * step, 4 * step + 4)
        ref = without_adapter(model, lambda mine=mine: margins(mine))
        losses = [-F.logsigmoid(0.3 * (a - b)) for a, b in zip(margins(mine), ref)]
        trainer.step(torch.stack(losses).mean())
    data = write(rows, tmp_path / "rows.jsonl")
    words = f"--model {bench.folder}/model --data {data} --beta 0.3 {OFFLINE} {COMMON}"
    check(train_dpo, words, bench, tmp_path, adapter=model)


def test_kto(bench: Bench, tmp_path: Path):
    """λ (1 - σ(±β (log π / π_ref - z))), z from prompts with the next example's answer."""
    rows, trees = bench.trees("labels.jsonl", ["response"])
    model = PlainModel(bench.folder / "model", torch.float64)
    model.adapt(bench.start("model"), SCALE)
    trainer = PlainTrainer(model, 5, 1e-2)

    def sums(pairs: list) -> list[Tensor]:
        return [model.logps(prompt, response).sum() for prompt, response in pairs]

    seen = []
    for step in range(5):
        mine = range(4 * step, 4 * step + 4)
        own = [(trees[i][0], trees[i][1][0]) for i in mine]
        other = [(trees[i][0], trees[mine[(k + 1) % 4]][1][0]) for k, i in enumerate(mine)]
        with torch.no_grad():
            now = sums(other)
        then = without_adapter(model, lambda other=other: sums(other))
        z = max(0.0, float(sum(now) - sum(then)) / 4)
        ref = without_adapter(model, lambda own=own: sums(own))
        total = torch.zeros((), dtype=torch.float64)
        for i, policy, fixed in zip(mine, sums(own), ref):
            sign = 1 if rows[i]["label"] else -1
            total = total + 1 - torch.sigmoid(sign * 0.4 * (policy - fixed - z))
        trainer.step(total / 4)
        seen.append(z)
    assert any(z > 0 for z in seen)
    data = write(rows, tmp_path / "rows.jsonl")
    words = f"--model {bench.folder}/model --data {data} --beta 0.4 {OFFLINE} {COMMON}"
    check(train_kto, words, bench, tmp_path, adapter=model)


def test_rm(bench: Bench, tmp_path: Path):
    """-log σ(r_chosen - r_rejected); the score head starts at 0 and trains whole."""
    rows, trees = bench.trees("preferences.jsonl", ["chosen", "rejected"])
    head = torch.zeros(1, SIZES["width"], dtype=torch.float64, requires_grad=True)
    model = PlainScorer(bench.folder / "model", head)
    model.adapt(bench.start("model", ("reward",)), SCALE)
    trainer = PlainTrainer(model, 5, 1e-2)
    for step in range(5):
        losses = []
        for prompt, (chosen, rejected) in trees[4 * step : 4 * step + 4]:
            gap = model.scores(prompt, chosen)[-1] - model.scores(prompt, rejected)[-1]
            losses.append(-F.logsigmoid(gap))
        trainer.step(torch.stack(losses).mean())
    data = write(rows, tmp_path / "rows.jsonl")
    words = f"--model {bench.folder}/model --data {data} {OFFLINE} {COMMON}"
    check(train_rm, words, bench, tmp_path, adapter=model)


def rollout_of(bench: Bench, config) -> tuple[list[tuple], list[float], object]:
    """Return (prompt, response) and reward of every sample of the one rollout, and the samples."""
    samples = drawn(bench.toy, bench.folder / "model", config)
    n = config.group_size
    pairs = [(samples.prompts.ids[i // n], s.tokens) for i, s in enumerate(samples.samples)]
    return pairs, samples.rewards.tolist(), samples


def test_reinforce(bench: Bench, tmp_path: Path):
    """Clipped surrogate with leave-one-out advantages, and the KL to the base (k3) in the loss."""
    config = train_reinforce.Config(
        group_size=4, max_new_tokens=8, reward=REWARD, no_eos_penalty=0.2
    )
    pairs, rewards, samples = rollout_of(bench, config)
    model = PlainModel(bench.folder / "model", torch.float64)
    model.adapt(bench.start("model"), SCALE)
    trainer = PlainTrainer(model, 1, 1e-2)
    with torch.no_grad():
        old = [model.logps(*pair) for pair in pairs]
    advantages = []
    for i, reward in enumerate(rewards):
        others = [rewards[j] for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
        advantages.append(reward - sum(others) / 3)
    assert len(set(rewards)) > 1
    total_tokens = sum(len(response) for _, response in pairs)
    for _ in updates.plan(samples, 5, 1, 0, config, Mesh()):
        loss = torch.zeros((), dtype=torch.float64)
        for pair, before, advantage in zip(pairs, old, advantages):
            moved = model.logps(*pair) - before  # the start is the reference too
            ratio = moved.exp()
            loss = loss - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
            loss = loss + 0.3 * ((-moved).exp() - 1 + moved).sum()
        trainer.done = 0
        trainer.step(loss / total_tokens)
    words = (
        f"--model {bench.folder}/model --data {bench.world}/sft.jsonl --group-size 4 --advantage "
        f"rloo --loss grpo --aggregate token --clip-low 0.2 --clip-high 0.2 --rollout-epochs 5 "
        f"--kl-in loss --kl-estimator k3 {ONLINE} {COMMON}"
    )
    check(train_reinforce, words, bench, tmp_path, adapter=model)


def test_ppo(bench: Bench, tmp_path: Path):
    """Actor and critic, each an adapter; GAE written out, advantages whitened, values clipped."""
    config = train_ppo.Config(group_size=2, max_new_tokens=8, reward=REWARD, no_eos_penalty=0.2)
    pairs, rewards, samples = rollout_of(bench, config)
    actor = PlainModel(bench.folder / "model", torch.float64)
    actor.adapt(bench.start("model"), SCALE)
    critic = PlainScorer(bench.folder / "scorer")
    critic.adapt(bench.start("scorer", ("value",)), SCALE)
    critic.head.requires_grad_(True)

    def values(prompt: list[int], response: list[int]) -> Tensor:
        return critic.scores(prompt, response)[len(prompt) - 1 : -1]

    with torch.no_grad():
        old = [actor.logps(*pair) for pair in pairs]
        old_values = [values(*pair) for pair in pairs]
    advantages = []
    for reward, v in zip(rewards, old_values):  # γ = 1, λ = 0.95; the KL is 0 so far
        after = torch.cat((v[1:], v.new_zeros(1)))
        delta = after - v
        delta[-1] += reward
        steps = torch.arange(len(v))
        powers = 0.95 ** (steps[None, :] - steps[:, None]).double()
        advantages.append((powers * (steps[None, :] >= steps[:, None])) @ delta)
    returns = [a + v for a, v in zip(advantages, old_values)]
    flat = torch.cat(advantages)
    whitened = [(a - flat.mean()) / (flat.var() + 1e-8).sqrt() for a in advantages]
    trainers = PlainTrainer(actor, 1, 1e-2), PlainTrainer(critic, 1, 2e-2)
    total_tokens = len(flat)
    for _ in updates.plan(samples, 5, 1, 0, config, Mesh()):
        loss = value_loss = torch.zeros((), dtype=torch.float64)
        for i, pair in enumerate(pairs):
            ratio = (actor.logps(*pair) - old[i]).exp()
            a = whitened[i]
            loss = loss - torch.minimum(a * ratio, a * ratio.clamp(0.8, 1.2)).sum()
            v = values(*pair)
            near = old_values[i] + (v - old_values[i]).clamp(-0.2, 0.2)
            errors = torch.maximum((v - returns[i]) ** 2, (near - returns[i]) ** 2)
            value_loss = value_loss + errors.sum() / 2
        for trainer, part in zip(trainers, (loss, value_loss)):
            trainer.done = 0
            trainer.step(part / total_tokens)
    words = (
        f"--model {bench.folder}/model --critic {bench.folder}/scorer --critic-lr 2e-2 "
        f"--data {bench.world}/sft.jsonl --group-size 2 --ppo-epochs 5 {ONLINE} {COMMON}"
    )
    check(train_ppo, words, bench, tmp_path, adapter=actor, critic_adapter=critic)


def write(rows: list[dict], path: Path) -> Path:
    """Write rows as JSONL; return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
