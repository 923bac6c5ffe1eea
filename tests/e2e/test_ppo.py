"""PPO: its step is a plain loop's, does not depend on how it is cut, resumes bit for bit; it learns what pays."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_metrics
from launch import launch, weights_in
from plain import PlainModel, PlainTrainer

import checkpoint
import losses
import train_ppo
from data.dataset import load_prompts
from data.templates import Template
from data.tokenizer import load_tokenizer
from parallel import Mesh
from sampling import rollout
from sampling.rewards import load_reward
from weights.folder import load_model, save_model

WORDS = "regex:[aeiou] "  # a reward that random answers earn now and then


def flags_of(toy: Path, **more) -> dict:
    return {
        "model": toy / "model", "data": toy / "world" / "sft.jsonl", "batch_size": 6, "group_size": 2, "lr": 1e-2,
        "critic_lr": 2e-2, "max_new_tokens": 8, "max_steps": 3, "reward": WORDS, "kl": 0.1, "ppo_epochs": 2,
        "warmup": 0.25, "weight_decay": 0.1, **more,
    }  # fmt: skip


def weights(out: Path, part: str = "final") -> dict:
    return weights_in(out / part)


def largest_gap(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ---- the same as a plain loop ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def double(toy: Path, tmp_path_factory) -> Path:
    """The toy model in float64, a reference that differs from it, and a reward model with a score head of its own."""
    folder = tmp_path_factory.mktemp("double")
    model = load_model(toy / "model", torch.float64)
    save_model(model, folder / "model", toy / "model")
    with torch.no_grad():
        model.head.weight.mul_(0.7)
    save_model(model, folder / "ref", toy / "model")
    judge = load_model(toy / "model", torch.float64, scores=("reward",))
    with torch.no_grad():
        judge.score_head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
    save_model(judge, folder / "judge", toy / "model")
    return folder


class PlainCritic(PlainModel):
    """The value before each token of a response: the score head where a language model has its own."""

    def __init__(self, folder: Path):
        super().__init__(folder, torch.float64)
        self.weights["lm_head.weight"] = self.weights.pop("score.weight")

    def values(self, prompt: list[int], response: list[int]) -> torch.Tensor:
        return self.logits(torch.tensor(prompt + response))[len(prompt) - 1 : -1, 0]


def plain_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = Σ_k (γλ)^k δ_{t+k}, the sum written out."""
    after = [*values[1:], 0.0]
    delta = [r + gamma * later - v for r, later, v in zip(rewards, after, values)]
    return [
        sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta)))
        for t in range(len(delta))
    ]


CASES = [  # γ, λ, estimator, entropy weight, clip of values, minibatches, epochs
    (1.0, 0.95, "k1", 0.0, 0.05, 1, 3),
    (0.9, 0.5, "k3", 0.02, 0.0, 2, 2),
    (1.0, 0.0, "abs", 0.1, 0.02, 3, 1),
    (0.95, 1.0, "k2", 0.0, 0.1, 1, 2),
]


