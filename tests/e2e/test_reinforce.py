"""REINFORCE: a step equals a plain loop in any layout; runs resume bit for bit; it learns."""

import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL, read_metrics
from launch import launch, weights_in
from online import WORDS, drawn, read_samples, sample_with_marks, scored_places
from plain import PlainModel, PlainTrainer

import checkpoint
import losses
import train_ppo
import train_reinforce
from parallel import Mesh
from sampling import source, updates
from weights.folder import load_model, save_model


def flags_of(toy: Path, **more) -> dict:
    """Return the flags of a short run, and others in their place."""
    return {
        "model": toy / "model",
        "data": toy / "world" / "sft.jsonl",
        "batch_size": 6,
        "group_size": 4,
        "lr": 1e-2,
        "max_new_tokens": 8,
        "max_steps": 3,
        "reward": WORDS,
        "kl": 0.1,
        "warmup": 0.25,
        "weight_decay": 0.1,
        **more,
    }


def largest_gap(a: dict, b: dict) -> float:
    """Return the largest difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ---- equal to a plain loop -------------------------------------------------------------------


@pytest.fixture(scope="module")
def double(toy: Path, tmp_path_factory) -> Path:
    """Return the toy model in float64, and a reference that differs from it."""
    folder = tmp_path_factory.mktemp("double")
    model = load_model(toy / "model", torch.float64)
    save_model(model, folder / "model", toy / "model")
    with torch.no_grad():
        model.head.weight.mul_(0.7)
    save_model(model, folder / "ref", toy / "model")
    return folder


def plain_advantages(
    name: str, rewards: list[float], kl: list[list[float]], group: int, beta: float
) -> list[list[float]]:
    """Return the advantage of each scored token, a list per response, in plain Python."""
    mean = statistics.fmean
    if name == "reinforce++":
        to_go = [[r - beta * sum(k[t:]) for t in range(len(k))] for r, k in zip(rewards, kl)]
        flat = sum(to_go, [])
        deviation = math.sqrt(statistics.variance(flat) + 1e-8)
        return [[(x - mean(flat)) / deviation for x in part] for part in to_go]
    result = []
    for i, k in enumerate(kl):
        start = i // group * group
        values = [rewards[j] - beta * sum(kl[j]) for j in range(start, start + group)]
        own, others = values[i - start], values[: i - start] + values[i - start + 1 :]
        match name:
            case "rloo":
                advantage = own - mean(others)
            case "grpo":
                advantage = (own - mean(values)) / (statistics.stdev(values) + 1e-4)
            case "dr_grpo":
                advantage = own - mean(values)
        result.append([advantage] * len(k))
    return result


CASES = [  # advantage, loss, KL in, its estimator, aggregate, minibatches, epochs, unscored tokens
    ("rloo", "grpo", "reward", "k1", "token", 1, 1, False),
    ("grpo", "grpo", "loss", "k3", "sequence", 2, 2, False),
    ("dr_grpo", "dapo", "loss", "k2", "constant", 1, 3, False),
    ("reinforce++", "cispo", "reward", "k3", "token", 3, 1, False),
    ("rloo", "gspo", "reward", "abs", "sequence", 1, 2, False),
    ("rloo", "reinforce", "loss", "k3", "token", 1, 1, False),
    ("rloo", "grpo", "reward", "k1", "token", 1, 1, True),
    ("grpo", "gspo", "loss", "k3", "sequence", 2, 2, True),
    ("dr_grpo", "dapo", "reward", "k2", "constant", 1, 2, True),
    ("reinforce++", "cispo", "reward", "k1", "token", 2, 1, True),
]


@pytest.mark.parametrize(
    "advantage, loss, kl_in, kind, aggregate, minibatches, epochs, unscored", CASES
)
def test_a_step_equals_a_plain_loop_in_float64(
    advantage: str,
    loss: str,
    kl_in: str,
    kind: str,
    aggregate: str,
    minibatches: int,
    epochs: int,
    unscored: bool,
    toy: Path,
    double: Path,
    tmp_path: Path,
    train,
    monkeypatch,
):
    """Loss, gradient norm and every weight after a step's updates agree within 1e-10.

    The plain loop runs the responses one by one, no trees. With unscored tokens in the responses it
    reads the log-probs of scored tokens alone, and counts them alone.
    """
    if unscored:
        sample_with_marks(monkeypatch)
    flags = flags_of(
        toy,
        model=double / "model",
        ref=double / "ref",
        dtype="fp64",
        max_steps=1,
        shuffle=False,
        advantage=advantage,
        loss=loss,
        kl_in=kl_in,
        kl_estimator=kind,
        aggregate=aggregate,
        minibatches=minibatches,
        rollout_epochs=epochs,
        kl=0.3,
        no_eos_penalty=0.2,
        clip_low=0.02,
        clip_high=0.03,
        warmup=0.0,
        schedule="constant",
    )
    (row,) = train(train_reinforce, tmp_path / "out", **flags)

    config = train_reinforce.Config(
        group_size=4, max_new_tokens=8, reward=WORDS, no_eos_penalty=0.2
    )
    samples = drawn(toy, double / "model", config)
    rewards = samples.rewards.tolist()
    assert row["reward"] == pytest.approx(np.mean(rewards))
    assert len(set(rewards)) > 1
    pairs = [(samples.prompts.ids[i // 4], s.tokens) for i, s in enumerate(samples.samples)]
    scored = scored_places(samples, unscored)

    policy = PlainModel(double / "model", torch.float64)
    ref = PlainModel(double / "ref", torch.float64)
    trainer = PlainTrainer(policy, total=1, lr=1e-2)
    with torch.no_grad():
        old_logps = [policy.logps(*pair)[own] for pair, own in zip(pairs, scored)]
        ref_logps = [ref.logps(*pair)[own] for pair, own in zip(pairs, scored)]

    def kl(x: torch.Tensor) -> torch.Tensor:
        return {"k1": x, "k2": x**2 / 2, "k3": torch.exp(-x) - 1 + x, "abs": x.abs()}[kind]

    penalty = [kl(a - b).tolist() for a, b in zip(old_logps, ref_logps)]
    beta = 0.3 if kl_in == "reward" else 0.0
    advantages = plain_advantages(advantage, rewards, penalty, 4, beta)
    values, norms = [], []
    for update in updates.plan(samples, epochs, minibatches, 0, config, Mesh()):
        rows = [4 * p + k for p in update.prompts for k in range(4)]
        tokens = sum(len(scored[i]) for i in rows)
        total = 0.0
        for i in rows:
            new_logps = policy.logps(*pairs[i])[scored[i]]
            a = torch.tensor(advantages[i], dtype=torch.float64)
            rho = (new_logps - old_logps[i]).exp()
            if loss == "gspo":
                rho = (new_logps - old_logps[i]).mean().exp().expand(len(new_logps))
            terms = -torch.minimum(rho * a, rho.clamp(0.98, 1.03) * a)
            if loss == "cispo":
                terms = -rho.detach().clamp(max=1.03) * a * new_logps
            if loss == "reinforce":
                terms = -a * new_logps
            if kl_in == "loss":
                terms = terms + 0.3 * kl(new_logps - ref_logps[i])
            weight = {
                "token": 1 / tokens,
                "sequence": 1 / (len(rows) * len(new_logps)),
                "constant": 1 / (len(rows) * 8),
            }[aggregate]
            total = total + terms.sum() * weight
        trainer.done = 0
        value, norm = trainer.step(total)
        values.append(value)
        norms.append(norm)
    assert len(values) == minibatches * epochs
    assert row["loss"] == pytest.approx(statistics.fmean(values), abs=1e-10)
    assert row["grad_norm"] == pytest.approx(statistics.fmean(norms), abs=1e-10)
    nats = sum((a - b).sum().item() for a, b in zip(old_logps, ref_logps)) / len(pairs)
    assert row["kl"] == pytest.approx(nats, abs=1e-9)
    assert abs(nats) > 0.01
    entropy = -torch.cat(old_logps).mean().item()
    assert row["entropy"] == pytest.approx(entropy, abs=1e-9)
    length = np.mean([len(tokens) for _, tokens in pairs])
    assert row["completions/mean_length"] == pytest.approx(length)
    assert largest_gap(weights_in(tmp_path / "out" / "final"), policy.weights) < 1e-10


# ---- whatever the layout ---------------------------------------------------------------------


def test_micro_batches_and_shared_prompts_change_nothing(
    toy: Path, double: Path, tmp_path: Path, train
):
    """Three steps of two updates in float64, cut otherwise: metrics and weights within 1e-10."""
    flags = flags_of(
        toy,
        model=double / "model",
        dtype="fp64",
        minibatches=2,
        advantage="grpo",
        kl_in="loss",
        kl_estimator="k3",
    )
    wanted = train(train_reinforce, tmp_path / "a", **flags)
    for name, more in (
        ("b", {"max_tokens": 75, "rollout_batch": 5}),
        ("c", {"share_prompts": False}),
    ):
        rows = train(train_reinforce, tmp_path / name, **flags, **more)
        for row, like in zip(rows, wanted, strict=True):
            assert row.keys() == like.keys()
            for key in row.keys() - {"tokens"}:
                assert row[key] == pytest.approx(like[key], abs=1e-10), key
        mine, one = weights_in(tmp_path / name / "final"), weights_in(tmp_path / "a" / "final")
        assert largest_gap(mine, one) < 1e-10


@pytest.fixture(scope="module")
def reward_model(double: Path, tmp_path_factory) -> Path:
    """Return a reward model of random weights in float64."""
    folder = tmp_path_factory.mktemp("reward") / "rm"
    model = load_model(double / "model", torch.float64, scores=("reward",))
    with torch.no_grad():
        model.score_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    save_model(model, folder, double / "model")
    return folder


@pytest.mark.parametrize("layout", ["dp", "tp", "cp", "pp"])
def test_two_ranks_do_what_one_does(
    layout: str, toy: Path, double: Path, reward_model: Path, tmp_path: Path, train
):
    """Sharded models, rewards and samples, two updates per rollout: numbers within 1e-9."""
    flags = flags_of(
        toy,
        model=double / "model",
        dtype="fp64",
        minibatches=2,
        reward=reward_model,
        max_steps=2,
        batch_size=5,
        no_eos_penalty=0.3,
        kl_in="loss",
        kl_estimator="k3",
        eval_data=toy / "world" / "prompts_test.jsonl",
    )
    wanted = train(train_reinforce, tmp_path / "one", **flags)
    if layout != "dp":
        flags[layout] = 2
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    launch(2, train_reinforce.main, ["--out", str(tmp_path / "two"), *words])
    for row, like in zip(read_metrics(tmp_path / "two"), wanted, strict=True):
        assert row.keys() == like.keys()
        for key in row:
            assert row[key] == pytest.approx(like[key], abs=1e-9), key
    mine, one = weights_in(tmp_path / "two" / "final"), weights_in(tmp_path / "one" / "final")
    assert largest_gap(mine, one) < 1e-9
    mine, one = ([row["response"] for row in read_samples(tmp_path / n)] for n in ("two", "one"))
    assert mine == one
    assert len(one) == 16


@pytest.mark.parametrize("loss", losses.POLICY_LOSSES)
def test_the_first_ratio_is_one(loss: str, toy: Path, tmp_path: Path, train):
    """With one update per rollout it is 1 to the bit in every step, and the policy still moves."""
    more = {"cov_low": 1e6, "cov_high": 1e7} if loss == "clip_cov" else {}  # nothing is left out
    rows = train(train_reinforce, tmp_path / "out", **flags_of(toy, loss=loss, **more))
    assert [row["ratio"] for row in rows] == [1.0] * 3
    assert [row["clip_fraction"] for row in rows] == [0.0] * 3
    assert rows[-1]["kl"] != 0
    assert rows[0]["kl_k3"] < 1e-6
    assert all(row["grad_norm"] > 0 for row in rows)


def test_the_first_of_several_updates_has_ratio_one(toy: Path, tmp_path: Path, train, monkeypatch):
    """Log-probs recomputed as training computes them: exactly 1 in the first update, then not."""
    distances, scored, plans = [], [], []
    policy_gradient = losses.policy_gradient
    token_logps = updates.token_logps
    plan_of = updates.plan

    def spy_loss(*args):
        per_token, metrics = policy_gradient(*args)
        distances.append((metrics["ratio"] - 1).abs().max().item())
        return per_token, metrics

    def spy_logps(*args):
        scored.append(args[2])
        return token_logps(*args)

    def spy_updates(*args):
        plans.append(plan_of(*args))
        return plans[-1]

    monkeypatch.setattr(losses, "policy_gradient", spy_loss)
    monkeypatch.setattr(updates, "token_logps", spy_logps)
    monkeypatch.setattr(updates, "plan", spy_updates)
    flags = flags_of(toy, minibatches=2, rollout_epochs=2, max_steps=2, max_tokens=110)
    rows = train(train_reinforce, tmp_path / "out", **flags)
    # Policy and reference are scored on the very micro-batches of the first pass.
    twice = [plan for plan in plans for _ in ("policy", "reference")]
    for bins, plan in zip(scored, twice, strict=True):
        assert bins == plan[0].bins + plan[1].bins
        assert len(plan) == 4
    counts = [len(update.bins) for plan in plans for update in plan]
    assert len(counts) == 8
    assert sum(counts) == len(distances)
    starts = np.cumsum([0, *counts])
    worst = [max(distances[a:b]) for a, b in zip(starts, starts[1:])]  # of each update
    assert worst[0] == worst[4] == 0.0
    assert min(worst[1:4] + worst[5:]) > 1e-4
    assert all(0 < row["clip_fraction"] < 1 and 0 < row["sampler_gap"] < 1e-5 for row in rows)


# ---- resume ----------------------------------------------------------------------------------


@pytest.mark.parametrize("minibatches", [1, 2])
def test_resumed_equals_uninterrupted_bit_for_bit(
    minibatches: int, toy: Path, tmp_path: Path, train
):
    """Samples, metrics and weights; the reference of a resumed run is that of step 0."""
    flags = flags_of(
        toy,
        max_steps=6,
        minibatches=minibatches,
        eval_data=toy / "world" / "prompts_test.jsonl",
        eval_every=3,
        log_samples=2,
    )
    whole = train(train_reinforce, tmp_path / "whole", **flags)
    part = train(train_reinforce, tmp_path / "part", **flags, save_every=1, keep=9)
    assert part == whole
    for step in (6, 5, 4):  # as if killed after step 4, having logged two steps more than it saved
        checkpoint.all_steps(tmp_path / "part")[0].rename(tmp_path / f"gone{step}")
    (tmp_path / "part" / "finished.json").unlink()
    assert train(train_reinforce, tmp_path / "part", **flags, resume="auto") == whole
    rows = read_samples(tmp_path / "whole")
    assert read_samples(tmp_path / "part") == rows
    a, b = weights_in(tmp_path / "whole" / "final"), weights_in(tmp_path / "part" / "final")
    assert largest_gap(a, b) == 0.0
    assert [row["step"] for row in rows] == [step for step in (1, 2, 4, 6) for _ in range(16)]
    assert rows[0].keys() == {"step", "prompt", "response", "tokens", "reward", "ended"}
    assert whole[0]["step"] == 0
    assert whole[0].keys() == {
        "step",
        "eval/reward",
        "eval/reward_std",
        "eval/completions/mean_length",
        "eval/completions/ended",
    }
    best = max(row["eval/reward"] for row in whole if "eval/reward" in row)  # step 0 counts
    state = json.loads((tmp_path / "gone6" / "state.json").read_text())
    assert state["best"] == -best


def test_the_start_counts_for_best(toy: Path, tmp_path: Path, train):
    """The first of equal rewards wins: best/ is the policy before any update."""
    flags = flags_of(toy, eval_data=toy / "world" / "prompts_test.jsonl", eval_every=1)
    flags |= {"reward": "regex:never said", "kl": 1.0, "max_steps": 2, "no_eos_penalty": 0.0}
    flags["ref"] = toy / "model"
    train(train_reinforce, tmp_path / "out", **flags)
    assert largest_gap(weights_in(tmp_path / "out" / "best"), weights_in(toy / "model")) == 0.0


@pytest.mark.parametrize("advantage", losses.ADVANTAGES)
def test_kl_stands_in_the_loss_where_advantages_are_scaled(advantage: str):
    """grpo and reinforce++ divide by a deviation; explicit flags are kept."""
    config = train_reinforce.resolve_kl(train_reinforce.Config(advantage=advantage))
    scaled = advantage in ("grpo", "reinforce++")
    assert (config.kl_in, config.kl_estimator) == (("loss", "k3") if scaled else ("reward", "k1"))
    for place, kind in (("reward", "k3"), ("loss", "k2")):
        given = train_reinforce.Config(advantage=advantage, kl_in=place, kl_estimator=kind)
        assert train_reinforce.resolve_kl(given) == given


def test_beta_counts_in_groups_of_equal_rewards(toy: Path, double: Path, tmp_path: Path, train):
    """With grpo's defaults the gradient of a constant reward is proportional to β."""
    norms = []
    for beta in (0.05, 0.005, 0.0005):
        flags = flags_of(toy, model=double / "model", ref=double / "ref", dtype="fp64", kl=beta)
        flags |= {"advantage": "grpo", "reward": "regex:never said", "max_steps": 1}
        (row,) = train(train_reinforce, tmp_path / str(beta), **flags)
        norms.append(row["grad_norm"] / beta)
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-9)
    assert norms[0] > 0.1


