"""Online DPO, iterated DPO and SPIN: a step equals a plain loop; any layout; resumes; null test."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_metrics
from launch import launch, weights_in
from nulls import CONSTANT, moved, words_of
from online import WORDS, read_samples
from plain import PlainModel, PlainTrainer

import train_online_dpo
from data.dataset import load_prompts
from data.templates import Template
from data.tokenizer import load_tokenizer
from sampling import source
from weights.folder import load_model, save_model


@pytest.fixture(scope="module")
def double(toy: Path, tmp_path_factory) -> Path:
    """Return the toy model in float64, and a reference that differs from it."""
    folder = tmp_path_factory.mktemp("online_dpo")
    model = load_model(toy / "model", torch.float64)
    save_model(model, folder / "model", toy / "model")
    with torch.no_grad():
        model.head.weight.mul_(0.7)
    save_model(model, folder / "ref", toy / "model")
    return folder


def flags_of(toy: Path, double: Path, **more) -> dict:
    """Return the flags of a short run in float64, and others in their place."""
    return {
        "model": double / "model",
        "data": toy / "world" / "sft.jsonl",
        "dtype": "fp64",
        "batch_size": 6,
        "group_size": 4,
        "lr": 1e-2,
        "max_new_tokens": 8,
        "max_steps": 4,
        "reward": WORDS,
        "warmup": 0.25,
        "weight_decay": 0.1,
        **more,
    }


SPIN = {"chosen": "data", "ref_samples": 2, "group_size": 2}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"ref_samples": 1, "group_size": 3, "sft_weight": 0.4},
        {**SPIN, "beta": 0.7},
        {"loss": "ipo", "average_logps": True},
    ],
    ids=["online", "mixture", "spin", "ipo"],
)
def test_a_step_equals_a_plain_loop_in_float64(
    more: dict, toy: Path, double: Path, tmp_path: Path, train
):
    """Loss, gradient norm and weights within 1e-10 of responses that are run one by one.

    Samples are drawn one at a time with the seeds of (seed, step, prompt, sample). Pairs of equal
    rewards do not count.
    """
    flags = flags_of(toy, double, ref=double / "ref", max_steps=1, shuffle=False, **more)
    flags |= {"warmup": 0.0, "schedule": "constant"}
    (row,) = train(train_online_dpo, tmp_path / "out", **flags)

    group, beta = flags["group_size"], flags.get("beta", 0.1)
    folders = [double / "model", double / "ref"]
    template = Template("auto", load_tokenizer(folders[0]))
    prompts = load_prompts([flags["data"]], template, 1000, log=lambda line: None).take(range(6))
    samplers = [
        source.local_sampler(
            load_model(folder, torch.float64), template, train_online_dpo.Config(max_new_tokens=8)
        )
        for folder in folders
    ]
    pairs, tied = [], 0
    for i, (ids, data_row) in enumerate(zip(prompts.ids, prompts.rows)):
        drawn = []
        for k in range(group):
            seed = np.random.SeedSequence([0, 1, i, k]).generate_state(1, np.uint64)[0] >> 1
            from_ref = k >= group - flags.get("ref_samples", 0)
            drawn += samplers[from_ref]([ids], [int(seed)], 1, 1.0)
        if flags.get("chosen") == "data":
            answer = template.pair(data_row["prompt"], [data_row["response"]])[1][0][0]
            pairs += [(ids, answer, one.tokens) for one in drawn]
            continue
        texts = [template.tokenizer.decode(one.tokens) for one in drawn]
        words = re.compile("[aeiou] ")
        good = [bool(words.search(text)) for text in texts]
        if all(good) or not any(good):
            tied += 1
            continue
        best, worst = good.index(True), good.index(False)
        pairs.append((ids, drawn[best].tokens, drawn[worst].tokens))
    assert row["pairs"] == len(pairs) > 0
    if not more:
        assert tied == round(row["frac_reward_zero_std"] * 6) > 0

    policy, ref = (PlainModel(folder, torch.float64) for folder in folders)
    trainer = PlainTrainer(policy, total=1, lr=1e-2)
    total, chosen_tokens = 0.0, sum(len(chosen) for _, chosen, _ in pairs)
    for ids, chosen, rejected in pairs:
        ratios = []
        for answer in (chosen, rejected):
            logps = policy.logps(ids, answer).sum()
            with torch.no_grad():
                ratio = logps - ref.logps(ids, answer).sum()
            ratio = logps + (ratio - logps).detach()
            ratios.append(ratio / len(answer) if flags.get("average_logps") else ratio)
        x = ratios[0] - ratios[1]
        if flags.get("loss") == "ipo":
            total = total + (x - 1 / (2 * beta)) ** 2 / len(pairs)
        else:
            total = total + torch.log1p(torch.exp(-beta * x)) / len(pairs)
        nll = -policy.logps(ids, chosen).sum() / chosen_tokens
        total = total + flags.get("sft_weight", 0.0) * nll
    loss, norm = trainer.step(total)
    assert row["loss"] == pytest.approx(loss, abs=1e-10)
    assert row["grad_norm"] == pytest.approx(norm, abs=1e-10)
    after = weights_in(tmp_path / "out" / "final")
    assert max((after[n] - policy.weights[n]).abs().max().item() for n in after) < 1e-10


@pytest.fixture(scope="module")
def unbroken(toy: Path, double: Path, tmp_path_factory) -> Path:
    """Return a run of four steps in one process, which renews its reference after step 2."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    flags = flags_of(toy, double, ref_every=2)
    train_online_dpo.main(words_of(out, flags))
    return out


