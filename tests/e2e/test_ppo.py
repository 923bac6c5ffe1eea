"""PPO: a step equals a plain loop in any layout; runs resume bit for bit; it learns."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_metrics
from launch import launch, weights_in
from online import WORDS, drawn, read_samples, sample_with_marks, scored_places
from plain import PlainModel, PlainTrainer

import checkpoint
import losses
import train_ppo
from parallel import Mesh
from sampling import updates
from weights.folder import load_model, save_model


def flags_of(toy: Path, **more) -> dict:
    """Return the flags of a short run, and others in their place."""
    return {
        "model": toy / "model",
        "data": toy / "world" / "sft.jsonl",
        "batch_size": 6,
        "group_size": 2,
        "lr": 1e-2,
        "critic_lr": 2e-2,
        "max_new_tokens": 8,
        "max_steps": 3,
        "reward": WORDS,
        "kl": 0.1,
        "ppo_epochs": 2,
        "warmup": 0.25,
        "weight_decay": 0.1,
        **more,
    }


def weights(out: Path, part: str = "final") -> dict:
    return weights_in(out / part)


def largest_gap(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ---- equal to a plain loop -------------------------------------------------------------------


@pytest.fixture(scope="module")
def double(toy: Path, tmp_path_factory) -> Path:
    """Return the toy model in float64, a reference that differs, and a reward model."""
    folder = tmp_path_factory.mktemp("double")
    model = load_model(toy / "model", torch.float64)
    save_model(model, folder / "model", toy / "model")
    with torch.no_grad():
        model.head.weight.mul_(0.7)
    save_model(model, folder / "ref", toy / "model")
    reward_model = load_model(toy / "model", torch.float64, scores=("reward",))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        reward_model.score_head.weight.normal_(0, 0.1, generator=generator)
    save_model(reward_model, folder / "rm", toy / "model")
    return folder


class PlainCritic(PlainModel):
    """A plain model with a score head: the value before each token of a response."""

    def __init__(self, folder: Path):
        super().__init__(folder, torch.float64)
        self.weights["lm_head.weight"] = self.weights.pop("score.weight")

    def values(self, prompt: list[int], response: list[int]) -> torch.Tensor:
        """Return (len(response),) values."""
        return self.logits(torch.tensor(prompt + response))[len(prompt) - 1 : -1, 0]


def plain_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Return A_t = Σ_k (γλ)^k δ_{t+k}, the sum written out."""
    after = [*values[1:], 0.0]
    delta = [r + gamma * later - v for r, later, v in zip(rewards, after, values)]
    return [
        sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta)))
        for t in range(len(delta))
    ]


# γ, λ, estimator, entropy weight, clip of values, minibatches, epochs, unscored tokens, --mask-cut
CASES = [
    (1.0, 0.95, "k1", 0.0, 0.05, 1, 3, False, False),
    (0.9, 0.5, "k3", 0.02, 0.0, 2, 2, False, True),
    (1.0, 0.0, "abs", 0.1, 0.02, 3, 1, False, False),
    (0.95, 1.0, "k2", 0.0, 0.1, 1, 2, False, False),
    (0.95, 0.9, "k1", 0.05, 0.05, 2, 2, True, True),
]