# ---- learning, and bad settings --------------------------------------------------------------


def test_a_reward_is_learned(toy: Path, tmp_path: Path, train):
    """From random weights: responses with an e at a word's end become the rule in a few steps."""
    flags = flags_of(
        toy,
        max_steps=15,
        batch_size=8,
        epochs=2,
        kl=0.0,
        reward="regex:e ",
        lr=3e-2,
        weight_decay=0.0,
    )
    rows = train(train_reinforce, tmp_path / "out", **flags)
    first, last = (np.mean([row["reward"] for row in part]) for part in (rows[:3], rows[-3:]))
    assert first < 0.6
    assert last > 0.9
    assert "kl" not in rows[0]


def test_gsm8k_with_the_exact_answer_runs_and_resumes(real_model: Path, tmp_path: Path, train):
    """Twenty steps on real rows, resumed once; a tiny model earns nothing and breaks nothing."""
    data = REAL / "gsm8k" / "sft_train.jsonl"
    if not data.exists():
        pytest.skip("shared/data is absent")
    flags = {
        "model": real_model,
        "data": data,
        "reward": "exact:A:",
        "advantage": "grpo",
        "group_size": 3,
        "batch_size": 2,
        "max_new_tokens": 12,
        "max_steps": 20,
        "lr": 1e-3,
        "kl_in": "loss",
        "kl_estimator": "k3",
        "minibatches": 2,
    }
    first = train(train_reinforce, tmp_path / "out", **flags, max_minutes=1e-6)
    assert len(first) == 1 and checkpoint.newest(tmp_path / "out").name == "step_1"
    rows = train(train_reinforce, tmp_path / "out", **flags, resume="auto")
    assert [row["step"] for row in rows] == list(range(1, 21)) and rows[0] == first[0]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert (tmp_path / "out" / "final" / "model.safetensors").exists()


