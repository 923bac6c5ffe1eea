"""REINFORCE: its step is a plain loop's, does not depend on how it is cut, resumes bit for bit; it learns what pays."""

import json
import math
import multiprocessing
import os
import socket
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL, read_metrics
from plain import PlainModel, PlainTrainer
from safetensors.torch import load_file

import checkpoint
import losses
import train_reinforce
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
        "model": toy / "model", "data": toy / "world" / "sft.jsonl", "batch_size": 6, "group_size": 4, "lr": 1e-2,
        "max_new_tokens": 8, "max_steps": 3, "reward": WORDS, "kl": 0.1, "warmup": 0.25, "weight_decay": 0.1, **more,
    }  # fmt: skip


def weights(out: Path) -> dict:
    files = sorted((out / "final").glob("*.safetensors"))  # a file a pipeline stage
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


# ---- the same as a plain loop ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def double(toy: Path, tmp_path_factory) -> Path:
    """The toy model in float64."""
    folder = tmp_path_factory.mktemp("double") / "model"
    save_model(load_model(toy / "model", torch.float64), folder, toy / "model")
    return folder


def drawn(toy: Path, double: Path, config) -> rollout.Rollout:
    """The samples of step 1, drawn apart from any script."""
    template = Template("auto", load_tokenizer(double))
    prompts = load_prompts(
        [toy / "world" / "sft.jsonl"], template, 1000, log=lambda line: None
    ).take(range(6))
    sample = rollout.local(load_model(double, torch.float64), template, config)
    reward = load_reward(config.reward, template)
    own = rollout.seeds(0, 1, 6, config.group_size)
    return rollout.collect(prompts, sample, reward, template, config, Mesh(), own, 1.0)


def plain_advantages(
    name: str, rewards: list[float], kl: list[list[float]], group: int, beta: float
) -> list[list]:
    """Per token, a list a response."""
    mean = statistics.fmean
    if name == "reinforce++":
        to_go = [[r - beta * sum(k[t:]) for t in range(len(k))] for r, k in zip(rewards, kl)]
        flat = sum(to_go, [])
        return [
            [(x - mean(flat)) / math.sqrt(statistics.variance(flat) + 1e-8) for x in part]
            for part in to_go
        ]
    found = []
    for i, k in enumerate(kl):
        start = i // group * group
        own = [rewards[j] - beta * sum(kl[j]) for j in range(start, start + group)]
        x, at = own[i - start], i - start
        match name:
            case "rloo":
                a = x - mean(own[:at] + own[at + 1 :])
            case "grpo":
                a = (x - mean(own)) / (statistics.stdev(own) + 1e-4)
            case "dr_grpo":
                a = x - mean(own)
        found.append([a] * len(k))
    return found


CASES = [  # advantage, loss, where the KL is, its estimator, aggregate, minibatches, epochs
    ("rloo", "grpo", "reward", "k1", "token", 1, 1),
    ("grpo", "grpo", "loss", "k3", "sequence", 2, 2),
    ("dr_grpo", "dapo", "loss", "k2", "constant", 1, 3),
    ("reinforce++", "cispo", "reward", "k3", "token", 3, 1),
    ("rloo", "gspo", "reward", "abs", "sequence", 1, 2),
    ("rloo", "reinforce", "loss", "k3", "token", 1, 1),
]