@pytest.mark.parametrize(
    "gamma, lam, kind, entropy_weight, clip_value, minibatches, epochs, unscored, mask_cut", CASES
)
def test_a_step_equals_a_plain_loop_in_float64(
    gamma: float,
    lam: float,
    kind: str,
    entropy_weight: float,
    clip_value: float,
    minibatches: int,
    epochs: int,
    unscored: bool,
    mask_cut: bool,
    toy: Path,
    double: Path,
    tmp_path: Path,
    train,
    monkeypatch,
):
    """Losses, gradient norms and weights of actor and critic after a step agree within 1e-10.

    The plain loop computes advantages in plain Python and runs the responses one by one, no trees.
    With unscored tokens in the responses it reads log-probs and values of scored tokens alone.
    """
    if unscored:
        sample_with_marks(monkeypatch)
    more = {"stop": ["u"]} if mask_cut else {}  # so that some samples end, and some do not
    flags = flags_of(
        toy,
        model=double / "model",
        ref=double / "ref",
        critic=double / "rm",
        dtype="fp64",
        max_steps=1,
        gamma=gamma,
        shuffle=False,
        lam=lam,
        kl_estimator=kind,
        entropy_weight=entropy_weight,
        clip_value=clip_value,
        kl=0.3,
        minibatches=minibatches,
        ppo_epochs=epochs,
        no_eos_penalty=0.2,
        clip_ratio=0.02,
        warmup=0.0,
        schedule="constant",
        mask_cut=mask_cut,
        **more,
    )
    (row,) = train(train_ppo, tmp_path / "out", **flags)

    config = train_ppo.Config(
        group_size=2, max_new_tokens=8, reward=WORDS, no_eos_penalty=0.2, **more
    )
    samples = drawn(toy, double / "model", config)
    rewards = samples.rewards.tolist()
    assert row["reward"] == pytest.approx(np.mean(rewards))
    assert len(set(rewards)) > 1
    pairs = [(samples.prompts.ids[i // 2], s.tokens) for i, s in enumerate(samples.samples)]
    scored = scored_places(samples, unscored)
    counted = samples.ended if mask_cut else np.ones(len(pairs), bool)
    assert not mask_cut or 0 < samples.ended.sum() < len(pairs)

    actor = PlainModel(double / "model", torch.float64)
    ref = PlainModel(double / "ref", torch.float64)
    critic = PlainCritic(double / "rm")
    with torch.no_grad():
        old_logps = [actor.logps(*pair)[own] for pair, own in zip(pairs, scored)]
        ref_logps = [ref.logps(*pair)[own] for pair, own in zip(pairs, scored)]
        old_values = [critic.values(*pair)[own] for pair, own in zip(pairs, scored)]

    def kl(x: torch.Tensor) -> torch.Tensor:
        return {"k1": x, "k2": x**2 / 2, "k3": torch.exp(-x) - 1 + x, "abs": x.abs()}[kind]

    advantages, returns = [], []
    for reward, old, against, values in zip(rewards, old_logps, ref_logps, old_values):
        token_rewards = (-0.3 * kl(old - against)).tolist()
        token_rewards[-1] += reward
        advantages.append(plain_gae(token_rewards, values.tolist(), gamma, lam))
        returns.append(torch.tensor(advantages[-1], dtype=torch.float64) + values)
    flat = sum((a for a, counts in zip(advantages, counted) if counts), [])
    mean = statistics.fmean(flat)
    deviation = (statistics.variance(flat) + 1e-8) ** 0.5
    whitened = [(torch.tensor(a, dtype=torch.float64) - mean) / deviation for a in advantages]

    actor_trainer = PlainTrainer(actor, 1, 1e-2)
    critic_trainer = PlainTrainer(critic, 1, 2e-2)
    loss_sum = value_loss_sum = 0.0
    norms, value_norms = [], []
    n_tokens = n_clipped = n_value_clipped = 0
    for update in updates.plan(samples, epochs, minibatches, 0, config, Mesh()):
        loss = value_loss = 0.0
        tokens = 0
        for i in [2 * p + k for p in update.prompts for k in range(2)]:
            prompt, response = pairs[i]
            own = scored[i]
            logits = actor.logits(torch.tensor(prompt + response))[len(prompt) - 1 : -1]
            logp = logits.log_softmax(-1)[own]  # (scored tokens, vocabulary)
            new_logps = logp[range(len(own)), [response[t] for t in own]]
            rho, a = (new_logps - old_logps[i]).exp(), whitened[i]
            surrogate = torch.maximum(-a * rho, -a * rho.clamp(0.98, 1.02)).sum()
            loss = loss + counted[i] * surrogate
            loss = loss + counted[i] * entropy_weight * (logp.exp() * logp).sum()
            n_clipped += ((rho > 1.02) & (a > 0) | (rho < 0.98) & (a < 0)).sum().item()
            values = critic.values(prompt, response)[own]
            error = (values - returns[i]) ** 2
            if clip_value:
                low, high = old_values[i] - clip_value, old_values[i] + clip_value
                near = torch.minimum(torch.maximum(values, low), high)
                near_error = (near - returns[i]) ** 2
                moved = (near - values).abs() > 1e-12
                n_value_clipped += (moved & (near_error > error)).sum().item()
                error = torch.maximum(error, near_error)
            value_loss = value_loss + counted[i] * 0.5 * error.sum()
            tokens += counted[i] * len(own)
            n_tokens += len(own)
        actor_trainer.done = critic_trainer.done = 0
        mean_loss, norm = actor_trainer.step(loss / tokens)
        mean_value_loss, value_norm = critic_trainer.step(value_loss / tokens)
        loss_sum += mean_loss * tokens
        value_loss_sum += mean_value_loss * tokens
        norms.append(norm)
        value_norms.append(value_norm)
    assert len(norms) == minibatches * epochs
    unexplained = (torch.cat(returns) - torch.cat(old_values)).numpy().var()
    wanted = {
        "loss": loss_sum / n_tokens,
        "value/loss": value_loss_sum / n_tokens,
        "grad_norm": np.mean(norms),
        "value/grad_norm": np.mean(value_norms),
        "clip_fraction": n_clipped / n_tokens,
        "value/clip_fraction": n_value_clipped / n_tokens,
        "kl": sum((a - b).sum().item() for a, b in zip(old_logps, ref_logps)) / 12,
        "value/explained_variance": 1 - unexplained / torch.cat(returns).numpy().var(),
        "completions/mean_length": np.mean([len(response) for _, response in pairs]),
    }
    for name, value in wanted.items():
        assert row[name] == pytest.approx(value, abs=1e-10), name
    assert abs(row["kl"]) > 0.01
    assert abs(row["value/mean"]) > 0.01
    assert epochs == 1 or row["clip_fraction"] > 0.05
    assert 0 <= row["sampler_gap"] < 1e-9
    assert largest_gap(weights(tmp_path / "out"), actor.weights) < 1e-10
    critic.weights["score.weight"] = critic.weights.pop("lm_head.weight")
    assert largest_gap(weights(tmp_path / "out", "critic"), critic.weights) < 1e-10


# ---- whatever the layout ---------------------------------------------------------------------


def one_rank(words: list[str]) -> list[np.ndarray]:
    """Run the script; return the advantages of each step, (M,), as this rank has them."""
    steps = []
    add_advantages = train_ppo.add_advantages

    def spy(samples, *rest):
        row = add_advantages(samples, *rest)
        steps.append(samples.data.token_columns["advantage"][samples.data.scored == 1])
        return row

    train_ppo.add_advantages = spy  # in a process of its own
    train_ppo.main(words)
    return steps


def test_ranks_change_nothing(toy: Path, double: Path, tmp_path: Path, train):
    """Two ranks of any kind (dp, tp, cp, pp) do what one does: two steps in float64.

    Advantages, metrics and the weights of both models agree within 1e-10; samples are the same.
    """
    flags = flags_of(
        toy,
        model=double / "model",
        reward=double / "rm",
        dtype="fp64",
        minibatches=2,
        max_steps=2,
        kl_target=0.5,
        batch_size=5,
        entropy_weight=0.01,
        max_tokens=300,
        eval_data=toy / "world" / "prompts_test.jsonl",
        log_samples=1,
        samples=0,
    )
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    (wanted,) = launch(1, one_rank, ["--out", str(tmp_path / "one"), *words])
    wanted_rows = read_metrics(tmp_path / "one")
    wanted_samples = read_samples(tmp_path / "one")
    for name in ("dp", "tp", "cp", "pp"):
        layout = [] if name == "dp" else [f"--{name}", "2"]
        for steps in launch(2, one_rank, ["--out", str(tmp_path / name), *layout, *words]):
            for advantages, like in zip(steps, wanted, strict=True):
                assert np.abs(advantages - like).max() < 1e-10
                assert advantages.std() > 0.5
        for row, like in zip(read_metrics(tmp_path / name), wanted_rows, strict=True):
            assert row.keys() == like.keys()
            for key in row:
                assert row[key] == pytest.approx(like[key], abs=1e-10), f"{name}: {key}"
        for part in ("final", "critic"):
            mine, one = weights(tmp_path / name, part), weights(tmp_path / "one", part)
            assert largest_gap(mine, one) < 1e-10
        for row, like in zip(read_samples(tmp_path / name), wanted_samples, strict=True):
            assert row["response"] == like["response"]
            assert row["reward"] == pytest.approx(like["reward"], abs=1e-10)


def test_micro_batches_and_shared_prompts_change_nothing(
    toy: Path, double: Path, tmp_path: Path, train
):
    """Three steps of four updates in float64, cut otherwise: metrics and weights within 1e-10."""
    flags = flags_of(toy, model=double / "model", critic=double / "rm", dtype="fp64", minibatches=2)
    wanted = train(train_ppo, tmp_path / "a", **flags)
    for name, more in (
        ("b", {"max_tokens": 60, "rollout_batch": 5}),
        ("c", {"share_prompts": False}),
    ):
        rows = train(train_ppo, tmp_path / name, **flags, **more)
        for row, like in zip(rows, wanted, strict=True):
            for key in row.keys() - {"tokens"}:
                assert row[key] == pytest.approx(like[key], abs=1e-10), key
        for part in ("final", "critic"):
            mine, one = weights(tmp_path / name, part), weights(tmp_path / "a", part)
            assert largest_gap(mine, one) < 1e-10


def test_the_first_ratio_is_one(toy: Path, tmp_path: Path, train, monkeypatch):
    """The first update of a rollout has ratios of exactly 1, in fp32; later updates do not.

    With one update per rollout nothing is ever clipped.
    """
    plans, scored = [], []
    plan_of, token_logps = updates.plan, updates.token_logps

    def spy_updates(*args):
        plans.append(plan_of(*args))
        return plans[-1]

    def spy_logps(*args):
        scored.append(args[2])
        return token_logps(*args)

    monkeypatch.setattr(updates, "plan", spy_updates)
    monkeypatch.setattr(updates, "token_logps", spy_logps)
    rows = train(train_ppo, tmp_path / "once", **flags_of(toy, ppo_epochs=1, max_tokens=60))
    # Large matrices give the same bits only in the same micro-batch, so the cuts must be the same.
    assert scored == [plan[0].bins for plan in plans for _ in ("policy", "reference")]
    assert len(scored[0]) > 1
    assert [row["ratio"] for row in rows] == [1.0] * 3
    assert [row["clip_fraction"] for row in rows] == [0.0] * 3
    assert rows[-1]["kl"] != 0
    assert all(row["grad_norm"] > 0 and 0 < row["sampler_gap"] < 1e-5 for row in rows)

    distances = []
    surrogate = losses.clipped_surrogate

    def spy_surrogate(ratio, *rest):
        distances.append((ratio - 1).abs().max().item())
        return surrogate(ratio, *rest)

    monkeypatch.setattr(losses, "clipped_surrogate", spy_surrogate)
    rows = train(train_ppo, tmp_path / "often", **flags_of(toy, minibatches=2, max_steps=2))
    assert len(distances) == 8
    assert distances[0] == distances[4] == 0.0
    assert min(distances[1:4] + distances[5:]) > 1e-4
    assert all(0 < row["clip_fraction"] < 1 for row in rows)


# ---- resume, warm-up, β ----------------------------------------------------------------------


def test_resumed_equals_uninterrupted_bit_for_bit(toy: Path, tmp_path: Path, train):
    """Samples, metrics, both models and β; the reference of a resumed run is that of step 0."""
    flags = flags_of(
        toy,
        max_steps=6,
        minibatches=2,
        eval_data=toy / "world" / "prompts_test.jsonl",
        eval_every=3,
        log_samples=2,
        kl_target=1.0,
        critic_warmup=1,
    )
    whole = train(train_ppo, tmp_path / "whole", **flags)
    part = train(train_ppo, tmp_path / "part", **flags, save_every=1, keep=9)
    assert part == whole
    for step in (6, 5, 4):  # as if killed after step 4, having logged two steps more than it saved
        checkpoint.all_steps(tmp_path / "part")[0].rename(tmp_path / f"gone{step}")
    (tmp_path / "part" / "finished.json").unlink()
    assert train(train_ppo, tmp_path / "part", **flags, resume="auto") == whole
    assert read_samples(tmp_path / "part") == read_samples(tmp_path / "whole")
    for name in ("final", "critic"):
        a, b = weights(tmp_path / "whole", name), weights(tmp_path / "part", name)
        assert largest_gap(a, b) == 0.0
    betas = [row["beta"] for row in whole if "beta" in row]
    state = json.loads((tmp_path / "gone4" / "state.json").read_text())
    assert state["extra"]["beta"] == betas[4] != betas[3]
    assert whole[0]["step"] == 0
    assert "eval/reward" in whole[0]


def test_beta_follows_the_target(toy: Path, tmp_path: Path, train, monkeypatch):
    """β is multiplied by 1 + K clip(KL / target - 1, ±0.2), except while only the critic learns.

    And β is what a nat costs.
    """
    paid = []
    token_rewards = losses.token_rewards

    def spy(*args):
        paid.append(args[3])
        return token_rewards(*args)

    monkeypatch.setattr(losses, "token_rewards", spy)
    flags = flags_of(toy, max_steps=5, kl_target=2.0, kl_gain=0.5, critic_warmup=1)
    rows = train(train_ppo, tmp_path / "out", **flags)
    betas = [row["beta"] for row in rows]
    kls = [row["kl"] for row in rows]
    assert paid == betas
    assert betas[0] == betas[1] == 0.1
    assert kls[0] == kls[1] == 0
    errors = [max(-0.2, min(0.2, kl / 2 - 1)) for kl in kls[1:4]]
    wanted = [beta * (1 + 0.5 * error) for beta, error in zip(betas[1:4], errors)]
    assert betas[2:] == pytest.approx(wanted, rel=1e-12)
    assert errors[0] < 0 < errors[-1]  # from far below the target to above it
    assert kls[2] != 0


def test_the_critic_warms_up_alone(toy: Path, tmp_path: Path, train):
    """During --critic-warmup the policy keeps every bit, while values approach the returns."""
    flags = flags_of(
        toy, max_steps=8, critic_warmup=8, ppo_epochs=4, critic_lr=3e-3, batch_size=7, warmup=0.0
    )
    rows = train(train_ppo, tmp_path / "out", **flags)
    assert largest_gap(weights(tmp_path / "out"), weights(toy, "model")) == 0.0
    assert rows[0]["value/mean"] == 0.0
    assert rows[0]["value/explained_variance"] == pytest.approx(0.0, abs=1e-9)
    mean_reward = np.mean([row["reward"] for row in rows])
    assert rows[-1]["value/mean"] == pytest.approx(mean_reward, abs=0.15)
    assert not any("loss" in row or "ratio" in row for row in rows)
    assert all(row["kl"] == 0 for row in rows)


def test_the_critic_starts_from_the_reward_model(toy: Path, double: Path, tmp_path: Path, train):
    """A new head outputs 0; the head of a reward model, of --critic or of OUT/critic does not."""
    for name, more, new in (
        ("plain", {}, True),
        ("reward", {"reward": double / "rm"}, False),
        ("named", {"critic": double / "rm"}, False),
        ("again", {"critic": tmp_path / "plain" / "critic"}, False),
        ("language", {"reward": double / "rm", "critic": toy / "model"}, True),
    ):
        (row,) = train(train_ppo, tmp_path / name, **flags_of(toy, max_steps=1, **more))
        assert (row["value/mean"] == 0.0) == new, name


# ---- learning, and bad settings --------------------------------------------------------------


def test_a_reward_is_learned(toy: Path, tmp_path: Path, train):
    """From random weights: responses with an e at a word's end become the rule in a few steps."""
    flags = flags_of(
        toy,
        max_steps=15,
        batch_size=8,
        group_size=4,
        epochs=2,
        kl=0.0,
        reward="regex:e ",
        lr=2e-2,
        critic_lr=1e-3,
        weight_decay=0.0,
        warmup=0.1,
        minibatches=2,
        clip_value=0.0,
        log_samples=0,
    )
    rows = train(train_ppo, tmp_path / "out", **flags)
    first, last = (np.mean([row["reward"] for row in part]) for part in (rows[:3], rows[-3:]))
    assert last > first + 0.3
    assert "kl" not in rows[0]
    assert not (tmp_path / "out" / "samples.jsonl").exists()


def test_a_critic_with_another_tokenizer_is_refused(
    toy: Path, real_model: Path, tmp_path: Path, train
):
    """It would read other words."""
    with pytest.raises(ValueError, match="has another tokenizer than the policy"):
        train(train_ppo, tmp_path / "out", **flags_of(toy, critic=real_model))


def test_impossible_settings_are_refused(toy: Path, tmp_path: Path, train):
    """One line that names the flag, before any model is loaded."""
    for more, words in (
        ({"kl": 0, "kl_target": 3}, "--kl-target adapts β"),
        ({"rollout_reload": "true"}, "--rollout-reload is for --rollout-url"),
        ({"reward": ""}, "--reward .missing. is no folder"),
        ({"max_tokens": 20}, "more than a micro-batch of 20: raise --max-tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            train(train_ppo, tmp_path / words, **flags_of(toy, **more))
