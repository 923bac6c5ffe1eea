"""Nash-MD: the mixture, a step against a plain loop, any layout, resumed runs, a null test."""

import json
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

import train_nash
from data.dataset import load_prompts
from data.templates import Template
from data.tokenizer import load_tokenizer
from sampling import source
from sampling.judge import load_judge
from weights.folder import load_model, save_model


@pytest.fixture(scope="module")
def double(toy: Path, tmp_path_factory) -> Path:
    """Return the toy model in float64, and a reference that differs from it."""
    folder = tmp_path_factory.mktemp("nash")
    model = load_model(toy / "model", torch.float64)
    save_model(model, folder / "model", toy / "model")
    with torch.no_grad():
        model.head.weight.mul_(0.7)
        model.embed.weight.mul_(1.3)
    save_model(model, folder / "ref", toy / "model")
    return folder


def flags_of(toy: Path, double: Path, **more) -> dict:
    """Return the flags of a short run in float64, and others in their place."""
    return {
        "model": double / "model",
        "ref": double / "ref",
        "data": toy / "world" / "sft.jsonl",
        "dtype": "fp64",
        "batch_size": 6,
        "lr": 1e-2,
        "max_new_tokens": 8,
        "max_steps": 4,
        "reward": WORDS,
        "warmup": 0.25,
        "weight_decay": 0.1,
        **more,
    }


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_mixture_is_the_geometric_one(share: float, double: Path):
    """Log-probs of drawn tokens are those of p^(1-a) q^a, computed from two plain models."""
    template = Template("auto", load_tokenizer(double / "model"))
    models = [load_model(double / name, torch.float64) for name in ("model", "ref")]
    config = train_nash.Config(max_new_tokens=10)
    draw = source.local_sampler(models[0], template, config, (models[1], share))
    ids = [template.prompt("Where does a duck sleep?"), template.prompt("a hen?" * 30)]
    drawn = draw(ids, [1, 2, 3, 4], 2, 0.8)
    plain = [PlainModel(double / name, torch.float64) for name in ("model", "ref")]
    for i, one in enumerate(drawn):
        text = [*ids[i // 2], *one.tokens]
        with torch.no_grad():
            p, q = (model.logits(torch.tensor(text))[len(ids[i // 2]) - 1 : -1] for model in plain)
        mixed = p.log_softmax(-1) * (1 - share) + q.log_softmax(-1) * share
        at = torch.tensor(one.tokens)[:, None]
        for logps, temperature in ((one.policy_logps, 1.0), (one.logps, 0.8)):
            wanted = (mixed / temperature).log_softmax(-1).gather(1, at)[:, 0]
            assert (torch.tensor(logps, dtype=torch.float64) - wanted).abs().max() < 1e-10


def plain_preferences(rewards: list[tuple[float, float]], scale: float) -> list[float]:
    return [1 / (1 + np.exp(-scale * (own - other))) for own, other in rewards]


def plain_sum(plain: PlainModel, ids: list[int], answer: list[int], temperature: float):
    """Return the log-prob of an answer under a plain model's distribution at a temperature."""
    logits = plain.logits(torch.tensor([*ids, *answer]))[len(ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()


@pytest.mark.parametrize(
    ("judged", "temperature"),
    [(False, 1.0), (True, 1.0), (False, 0.7)],
    ids=["reward", "judge", "cool"],
)
def test_a_step_equals_a_plain_loop_in_float64(
    judged: bool, temperature: float, toy: Path, double: Path, tmp_path: Path, train
):
    """Loss, gradient norm and weights within 1e-10 of responses that are run one by one."""
    more = {"max_steps": 1, "shuffle": False, "warmup": 0.0, "schedule": "constant"}
    more |= {"beta": 0.2, "mixture": 0.4, "reward_scale": 1.7, "temperature": temperature}
    if judged:
        template_file = tmp_path / "judge.json"
        question = "{prompt}: {response} or {other}?"
        content = {"question": question, "labels": {"yes": 1, "no": 0, "so": 0.5}}
        template_file.write_text(json.dumps(content))
        more["reward"] = f"judge:{double / 'model'}:{template_file}"
    flags = flags_of(toy, double, **more)
    (row,) = train(train_nash, tmp_path / "out", **flags)

    template = Template("auto", load_tokenizer(double / "model"))
    prompts = load_prompts([flags["data"]], template, 1000, log=lambda line: None).take(range(6))
    models = [load_model(double / name, torch.float64) for name in ("model", "ref")]
    config = train_nash.Config(max_new_tokens=8)
    policy = source.local_sampler(models[0], template, config)
    mixture = source.local_sampler(models[0], template, config, (models[1], 0.4))
    own, texts = [], []
    for i, ids in enumerate(prompts.ids):
        pair = []
        for k, sampler in enumerate((policy, mixture)):
            seed = np.random.SeedSequence([0, 1, i, k]).generate_state(1, np.uint64)[0] >> 1
            pair += sampler([ids], [int(seed)], 1, temperature)
        own.append(pair[0].tokens)
        texts.append([template.tokenizer.decode(one.tokens) for one in pair])
    if judged:
        judge = load_judge(str(double / "model"), template_file, torch.float64)
        asked = [(p, a, b) for p, (a, b) in zip(prompts.prompts, texts)]
        first, second = judge.compare(asked)
        chances = ((first + second) / 2).tolist()
    else:
        good = [[float(bool(re.search("[aeiou] ", text))) for text in pair] for pair in texts]
        chances = plain_preferences(good, 1.7)
    assert row["preference"] == pytest.approx(np.mean(chances), abs=1e-12)
    assert np.ptp(chances) > 0

    plain, ref = (PlainModel(double / name, torch.float64) for name in ("model", "ref"))
    trainer = PlainTrainer(plain, total=1, lr=1e-2)
    total, kl = 0.0, 0.0
    for ids, answer, chance in zip(prompts.ids, own, chances):
        logps = plain_sum(plain, ids, answer, temperature)
        with torch.no_grad():
            ratio = (logps - plain_sum(ref, ids, answer, temperature)).item()
        kl += ratio / 6
        total = total - (chance - 0.5 - 0.2 * ratio) * logps / 6
    loss, norm = trainer.step(total)
    assert row["kl"] == pytest.approx(kl, abs=1e-10)
    assert row["loss"] == pytest.approx(loss, abs=1e-10)
    assert row["grad_norm"] == pytest.approx(norm, abs=1e-10)
    after = weights_in(tmp_path / "out" / "final")
    assert max((after[n] - plain.weights[n]).abs().max().item() for n in after) < 1e-10


@pytest.fixture(scope="module")
def unbroken(toy: Path, double: Path, tmp_path_factory) -> Path:
    """Return a run of four steps in one process, which renews its reference after step 2."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    train_nash.main(words_of(out, flags_of(toy, double, ref_every=2)))
    return out


@pytest.mark.parametrize("layout", ["dp", "tp", "cp", "zero3"])
def test_two_ranks_do_what_one_does(
    layout: str, toy: Path, double: Path, unbroken: Path, tmp_path: Path
):
    """Samples of the mixture included: numbers and weights within 1e-9."""
    more = {"dp": {"zero": 2}, "zero3": {"zero": 3}}.get(layout, {layout: 2})
    flags = flags_of(toy, double, ref_every=2, **more)
    launch(2, train_nash.main, words_of(tmp_path / "two", flags))
    for row, like in zip(read_metrics(tmp_path / "two"), read_metrics(unbroken), strict=True):
        assert row.keys() == like.keys()
        for key in row:
            assert row[key] == pytest.approx(like[key], abs=1e-9), key
    mine, one = weights_in(tmp_path / "two" / "final"), weights_in(unbroken / "final")
    assert max((mine[n] - one[n]).abs().max().item() for n in one) < 1e-9
    assert read_samples(tmp_path / "two") == read_samples(unbroken)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_is_the_unbroken_one(
    stop: int, toy: Path, double: Path, tmp_path: Path, train
):
    flags = flags_of(toy, double, ref_every=2, save_every=1, keep=0)
    whole = train(train_nash, tmp_path / "whole", **flags)
    weights = weights_in(tmp_path / "whole" / "final")
    resume = tmp_path / "whole" / f"step_{stop}"
    train(train_nash, tmp_path / "part", **{**flags, "resume": resume})
    assert read_metrics(tmp_path / "part") == whole[stop:]
    part = weights_in(tmp_path / "part" / "final")
    assert all(torch.equal(part[name], weights[name]) for name in weights)


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
def test_indifference_teaches_nothing(dtype: str, toy: Path, tmp_path: Path, train):
    """Equal rewards and a reference that is the policy: no gradient, and no weight moves a bit."""
    flags = flags_of(toy, toy, dtype=dtype, reward=CONSTANT, max_steps=3, weight_decay=0.0)
    rows = train(train_nash, tmp_path / "out", **{**flags, "ref": ""})
    for row in rows:
        assert row["loss"] == row["grad_norm"] == row["kl"] == 0 and row["preference"] == 0.5
    assert moved(tmp_path / "out", toy / "model") == 0


def test_it_learns(toy: Path, tmp_path: Path, train):
    """Answers of three words are preferred, and become likelier."""
    flags = flags_of(toy, toy, dtype="fp32", reward="length:3", max_steps=12, batch_size=16)
    flags |= {"epochs": 3, "ref": "", "beta": 0.01, "schedule": "constant"}
    flags |= {"eval_data": toy / "world" / "sft.jsonl", "eval_every": 6}
    rows = train(train_nash, tmp_path / "out", **flags)
    rewards = [row["eval/reward"] for row in rows if "eval/reward" in row]
    assert rewards[-1] > rewards[0] + 0.05


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"group_size": 4}, "--group-size must be 2"),
        ({"pp": 2}, "--pp 2 is not supported"),
        ({"ep": 2}, "--ep 2 is not supported"),
        ({"rollout_url": ["http://x"]}, "--rollout-url is not supported"),
        ({"reward": ""}, "--reward is missing"),
        ({"replay_routing": True}, "--replay-routing is for"),
    ],
)
def test_flags_that_cannot_work_are_refused(more: dict, message: str):
    """Before any step, with the fix."""
    with pytest.raises(ValueError, match=message):
        train_nash.validate(train_nash.Config(**{"reward": "length:3", **more}))