@pytest.mark.parametrize("advantage, loss, kl_in, kind, aggregate, minibatches, epochs", CASES)
def test_a_step_equals_a_plain_loop_in_float64(
    advantage,
    loss,
    kl_in,
    kind,
    aggregate,
    minibatches,
    epochs,
    toy: Path,
    double: Path,
    tmp_path: Path,
    train,
):
    """Loss, gradient norm and every weight after a step's updates within 1e-10: responses one by one, no trees."""
    flags = flags_of(
        toy, model=double, ref=toy / "model", dtype="fp64", max_steps=1, shuffle=False, advantage=advantage, loss=loss,
        kl_in=kl_in, kl_estimator=kind, aggregate=aggregate, minibatches=minibatches, rollout_epochs=epochs, kl=0.3,
        no_eos_penalty=0.2, clip_low=0.02, clip_high=0.03, warmup=0.0, schedule="constant",
    )  # fmt: skip
    other = load_model(toy / "model", torch.float64)  # a reference that is not the policy
    with torch.no_grad():
        other.head.weight.mul_(0.7)
    save_model(other, tmp_path / "ref", toy / "model")
    flags["ref"] = tmp_path / "ref"
    (row,) = train(train_reinforce, tmp_path / "out", **flags)

    config = train_reinforce.Config(
        **{k: v for k, v in flags.items() if k in ("group_size", "max_new_tokens", "reward")}
    )
    config.no_eos_penalty, config.minibatches, config.rollout_epochs = 0.2, minibatches, epochs
    found = drawn(toy, double, config)
    assert row["reward"] == pytest.approx(found.rewards.mean()) and len(set(found.rewards)) > 1
    policy, ref = PlainModel(double, torch.float64), PlainModel(tmp_path / "ref", torch.float64)
    trainer = PlainTrainer(policy, total=1, lr=1e-2)
    pairs = [(found.prompts.ids[i // 4], s.tokens) for i, s in enumerate(found.samples)]
    with torch.no_grad():
        old = [policy.logps(*pair) for pair in pairs]
        against = [ref.logps(*pair) for pair in pairs]

    def kl(x: torch.Tensor) -> torch.Tensor:
        return {"k1": x, "k2": x**2 / 2, "k3": torch.exp(-x) - 1 + x, "abs": x.abs()}[kind]

    penalty = [kl(a - b).tolist() for a, b in zip(old, against)]
    beta = 0.3 if kl_in == "reward" else 0.0
    worth = plain_advantages(advantage, found.rewards.tolist(), penalty, 4, beta)
    seen, norms = [], []
    for part, _ in train_reinforce.updates(found, 0, config, Mesh()):
        rows = [4 * i + k for i in part for k in range(4)]
        tokens, total = sum(len(pairs[i][1]) for i in rows), 0.0
        for i in rows:
            new, a = policy.logps(*pairs[i]), torch.tensor(worth[i], dtype=torch.float64)
            rho = (new - old[i]).exp()
            if loss == "gspo":
                rho = (new - old[i]).mean().exp().expand(len(new))
            terms = -torch.minimum(rho * a, rho.clamp(0.98, 1.03) * a)
            if loss == "cispo":
                terms = -rho.detach().clamp(max=1.03) * a * new
            if loss == "reinforce":
                terms = -a * new
            if kl_in == "loss":
                terms = terms + 0.3 * kl(new - against[i])
            share = {
                "token": 1 / tokens,
                "sequence": 1 / (len(rows) * len(new)),
                "constant": 1 / (len(rows) * 8),
            }
            total = total + terms.sum() * share[aggregate]
        trainer.done = 0
        value, norm = trainer.step(total)
        seen.append(value)
        norms.append(norm)
    assert len(seen) == minibatches * epochs
    assert row["loss"] == pytest.approx(statistics.fmean(seen), abs=1e-10)
    assert row["grad_norm"] == pytest.approx(statistics.fmean(norms), abs=1e-10)
    gap = sum((a - b).sum().item() for a, b in zip(old, against)) / len(pairs)
    assert row["kl"] == pytest.approx(gap, abs=1e-9) and abs(gap) > 0.01
    mine = weights(tmp_path / "out")
    assert max((mine[name] - w.detach()).abs().max() for name, w in policy.weights.items()) < 1e-10


# ---- whatever the layout ---------------------------------------------------------------------------------------------


def test_micro_batches_and_shared_prompts_change_nothing(
    toy: Path, double: Path, tmp_path: Path, train
):
    """Three steps of two updates in float64, cut in other ways: metrics and weights agree within 1e-10."""
    flags = flags_of(
        toy,
        model=double,
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
        got = train(train_reinforce, tmp_path / name, **flags, **more)
        for row, like in zip(got, wanted, strict=True):
            assert row.keys() == like.keys()
            for key in row.keys() - {"tokens"}:
                assert row[key] == pytest.approx(like[key], abs=1e-10), key
        a, b = weights(tmp_path / "a"), weights(tmp_path / name)
        assert max((a[k] - b[k]).abs().max() for k in a) < 1e-10


@pytest.mark.parametrize("loss", losses.POLICY_LOSSES)
def test_the_first_ratio_is_one(loss: str, toy: Path, tmp_path: Path, train):
    """Bit for bit where there is one update a rollout, in every step; the policy moves all the same."""
    rows = train(train_reinforce, tmp_path / "out", **flags_of(toy, loss=loss))
    assert [row["ratio"] for row in rows] == [1.0] * 3 and [
        row["clip_fraction"] for row in rows
    ] == [0.0] * 3
    assert (
        rows[-1]["kl"] != 0
        and rows[0]["kl_k3"] < 1e-6
        and all(row["grad_norm"] > 0 for row in rows)
    )


def test_the_first_of_several_updates_has_ratio_one(toy: Path, tmp_path: Path, train, monkeypatch):
    """Recomputed by the path of training: exactly 1 in the first update of a rollout, not in those that follow."""
    seen = []

    def spy(*args, **more):
        found = losses_policy_gradient(*args, **more)
        seen.append((found[1]["ratio"] - 1).abs().max().item())
        return found

    losses_policy_gradient, token_logps, updates = (
        losses.policy_gradient,
        rollout.token_logps,
        train_reinforce.updates,
    )
    monkeypatch.setattr(losses, "policy_gradient", spy)
    old, plans = (
        [],
        [],
    )  # micro-batches of the old log-probs (and the reference's), and of the updates
    monkeypatch.setattr(
        rollout, "token_logps", lambda *args: old.append(args[2]) or token_logps(*args)
    )
    monkeypatch.setattr(
        train_reinforce, "updates", lambda *args: plans.append(updates(*args)) or plans[-1]
    )
    flags = flags_of(toy, minibatches=2, rollout_epochs=2, max_steps=2, max_tokens=110)
    rows = train(train_reinforce, tmp_path / "out", **flags)
    for bins, plan in zip(old, [plan for plan in plans for _ in range(2)], strict=True):
        assert (
            bins == plan[0][1] + plan[1][1] and len(plan) == 4
        )  # the very bits that the first pass will see
    counts = [len(bins) for plan in plans for _, bins in plan]
    assert len(counts) == 8 and sum(counts) == len(seen)
    worst = [max(seen[sum(counts[:i]) : sum(counts[: i + 1])]) for i in range(8)]  # of each update
    assert worst[0] == worst[4] == 0.0 and min(worst[1:4] + worst[5:]) > 1e-4
    assert all(0 < row["clip_fraction"] < 1 and 0 < row["sampler_gap"] < 1e-5 for row in rows)


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [1, 2])
def test_resumed_is_never_stopped_bit_for_bit(several: int, toy: Path, tmp_path: Path, train):
    """Samples, metrics and weights; the reference of a resumed run is that of step 0, not the half-trained policy."""
    heldout = toy / "world" / "prompts_test.jsonl"
    flags = flags_of(
        toy, max_steps=6, minibatches=several, eval_data=heldout, eval_every=3, log_samples=2
    )
    whole = train(train_reinforce, tmp_path / "whole", **flags)
    part = train(train_reinforce, tmp_path / "part", **flags, save_every=1, keep=9)
    assert part == whole
    for step in (6, 5, 4):  # as if killed after step 4, having written two more than it saved
        (checkpoint.all_steps(tmp_path / "part")[0]).rename(tmp_path / f"gone{step}")
    assert train(train_reinforce, tmp_path / "part", **flags, resume="auto") == whole
    assert (tmp_path / "part" / "samples.jsonl").read_text() == (
        tmp_path / "whole" / "samples.jsonl"
    ).read_text()
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "part")
    assert all(torch.equal(a[name], b[name]) for name in a)
    rows = [
        json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [s for s in (1, 2, 4, 6) for _ in range(16)]
    assert rows[0].keys() == {"step", "prompt", "response", "reward", "ended"}
    assert whole[0]["step"] == 0 and whole[0].keys() == {
        "step", "eval/reward", "eval/reward_std", "eval/completions/mean_length", "eval/completions/ended"
    }  # fmt: skip
    best = max(
        (row for row in whole if row["step"] and "eval/reward" in row),
        key=lambda row: row["eval/reward"],
    )
    assert json.loads((tmp_path / "gone6" / "state.json").read_text())["best"] in (
        None,
        -best["eval/reward"],
    )


# ---- what it is for --------------------------------------------------------------------------------------------------


def test_what_pays_is_learned(toy: Path, tmp_path: Path, train):
    """From random weights: answers with an e at a word's end become the rule within a few steps."""
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
    assert first < 0.6 and last > 0.9 and "kl" not in rows[0]


def test_gsm8k_with_the_exact_answer_runs_and_resumes(real_model: Path, tmp_path: Path, train):
    """Twenty steps on real rows; a tiny model earns nothing and breaks nothing; resumed once."""
    data = REAL / "gsm8k" / "sft_train.jsonl"
    if not data.exists():
        pytest.skip("shared/data is absent")
    flags = {
        "model": real_model, "data": data, "reward": "exact:A:", "advantage": "grpo", "group_size": 3, "batch_size": 2,
        "max_new_tokens": 12, "max_steps": 20, "lr": 1e-3, "kl_in": "loss", "kl_estimator": "k3", "minibatches": 2,
    }  # fmt: skip
    first = train(train_reinforce, tmp_path / "out", **flags, max_minutes=1e-6)
    assert len(first) == 1 and checkpoint.newest(tmp_path / "out").name == "step_1"
    rows = train(train_reinforce, tmp_path / "out", **flags, resume="auto")
    assert [row["step"] for row in rows] == list(range(1, 21)) and rows[0] == first[0]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert (tmp_path / "out" / "final" / "model.safetensors").exists()


def test_settings_that_cannot_be_are_refused(toy: Path, tmp_path: Path, train):
    """One line that names the flag, before anything is loaded."""
    for more, words in (
        ({"group_size": 1}, "--group-size 2 or more"),
        ({"kl_in": "loss"}, "take k3 or k2"),
        ({"loss": "reinforce", "minibatches": 2}, "one update a rollout"),
        ({"minibatches": 0}, "must be at least 1"),
        ({"temperature": 0}, "--temperature above 0"),
        ({"reward": ""}, "--reward .missing. is no folder"),
        ({"max_tokens": 40}, "more than a micro-batch of 40: raise --max-tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            train(train_reinforce, tmp_path / words, **flags_of(toy, **more))


# ---- on several ranks ------------------------------------------------------------------------------------------------


def one_rank(rank: int, world: int, port: int, words: list[str]) -> None:
    """What torchrun would start."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    train_reinforce.main(words)
    sys.stdout.flush()
    os._exit(0)


def on_ranks(world: int, out: Path, **flags) -> list[dict]:
    """Rows of a run on several forked processes."""
    warm = torch.nn.Linear(2, 2)  # AdamW starts threads that a fork would lose
    warm(torch.ones(1, 2)).sum().backward()
    torch.optim.AdamW(warm.parameters()).step()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        "--out",
        str(out),
        *(word for name, value in flags.items() for word in (f"--{name}", str(value))),
    ]
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=one_rank, args=(rank, world, port, words)) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0, "a rank failed"
    return read_metrics(out)


@pytest.fixture(scope="module")
def judge_folder(double: Path, tmp_path_factory) -> Path:
    """A reward model of random weights in float64."""
    folder = tmp_path_factory.mktemp("judge") / "rm"
    model = load_model(double, torch.float64, scores=("reward",))
    with torch.no_grad():
        model.score_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    save_model(model, folder, double)
    return folder


@pytest.mark.parametrize(
    "layout", [{}, {"tp": 2}, {"cp": 2}, {"pp": 2}], ids=lambda layout: next(iter(layout), "dp")
)
def test_two_ranks_do_what_one_does(
    layout: dict, toy: Path, double: Path, judge_folder: Path, tmp_path: Path, train
):
    """Samples of their own, a sharded reward model, two updates a rollout: metrics and weights agree within 1e-9."""
    flags = flags_of(
        toy, model=double, dtype="fp64", minibatches=2, reward=judge_folder, max_steps=2, batch_size=5,
        no_eos_penalty=0.3, kl_in="loss", kl_estimator="k3", eval_data=toy / "world" / "prompts_test.jsonl",
    )  # fmt: skip
    wanted = train(train_reinforce, tmp_path / "one", **flags)
    got = on_ranks(2, tmp_path / "two", **flags, **layout)
    for row, like in zip(got, wanted, strict=True):
        assert row.keys() == like.keys()
        for key in row:
            assert row[key] == pytest.approx(like[key], abs=1e-9), key
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max() for k in a) < 1e-9
    texts = [
        (tmp_path / name / "samples.jsonl").read_text().splitlines() for name in ("one", "two")
    ]
    one, two = ([json.loads(line)["response"] for line in lines] for lines in texts)
    assert one == two and len(one) == 16