def test_impossible_settings_are_refused(toy: Path, tmp_path: Path, train):
    """One line that names the flag, before any model is loaded."""
    for more, words in (
        ({"group_size": 1}, "--group-size 2 or more"),
        ({"kl_in": "loss", "kl_estimator": "k1"}, "use k3 or k2"),
        ({"advantage": "grpo", "kl_estimator": "k1"}, "use k3 or k2"),
        ({"loss": "reinforce", "minibatches": 2}, "one update per rollout"),
        ({"reward": ""}, "--reward .missing. is no folder"),
        ({"max_tokens": 40}, "more than a micro-batch of 40: raise --max-tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            train(train_reinforce, tmp_path / words, **flags_of(toy, **more))


@pytest.mark.parametrize("script", [train_reinforce, train_ppo])
def test_an_engine_that_is_off_is_corrected(script, toy: Path, tmp_path: Path, train, monkeypatch):
    """Log-probs told lower by log 1.5 than the policy's: all weights are 1.5, and so is the loss's
    gradient; with a cap of 1.2 they are 1.2; masked, nothing is left. The sampler's own are 1.
    """
    flags = {
        "model": toy / "model",
        "data": toy / "world" / "sft.jsonl",
        "batch_size": 4,
        "group_size": 2,
        "max_new_tokens": 8,
        "max_steps": 1,
        "reward": WORDS,
        "dtype": "fp64",
        "kl": 0.0,
        "clip": 0.0,
        "engine_by": "token",
    }
    if script is train_ppo:
        flags |= {"entropy_weight": 0.0, "ppo_epochs": 1}
    plain = train(script, tmp_path / "plain", **flags)[-1]
    on = {**flags, "engine_correction": "truncate"}
    own = train(script, tmp_path / "own", **on)[-1]
    assert own["engine/weight"] == pytest.approx(1, abs=1e-6) and own["engine/cut"] == 0
    assert own["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-6)
    draw = source.generate

    def off(*args, **more):
        samples = draw(*args, **more)
        told = [[logp - math.log(1.5) for logp in s.policy_logps] for s in samples]
        return [s._replace(policy_logps=logps) for s, logps in zip(samples, told)]

    monkeypatch.setattr(source, "generate", off)
    for more, weight in (({}, 1.5), ({"engine_cap": 1.2}, 1.2)):
        row = train(script, tmp_path / f"off{weight}", **on, **more)[-1]
        assert row["engine/weight"] == pytest.approx(weight, rel=1e-6)
        assert row["engine/cut"] == float(weight == 1.2)
        assert row["grad_norm"] == pytest.approx(weight * plain["grad_norm"], rel=1e-6)
        assert row["engine/kl"] == pytest.approx(-math.log(1.5), abs=1e-6)
    masked = {**flags, "engine_correction": "mask", "engine_cap": 1.2}
    row = train(script, tmp_path / "masked", **masked)[-1]
    assert row["grad_norm"] == 0 and row["engine/cut"] == 1