@pytest.mark.parametrize("layout", ["dp", "tp", "cp", "pp"])
def test_two_ranks_do_what_one_does(
    layout: str, toy: Path, double: Path, unbroken: Path, tmp_path: Path
):
    """Renewed reference and samples included: numbers and weights within 1e-9."""
    flags = flags_of(toy, double, ref_every=2)
    flags |= {layout: 2} if layout != "dp" else {"zero": 2}
    launch(2, train_online_dpo.main, words_of(tmp_path / "two", flags))
    for row, like in zip(read_metrics(tmp_path / "two"), read_metrics(unbroken), strict=True):
        assert row.keys() == like.keys()
        for key in row:
            assert row[key] == pytest.approx(like[key], abs=1e-9), key
    mine, one = weights_in(tmp_path / "two" / "final"), weights_in(unbroken / "final")
    assert max((mine[n] - one[n]).abs().max().item() for n in one) < 1e-9
    assert read_samples(tmp_path / "two") == read_samples(unbroken)


def test_micro_batches_change_nothing(toy: Path, double: Path, unbroken: Path, tmp_path: Path):
    """Smaller micro-batches and repeated prompts: metrics within 1e-10."""
    more = {"ref_every": 2, "max_tokens": 160, "rollout_batch": 5, "share_prompts": False}
    train_online_dpo.main(words_of(tmp_path / "cut", flags_of(toy, double, **more)))
    for row, like in zip(read_metrics(tmp_path / "cut"), read_metrics(unbroken), strict=True):
        for key in row.keys() - {"tokens"}:
            assert row[key] == pytest.approx(like[key], abs=1e-10), key


def test_a_renewed_reference_is_the_policy(unbroken: Path):
    """The step after a renewal starts at ln 2 with margins 0; the others do not."""
    rows = read_metrics(unbroken)
    margins = [row["rewards/margins"] for row in rows]
    assert margins[0] == margins[2] == 0 and margins[1] != 0 and margins[3] != 0
    for i in (0, 2):
        assert rows[i]["loss"] == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("more", [{}, SPIN], ids=["online", "spin"])
def test_a_resumed_run_is_the_unbroken_one(
    stop: int, more: dict, toy: Path, double: Path, tmp_path: Path, train
):
    """Resumed before, at and after a renewal, bit for bit, reference included."""
    flags = flags_of(toy, double, ref_every=2, save_every=1, keep=0, **more)
    whole = train(train_online_dpo, tmp_path / "whole", **flags)
    weights = weights_in(tmp_path / "whole" / "final")
    resume = tmp_path / "whole" / f"step_{stop}"
    train(train_online_dpo, tmp_path / "part", **{**flags, "resume": resume})
    assert read_metrics(tmp_path / "part") == whole[stop:]
    part = weights_in(tmp_path / "part" / "final")
    assert all(torch.equal(part[name], weights[name]) for name in weights)


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
def test_equal_rewards_teach_nothing(dtype: str, toy: Path, tmp_path: Path, train):
    """No pair: loss and gradient 0, and no weight moves a bit, weight decay or not."""
    flags = flags_of(toy, toy, dtype=dtype, reward=CONSTANT, max_steps=3)
    rows = train(train_online_dpo, tmp_path / "out", **flags)
    for row in rows:
        assert row["loss"] == row["grad_norm"] == row["pairs"] == 0
        assert row["frac_reward_zero_std"] == 1
    assert moved(tmp_path / "out", toy / "model") == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_first_step_is_ln_2_in_every_dtype(dtype: str, toy: Path, tmp_path: Path, train):
    """Policy and reference are run over the same flat rows: their log-ratios are exactly 0."""
    flags = flags_of(toy, toy, dtype=dtype, max_tokens=150, max_steps=1)
    (row,) = train(train_online_dpo, tmp_path / "out", **flags)
    assert row["rewards/margins"] == row["rewards/chosen"] == row["rewards/rejected"] == 0
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_it_learns(toy: Path, tmp_path: Path, train):
    """A reward that counts answers of three words rises."""
    flags = flags_of(toy, toy, dtype="fp32", reward="length:3", max_steps=12, batch_size=16)
    flags["epochs"] = 3
    flags |= {"eval_data": toy / "world" / "sft.jsonl", "eval_every": 6, "schedule": "constant"}
    rows = train(train_online_dpo, tmp_path / "out", **flags)
    rewards = [row["eval/reward"] for row in rows if "eval/reward" in row]
    assert rewards[-1] > rewards[0] + 0.05
    best = json.loads((tmp_path / "out" / "finished.json").read_text())
    assert best["steps"] == 12 and (tmp_path / "out" / "best").is_dir()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"group_size": 1}, "--group-size 2"),
        ({"chosen": "data", "loss": "rpo_sq"}, "--chosen best"),
        ({"ref_samples": 5}, "--ref-samples 5 is more than --group-size 4"),
        ({"ref_samples": 1, "pp": 2}, "--ref-samples is not supported with --pp"),
        ({"reward": ""}, "--reward is missing"),
        ({"chosen": "data", "max_tokens": 20}, "raise --max-tokens"),
    ],
)
def test_flags_that_cannot_work_are_refused(
    more: dict, message: str, toy: Path, tmp_path: Path, train
):
    """Before any step, with the fix."""
    with pytest.raises((ValueError, SystemExit), match=message):
        train(train_online_dpo, tmp_path / "out", **flags_of(toy, toy, dtype="fp32", **more))