@pytest.mark.parametrize("gamma, lam, kind, entropy_weight, clip_value, minibatches, epochs", CASES)
def test_a_step_equals_a_plain_loop_in_float64(
    gamma,
    lam,
    kind,
    entropy_weight,
    clip_value,
    minibatches,
    epochs,
    toy: Path,
    double: Path,
    tmp_path: Path,
    train,
):
    """Losses, gradient norms and every weight of actor and critic after a step's updates within 1e-10: advantages by
    loops in plain Python, responses one by one, no trees."""
    flags = flags_of(
        toy, model=double / "model", ref=double / "ref", critic=double / "judge", dtype="fp64", max_steps=1,
        gamma=gamma, shuffle=False, lam=lam, kl_estimator=kind, entropy_weight=entropy_weight, clip_value=clip_value,
        kl=0.3, minibatches=minibatches, ppo_epochs=epochs, no_eos_penalty=0.2, clip_ratio=0.02, warmup=0.0,
        schedule="constant",
    )  # fmt: skip
    (row,) = train(train_ppo, tmp_path / "out", **flags)

    config = train_ppo.Config(group_size=2, max_new_tokens=8, reward=WORDS, no_eos_penalty=0.2)
    config.minibatches, config.ppo_epochs = minibatches, epochs
    template = Template("auto", load_tokenizer(double / "model"))
    prompts = load_prompts(
        [toy / "world" / "sft.jsonl"], template, 1000, log=lambda line: None
    ).take(range(6))
    sample = rollout.local(load_model(double / "model", torch.float64), template, config)
    found = rollout.collect(
        prompts,
        sample,
        load_reward(WORDS, template),
        template,
        config,
        Mesh(),
        rollout.seeds(0, 1, 6, 2),
        1.0,
    )
    assert row["reward"] == pytest.approx(found.rewards.mean()) and len(set(found.rewards)) > 1
    pairs = [(found.prompts.ids[i // 2], s.tokens) for i, s in enumerate(found.samples)]
    actor, ref = (
        PlainModel(double / "model", torch.float64),
        PlainModel(double / "ref", torch.float64),
    )
    critic = PlainCritic(double / "judge")
    with torch.no_grad():
        old, against, before = (
            [f(*pair) for pair in pairs] for f in (actor.logps, ref.logps, critic.values)
        )

    def kl(x: torch.Tensor) -> torch.Tensor:
        return {"k1": x, "k2": x**2 / 2, "k3": torch.exp(-x) - 1 + x, "abs": x.abs()}[kind]

    worth, returns = [], []
    for reward, mine, theirs, values in zip(found.rewards.tolist(), old, against, before):
        each = (-0.3 * kl(mine - theirs)).tolist()
        each[-1] += reward
        worth.append(plain_gae(each, values.tolist(), gamma, lam))
        returns.append(torch.tensor(worth[-1], dtype=torch.float64) + values)
    flat = sum(worth, [])
    mean, deviation = statistics.fmean(flat), (statistics.variance(flat) + 1e-8) ** 0.5
    worth = [
        torch.tensor([(x - mean) / deviation for x in part], dtype=torch.float64) for part in worth
    ]

    trainers = PlainTrainer(actor, 1, 1e-2), PlainTrainer(critic, 1, 2e-2)
    total, norms, seen, held, slow = np.zeros(2), [], 0, 0, 0
    for part, _ in train_ppo.updates(found, 0, config, Mesh()):
        rows = [2 * i + k for i in part for k in range(2)]
        tokens, loss, value_loss = sum(len(pairs[i][1]) for i in rows), 0.0, 0.0
        for i in rows:
            prompt, response = pairs[i]
            logp = actor.logits(torch.tensor(prompt + response)).log_softmax(-1)[
                len(prompt) - 1 : -1
            ]
            new = logp[range(len(response)), response]
            rho, a = (new - old[i]).exp(), worth[i]
            loss = loss + torch.maximum(-a * rho, -a * rho.clamp(0.98, 1.02)).sum()
            loss = loss + entropy_weight * (logp.exp() * logp).sum()
            v = critic.values(prompt, response)
            near = torch.minimum(torch.maximum(v, before[i] - clip_value), before[i] + clip_value)
            off = (v - returns[i]) ** 2
            value_loss = (
                value_loss
                + 0.5 * (torch.maximum(off, (near - returns[i]) ** 2) if clip_value else off).sum()
            )
            slow += (
                (((near - v).abs() > 1e-12) & ((near - returns[i]) ** 2 > off)).sum().item()
                if clip_value
                else 0
            )
            held += ((rho > 1.02) & (a > 0) | (rho < 0.98) & (a < 0)).sum().item()
        both = []
        for trainer, value in zip(trainers, (loss, value_loss)):
            trainer.done = 0
            both.append(trainer.step(value / tokens))
        total += [value * tokens for value, _ in both]
        norms.append([norm for _, norm in both])
        seen += tokens
    assert len(norms) == minibatches * epochs
    wanted = dict(
        zip(
            ("loss", "value/loss", "grad_norm", "value/grad_norm"),
            [*total / seen, *np.mean(norms, 0)],
        )
    )
    wanted |= {
        "clip_fraction": held / seen,
        "kl": sum((a - b).sum() for a, b in zip(old, against)).item() / 12,
    }
    wanted["value/clip_fraction"] = slow / seen
    left = torch.cat(returns) - torch.cat(before)
    wanted["value/explained_variance"] = 1 - np.var(left.numpy()) / np.var(
        torch.cat(returns).numpy()
    )
    for name, value in wanted.items():
        assert row[name] == pytest.approx(value, abs=1e-10), name
    assert (
        abs(row["kl"]) > 0.01
        and abs(row["value/mean"]) > 0.01
        and (epochs == 1 or row["clip_fraction"] > 0.05)
    )
    assert largest_gap(weights(tmp_path / "out"), actor.weights) < 1e-10
    critic.weights["score.weight"] = critic.weights.pop("lm_head.weight")
    assert largest_gap(weights(tmp_path / "out", "critic"), critic.weights) < 1e-10


# ---- whatever the layout ---------------------------------------------------------------------------------------------


def one_rank(words: list[str]) -> list[np.ndarray]:
    """A run's advantages, of each step (M,), as this rank sees them."""
    seen, judge = [], train_ppo.judge

    def spy(found, *rest):
        row = judge(found, *rest)
        seen.append(found.data.token_columns["advantage"][found.data.scored == 1])
        return row

    train_ppo.judge = spy  # in a process of its own
    train_ppo.main(words)
    return seen


def test_ranks_change_nothing(toy: Path, double: Path, tmp_path: Path, train):
    """Two steps in float64 on one rank, and on two with half each of the prompts, of every matrix, of every row of
    tokens or of the layers: advantages, metrics and the weights of both models within 1e-10, the same samples."""
    flags = flags_of(
        toy, model=double / "model", reward=double / "judge", dtype="fp64", minibatches=2, max_steps=2, kl_target=0.5,
        batch_size=5, entropy_weight=0.01, max_tokens=300, eval_data=toy / "world" / "prompts_test.jsonl",
        log_samples=1, samples=0,
    )  # fmt: skip
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    (wanted,) = launch(1, one_rank, ["--out", str(tmp_path / "one"), *words])
    for name in ("dp", "tp", "cp", "pp"):
        layout = ["--out", str(tmp_path / name), *([] if name == "dp" else [f"--{name}", "2"])]
        for found in launch(2, one_rank, [*layout, *words]):
            for mine, one in zip(found, wanted, strict=True):
                assert np.abs(mine - one).max() < 1e-10 and mine.std() > 0.5
        for row, like in zip(
            read_metrics(tmp_path / name), read_metrics(tmp_path / "one"), strict=True
        ):
            assert row.keys() == like.keys()
            for key in row:
                assert row[key] == pytest.approx(like[key], abs=1e-10), f"{name}: {key}"
        for part in ("final", "critic"):
            assert (
                largest_gap(weights(tmp_path / name, part), weights(tmp_path / "one", part)) < 1e-10
            )
        samples = [
            (tmp_path / run / "samples.jsonl").read_text().splitlines() for run in (name, "one")
        ]
        for row, like in zip(
            *([json.loads(line) for line in lines] for lines in samples), strict=True
        ):
            assert row["response"] == like["response"] and row["reward"] == pytest.approx(
                like["reward"], abs=1e-10
            )


def test_micro_batches_and_shared_prompts_change_nothing(
    toy: Path, double: Path, tmp_path: Path, train
):
    """Three steps of four updates in float64, cut in other ways: metrics and weights agree within 1e-10."""
    flags = flags_of(
        toy, model=double / "model", critic=double / "judge", dtype="fp64", minibatches=2
    )
    wanted = train(train_ppo, tmp_path / "a", **flags)
    for name, more in (
        ("b", {"max_tokens": 60, "rollout_batch": 5}),
        ("c", {"share_prompts": False}),
    ):
        got = train(train_ppo, tmp_path / name, **flags, **more)
        for row, like in zip(got, wanted, strict=True):
            for key in row.keys() - {"tokens"}:
                assert row[key] == pytest.approx(like[key], abs=1e-10), key
        for part in ("final", "critic"):
            assert (
                largest_gap(weights(tmp_path / "a", part), weights(tmp_path / name, part)) < 1e-10
            )


def test_the_first_ratio_is_one(toy: Path, tmp_path: Path, train, monkeypatch):
    """Recomputed by the path of training, in fp32: with one update a rollout exactly 1 in every step and never
    clipped; with several so in the first of each rollout, and not in those that follow."""
    plans, scored, updates, token_logps = [], [], train_ppo.updates, rollout.token_logps
    monkeypatch.setattr(
        train_ppo, "updates", lambda *args: plans.append(updates(*args)) or plans[-1]
    )
    monkeypatch.setattr(
        rollout, "token_logps", lambda *args: scored.append(args[2]) or token_logps(*args)
    )
    rows = train(train_ppo, tmp_path / "once", **flags_of(toy, ppo_epochs=1, max_tokens=60))
    # Small matrices give the same bits in any company, large ones do not: so the company has to be the same.
    assert (
        scored == [plan[0][1] for plan in plans for _ in ("policy", "reference")]
        and len(scored[0]) > 1
    )
    assert [row["ratio"] for row in rows] == [1.0] * 3 and [
        row["clip_fraction"] for row in rows
    ] == [0.0] * 3
    assert rows[-1]["kl"] != 0 and all(
        row["grad_norm"] > 0 and 0 < row["sampler_gap"] < 1e-5 for row in rows
    )
    seen = []

    def spy(ratio, *rest):
        seen.append((ratio - 1).abs().max().item())
        return surrogate(ratio, *rest)

    surrogate = losses.clipped_surrogate
    monkeypatch.setattr(losses, "clipped_surrogate", spy)
    rows = train(train_ppo, tmp_path / "often", **flags_of(toy, minibatches=2, max_steps=2))
    assert len(seen) == 8 and seen[0] == seen[4] == 0.0 and min(seen[1:4] + seen[5:]) > 1e-4
    assert all(0 < row["clip_fraction"] < 1 for row in rows)


# ---- resume, warm-up, β ----------------------------------------------------------------------------------------------


def test_resumed_is_never_stopped_bit_for_bit(toy: Path, tmp_path: Path, train):
    """Samples, metrics, both models and β; the reference of a resumed run is that of step 0."""
    heldout = toy / "world" / "prompts_test.jsonl"
    flags = flags_of(
        toy,
        max_steps=6,
        minibatches=2,
        eval_data=heldout,
        eval_every=3,
        log_samples=2,
        kl_target=1.0,
        critic_warmup=1,
    )
    whole = train(train_ppo, tmp_path / "whole", **flags)
    part = train(train_ppo, tmp_path / "part", **flags, save_every=1, keep=9)
    assert part == whole
    for step in (6, 5, 4):  # as if killed after step 4, having written two more than it saved
        (checkpoint.all_steps(tmp_path / "part")[0]).rename(tmp_path / f"gone{step}")
    assert train(train_ppo, tmp_path / "part", **flags, resume="auto") == whole
    assert (tmp_path / "part" / "samples.jsonl").read_text() == (
        tmp_path / "whole" / "samples.jsonl"
    ).read_text()
    for name in ("final", "critic"):
        assert (
            largest_gap(weights(tmp_path / "whole", name), weights(tmp_path / "part", name)) == 0.0
        )
    betas = [row["beta"] for row in whole if "beta" in row]
    assert (
        json.loads((tmp_path / "gone4" / "state.json").read_text())["extra"]["beta"]
        == betas[4]
        != betas[3]
    )
    assert whole[0]["step"] == 0 and "eval/reward" in whole[0]


def test_beta_follows_the_target(toy: Path, tmp_path: Path, train, monkeypatch):
    """Ziegler et al.: β times 1 + K clip(KL / target - 1, ±0.2), in all steps but those of the critic alone; and it is
    what a nat costs."""
    paid, token_rewards = [], losses.token_rewards
    monkeypatch.setattr(
        losses, "token_rewards", lambda *args: paid.append(args[3]) or token_rewards(*args)
    )
    rows = train(
        train_ppo,
        tmp_path / "out",
        **flags_of(toy, max_steps=5, kl_target=2.0, kl_gain=0.5, critic_warmup=1),
    )
    betas, kls = [row["beta"] for row in rows], [row["kl"] for row in rows]
    assert paid == betas and betas[0] == betas[1] == 0.1 and kls[0] == kls[1] == 0
    errors = [max(-0.2, min(0.2, kl / 2 - 1)) for kl in kls[1:4]]
    assert betas[2:] == pytest.approx(
        [b * (1 + 0.5 * e) for b, e in zip(betas[1:4], errors)], rel=1e-12
    )
    assert errors[0] < 0 < errors[-1] and kls[2] != 0  # from far below to above


def test_the_critic_warms_up_alone(toy: Path, double: Path, tmp_path: Path, train):
    """For as many steps as it is told the policy stays bit for bit what it was, while values come nearer to returns."""
    flags = flags_of(
        toy, max_steps=8, critic_warmup=8, ppo_epochs=4, critic_lr=3e-3, batch_size=7, warmup=0.0
    )
    rows = train(train_ppo, tmp_path / "out", **flags)
    assert largest_gap(weights(tmp_path / "out"), weights(toy, "model")) == 0.0
    assert rows[0]["value/mean"] == 0.0 and rows[0]["value/explained_variance"] == pytest.approx(
        0.0, abs=1e-9
    )
    assert rows[-1]["value/mean"] == pytest.approx(
        np.mean([row["reward"] for row in rows]), abs=0.15
    )
    assert not any("loss" in row or "ratio" in row for row in rows) and all(
        row["kl"] == 0 for row in rows
    )


def test_the_critic_starts_from_the_reward_model(toy: Path, double: Path, tmp_path: Path, train):
    """A new head says 0 everywhere; a reward model's, or that of --critic, does not. Going on from OUT/critic works."""
    for name, more, new in (
        ("plain", {}, True),
        ("reward", {"reward": double / "judge"}, False),
        ("named", {"critic": double / "judge"}, False),
        ("again", {"critic": tmp_path / "plain" / "critic"}, False),
        ("language", {"reward": double / "judge", "critic": toy / "model"}, True),
    ):
        (row,) = train(train_ppo, tmp_path / name, **flags_of(toy, max_steps=1, **more))
        assert (row["value/mean"] == 0.0) == new, name


# ---- what it is for --------------------------------------------------------------------------------------------------


def test_what_pays_is_learned(toy: Path, tmp_path: Path, train):
    """From random weights: answers with an e at a word's end become the rule within a few steps."""
    flags = flags_of(
        toy, max_steps=15, batch_size=8, group_size=4, epochs=2, kl=0.0, reward="regex:e ", lr=2e-2, critic_lr=1e-3,
        weight_decay=0.0, warmup=0.1, minibatches=2, clip_value=0.0, log_samples=0,
    )  # fmt: skip
    rows = train(train_ppo, tmp_path / "out", **flags)
    first, last = (np.mean([row["reward"] for row in part]) for part in (rows[:3], rows[-3:]))
    assert (
        last > first + 0.3
        and "kl" not in rows[0]
        and not (tmp_path / "out" / "samples.jsonl").exists()
    )


def test_a_critic_that_reads_other_tokens_is_refused(
    toy: Path, real_model: Path, tmp_path: Path, train
):
    """Its values would be of other words."""
    with pytest.raises(ValueError, match="has another tokenizer than the policy"):
        train(train_ppo, tmp_path / "out", **flags_of(toy, critic=real_model))


def test_settings_that_cannot_be_are_refused(toy: Path, tmp_path: Path, train):
    """One line that names the flag, before anything is loaded."""
    for more, words in (
        ({"kl": 0, "kl_target": 3}, "--kl-target moves β"),
        ({"ppo_epochs": 0}, "must be at least 1"),
        ({"minibatches": 0}, "must be at least 1"),
        ({"temperature": 0}, "--temperature above 0"),
        ({"rollout_url": "http://localhost:1"}, "for ever"),
        ({"reward": ""}, "--reward .missing. is no folder"),
        ({"max_tokens": 20}, "more than a micro-batch of 20: raise --max-tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            train(train_ppo, tmp_path / words, **flags_of(toy, **more))
