"""Rollouts: a function of (weights, seed, step), whoever draws them; engines that draw instead."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dataset_of
from nulls import NOTHING, metrics, null_flags, null_numbers
from online import mark, sample_with_marks, with_marks

import losses
import train_reinforce
from data.dataset import Dataset, Prompts, load_prompts
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.trees import make_batch
from parallel import Mesh
from sampling import ahead, rollout, server, source, updates
from sampling.engine import Engine
from sampling.sampler import Sample, generate
from sampling.server import Server
from weights.folder import fingerprint, load_model


def ready(toy: Path, **flags) -> tuple:
    """Return (prompts of the toy world, template, config, model in float64)."""
    config = rollout.RolloutConfig(model=str(toy / "model"), max_new_tokens=12, **flags)
    template = Template("auto", load_tokenizer(toy / "model"))
    # Many ids end a response: a model of random weights would hardly ever end one.
    template.stop_ids = template.stop_ids | set(range(4, 640, 9))
    prompts = load_prompts(
        [toy / "world" / "prompts_test.jsonl"], template, 100, log=lambda line: None
    )
    return prompts, template, config, load_model(toy / "model", torch.float64)


def text_length(
    prompts: list, responses: list[str], rows: list[dict], trees: Dataset
) -> np.ndarray:
    """Reward each response by the length of its text; check that all parts belong together."""
    assert len(prompts) == len(responses) == len(rows) == len(trees.response_len)
    assert all(row["prompt"] == prompt for row, prompt in zip(rows, prompts))
    return np.array([float(len(text)) for text in responses])


def test_a_token_column_follows_its_token():
    """Values of scored tokens stay beside their targets, whatever is packed, shared or left out."""
    data = dataset_of([([5, 6, 7], [[8, 9], [10]]), ([11], [[12, 13, 14], [15, 16]])])
    data.scored[4] = 0
    tokens = data.tokens[data.scored == 1]
    data.add_tokens("double", 2.0 * tokens)
    assert (data.token_columns["double"][data.scored == 1] == 2 * tokens).all()
    for examples, share, only in (
        ([0, 1], True, None),
        ([1, 0], False, None),
        ([1], True, 1),
        ([], True, None),
    ):
        batch = make_batch(data, examples, share, only).to(torch.device("cpu"))
        assert batch.token_columns["double"].tolist() == (2.0 * batch.target).tolist()


def test_seeds_belong_to_one_sample():
    """A seed depends on seed, step, prompt and sample, and on nothing else."""
    seeds = [s for seed in (0, 1) for step in (0, 1, 2) for s in ahead.seeds(seed, step, 5, 4)]
    assert len(set(seeds)) == len(seeds)
    assert 0 <= min(seeds) <= max(seeds) < 2**63
    assert ahead.seeds(3, 7, 2, 4)[:4] == ahead.seeds(3, 7, 9, 4)[:4]


def test_a_rollout_is_its_samples_side_by_side(toy: Path):
    """Trees, texts, rewards, penalty and metrics belong together, sample by sample."""
    prompts, template, config, model = ready(toy, no_eos_penalty=0.5, rollout_batch=5)
    prompts = prompts.take([3, 1, 4])
    seeds = ahead.seeds(0, 1, 3, 4)
    sample = source.local_sampler(model, template, config)
    samples = rollout.collect(prompts, sample, text_length, template, config, Mesh(), seeds, 1.0)
    data = samples.data
    assert len(samples.samples) == 12
    assert len(data) == 3
    assert data.columns == {}
    assert 0 < samples.ended.sum() < 12
    for i, drawn in enumerate(samples.samples):
        tree = i // 4
        start = data.tree_start[tree] + data.prompt_len[tree]
        start += data.response_len[4 * tree : i].sum()
        assert data.tokens[start : start + len(drawn.tokens)].tolist() == drawn.tokens
        assert samples.texts[i] == template.tokenizer.decode(drawn.tokens)
        assert samples.rewards[i] == len(samples.texts[i]) - 0.5 * (not drawn.ended)
        (alone,) = generate(
            model, [prompts.ids[tree]], 12, stop_ids=template.stop_ids, n=1, seeds=[seeds[i]]
        )
        assert alone.tokens == drawn.tokens
        assert alone.ended == samples.ended[i]
    assert any(text != text.strip() for text in samples.texts)  # spaces are part of a sample
    row = samples.metrics()
    assert row["reward"] == pytest.approx(samples.rewards.mean())
    assert row["completions/ended"] == samples.ended.mean()
    assert row["completions/mean_length"] == np.mean([len(s.tokens) for s in samples.samples])
    equal = [len(set(group)) == 1 for group in samples.rewards.reshape(3, 4)]
    assert row["frac_reward_zero_std"] == np.mean(equal)
    # The log-probs that the sampler reports are those that training computes.
    logps = updates.token_logps(model, data, [[2], [0, 1]], config)
    assert logps.tolist() == pytest.approx(samples.logps.tolist(), abs=1e-9)


def test_two_ranks_draw_what_one_draws(toy: Path):
    """Each of two ranks draws its share; put together it is the rollout of one rank."""
    prompts, template, config, model = ready(toy)
    prompts, seeds = prompts.take(range(5)), ahead.seeds(0, 1, 5, 2)
    sample = source.local_sampler(model, template, config)
    alone = rollout.collect(prompts, sample, text_length, template, config, Mesh(), seeds, 1.0)
    sent: dict[int, list] = {0: [], 1: []}

    class Pair:
        """A mesh of two data-parallel ranks, one of them played by the test."""

        tp_rank = cp_rank = 0
        dp, last_stage = 2, True

        def __init__(self, rank: int, others: list):
            self.dp_rank, self.others, self.calls = rank, others, -1

        def everyone(self, value):
            self.calls += 1
            sent[self.dp_rank].append(value)
            return [value, self.others[self.calls]]

    def share(places: tuple[int, ...]) -> list[dict]:
        """Return what a rank sends: its samples, then its rewards, by place."""
        rewards = {i: float(alone.rewards[i]) for i in places}
        return [{i: alone.samples[i] for i in places}, rewards]

    even, odd = share((0, 1, 4, 5, 8, 9)), share((2, 3, 6, 7))
    for rank, others in ((0, odd), (1, even)):
        samples = rollout.collect(
            prompts, sample, text_length, template, config, Pair(rank, others), seeds, 1.0
        )
        assert [s.tokens for s in samples.samples] == [s.tokens for s in alone.samples]
        assert (samples.rewards == alone.rewards).all()
        assert (samples.data.tokens == alone.data.tokens).all()
    for (drawn, rewards), (wanted_samples, wanted_rewards) in ((sent[0], even), (sent[1], odd)):
        tokens = {i: s.tokens for i, s in drawn.items()}
        assert tokens == {i: s.tokens for i, s in wanted_samples.items()}
        assert rewards == wanted_rewards


def test_a_group_that_may_not_fit_is_refused_at_the_start():
    """Before anything is sampled, with the number that would do."""
    prompts = Prompts([{}], ["p"], [[1] * 30])
    config = rollout.RolloutConfig(group_size=4, max_new_tokens=100, max_tokens=430)
    rollout.check_fits(prompts, config)
    config.max_tokens = 429
    with pytest.raises(
        ValueError,
        match="may have 430 tokens, more than a micro-batch of 429: raise --max-tokens to 430",
    ):
        rollout.check_fits(prompts, config)
    config.max_tokens, config.share_prompts = 519, False
    with pytest.raises(ValueError, match="520 tokens"):
        rollout.check_fits(prompts, config)


def test_updates_take_every_group_once_a_pass():
    """Each pass has all prompts, shuffled, in parts; two ranks share the trees of each part."""
    prompts = [[1, 2], [3], [4, 5, 6], [7], [8, 9]]
    samples = [Sample([5] * (i + 1), [0.0] * (i + 1), [0.0] * (i + 1), True) for i in range(10)]
    data = rollout.trees(prompts, samples)
    drawn = rollout.Rollout(Prompts([], [], prompts), samples, [], np.zeros(10), None, data, {})
    config = rollout.RolloutConfig(max_tokens=40)

    class Half(Mesh):
        """One of two data-parallel ranks."""

        dp = 2
        dp_rank = property(lambda self: self.rank)

    plans = [updates.plan(drawn, 2, 3, 7, config, Half(rank=rank)) for rank in range(2)]
    assert len(plans[0]) == 6
    for epoch in range(2):
        own = [u for u in plans[0] if u.epoch == epoch]
        assert sorted(i for u in own for i in u.prompts) == [0, 1, 2, 3, 4]
    for one, two in zip(*plans):
        assert one.prompts.tolist() == two.prompts.tolist()
        trees = sorted(i for u in (one, two) for items in u.bins for i in items)
        assert trees == one.prompts.tolist()
        assert one.lengths.tolist() == [2 * i + k + 1 for i in one.prompts for k in range(2)]
    again = updates.plan(drawn, 2, 3, 7, config, Half(rank=0))
    assert [u.prompts.tolist() for u in again] == [u.prompts.tolist() for u in plans[0]]
    other = updates.plan(drawn, 2, 3, 9, config, Half(rank=0))
    assert [u.prompts.tolist() for u in other] != [u.prompts.tolist() for u in plans[0]]
    assert len(updates.plan(drawn, 1, 9, 7, config, Half(rank=0))) == 5  # never an empty one
    assert updates.first_epoch(plans[0]) == [items for u in plans[0][:3] for items in u.bins]


# ---- tokens that the policy did not choose ----------------------------------------------------


def test_unscored_tokens_are_context_and_nothing_else(toy: Path, monkeypatch):
    """They are in the trees and the text, but in no log-prob, count or column."""
    sample_with_marks(monkeypatch)
    prompts, template, config, model = ready(toy)
    prompts, seeds = prompts.take(range(4)), ahead.seeds(0, 1, 4, 3)
    sample = source.local_sampler(model, template, config)
    samples = rollout.collect(prompts, sample, text_length, template, config, Mesh(), seeds, 1.0)
    marks = [mark(s.tokens) for s in samples.samples]
    counts = [sum(own) for own in marks]
    assert samples.scored_lengths.tolist() == counts
    assert min(counts) == 1
    assert sum(counts) < sum(len(s.tokens) for s in samples.samples) - len(counts)
    assert np.isfinite(samples.logps).all()
    assert len(samples.logps) == sum(counts)
    row = samples.metrics()
    assert row["completions/mean_length"] == np.mean([len(s.tokens) for s in samples.samples])
    # Every scored token's log-prob is that of the whole text, with all tokens before it.
    logps = updates.token_logps(model, samples.data, [[0, 1], [2, 3]], config)
    at = 0
    for i, drawn in enumerate(samples.samples):
        data = dataset_of([(prompts.ids[i // 3], [drawn.tokens])])
        batch = make_batch(data, [0])
        with torch.no_grad():
            alone = model.logps(model(batch), batch).numpy()[np.array(marks[i]) == 1]
        assert logps[at : at + counts[i]] == pytest.approx(alone, abs=1e-9)
        assert samples.logps[at : at + counts[i]] == pytest.approx(alone, abs=1e-9)
        at += counts[i]
    samples.seconds = {"rollout": 2.0}
    speed = samples.throughput(100, config)
    assert speed["rollout_tokens_per_second"] == sum(counts) / 2


def test_all_tokens_marked_is_no_marks(toy: Path):
    """A sample without marks equals one with every token marked, in every array."""
    prompts, template, config, model = ready(toy)
    ids, seeds = prompts.ids[:3], ahead.seeds(0, 1, 3, 2)
    drawn = source.local_sampler(model, template, config)(ids, seeds, 2, 1.0)
    marked = [s._replace(scored=[1] * len(s.tokens)) for s in drawn]
    one, two = rollout.trees(ids, drawn), rollout.trees(ids, marked)
    for name in ("tokens", "scored", "tree_start", "prompt_len", "response_start", "response_len"):
        assert (getattr(one, name) == getattr(two, name)).all()


def test_the_reward_lands_on_the_last_scored_token():
    """GAE of one response by hand: tokens s, unscored, s, unscored; reward 3, KL 1 and 2, β 0.1."""
    sample = with_marks(Sample([5, 6, 7, 8], [-1.0, -2.0, -3.0, -4.0], [], True))
    assert sample.scored == [1, 0, 1, 0]
    data = rollout.trees([[1, 2]], [sample])
    lengths = torch.from_numpy(data.scored_len)
    rewards = losses.token_rewards(torch.tensor([3.0]), torch.tensor([1.0, 2.0]), lengths, 0.1)
    assert rewards.tolist() == pytest.approx([-0.1, 2.8])
    data.add_tokens("reward", rewards.numpy())
    assert data.token_columns["reward"].tolist() == pytest.approx([0, 0, -0.1, 0, 2.8, 0])
    batch = make_batch(data, [0])
    assert batch.target.tolist() == [5, 7]
    assert batch.logit_index.tolist() == [1, 3]  # read where each is predicted
    # δ = [-0.1 + 0.5 - 1.0, 2.8 - 0.5] with γ = 1: the next scored token follows at once.
    advantages, _ = losses.gae(rewards, torch.tensor([1.0, 0.5]), lengths, 1.0, 0.5)
    assert advantages.tolist() == pytest.approx([-0.6 + 0.5 * 2.3, 2.3])


def test_a_sample_must_have_a_scored_token():
    """Nothing to learn from, or marks that do not fit, are refused."""
    for marks in ([0, 0], [1], [1, 1, 1]):
        with pytest.raises(ValueError, match="a sample of 2 tokens has . marks"):
            rollout.trees([[1]], [Sample([5, 6], [0.0, 0.0], [], True, marks)])


# ---- a stand-in for vLLM and SGLang -----------------------------------------------------------


@pytest.mark.parametrize("form", ["token_ids", "names", "text"])
def test_samples_of_a_server_are_its_tokens(form: str, toy: Path, engine, capsys, monkeypatch):
    """Prompt ids go out; samples come back in order, with log-probs where the server gives them."""
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    stand_in = engine(form)
    prompts, template, config, _ = ready(toy, rollout_url=[stand_in.url + "/v1/"])
    client = Engine(template, config, learns=False)
    seeds = ahead.seeds(0, 1, 3, 2)
    ids = prompts.ids[:3]
    samples = client.sample(ids, seeds, 2, 1.0)
    assert len(samples) == 6
    assert client.servers[0].model == "tiny"
    for i in range(3):
        seed = seeds[2 * i] % 2**31
        wanted = generate(
            stand_in.model, [ids[i]], 12, stop_ids=template.stop_ids, n=2, seeds=[seed, seed + 1]
        )
        for got, sample in zip(samples[2 * i : 2 * i + 2], wanted):
            assert got.ended == sample.ended
            if form == "text":
                text = template.tokenizer.decode(sample.tokens)
                assert template.tokenizer.decode(got.tokens) == text
                assert math.isnan(got.logps[0])
            elif form == "names" and sample.ended:  # the end token was left out: its log-prob too
                assert got.tokens == [*sample.tokens[:-1], template.tokenizer.eos]
                assert got.logps[:-1] == sample.policy_logps[:-1]
                assert math.isnan(got.logps[-1])
            else:
                assert got.tokens == sample.tokens
                assert got.logps == sample.policy_logps
    headers, body = stand_in.requests[0]
    assert headers["Authorization"] == "Bearer abc"
    assert body["model"] == "tiny"
    assert body["top_p"] == 1.0
    assert set(body["stop_token_ids"]) == template.stop_ids
    assert body["max_tokens"] == 12
    assert body["logprobs"] == 1
    assert ("tokenised again" in capsys.readouterr().out) == (form == "text")
    (hot,) = client.sample(ids[:1], seeds[:1], 1, 0.7)
    assert math.isnan(hot.logps[0])  # an engine reports log-probs at temperature 1
    assert math.isnan(hot.policy_logps[0]) == (form == "text")


def test_a_failed_request_is_repeated_or_explained(toy: Path, engine, monkeypatch):
    """Busy for a moment: repeated. Refused, no server, no http, too few samples: one clear line."""
    pauses = []
    monkeypatch.setattr(server.time, "sleep", pauses.append)
    stand_in = engine()
    prompts, template, config, _ = ready(toy, rollout_url=[stand_in.url], rollout_timeout=5.0)
    client = Engine(template, config, learns=False)
    stand_in.failures = [503, 429, 500]
    assert len(client.sample(prompts.ids[:1], [1], 1, 1.0)) == 1
    assert pauses == [1, 2, 4]
    stand_in.failures = [503] * 4
    with pytest.raises(
        OSError, match="v1/completions: no answer in 4 tries .503: .*no, thanks.*: is the server up"
    ):
        client.sample(prompts.ids[:1], [1], 1, 1.0)
    stand_in.failures = [400]
    with pytest.raises(OSError, match="refused: 400: .*no, thanks"):
        client.sample(prompts.ids[:1], [1], 1, 1.0)
    assert len(stand_in.requests) == 4 + 4 + 1
    monkeypatch.setattr(stand_in, "complete", lambda body: {"choices": []})
    with pytest.raises(OSError, match="returned 0 samples: asked for 2"):
        client.sample(prompts.ids[:1], [1, 2], 2, 1.0)
    stand_in.shutdown()
    stand_in.server_close()
    with pytest.raises(OSError, match="v1/models: no answer in 4 tries"):
        Engine(template, config)
    config.rollout_url = ["localhost:8000"]
    with pytest.raises(ValueError, match="must begin with http"):
        Engine(template, config)


@pytest.mark.slow
def test_training_through_a_server_pushes_its_weights(toy: Path, engine, tmp_path: Path, train):
    """The engine samples from the policy of every step: its log-probs fit the pushed weights."""
    stand_in = engine()
    request = (
        "import os, urllib.request as u; "
        f"u.urlopen('{stand_in.url}/reload?' + os.environ['PLUMB_FOLDER'])"
    )
    reload = f'{sys.executable} -c "{request}"'
    flags = {
        "model": toy / "model",
        "data": toy / "world" / "sft.jsonl",
        "batch_size": 4,
        "group_size": 3,
        "lr": 1e-2,
        "max_new_tokens": 8,
        "max_steps": 3,
        "reward": "length:5",
        "minibatches": 2,
        "rollout_url": [stand_in.url],
        "eval_data": toy / "world" / "prompts_test.jsonl",
    }
    rows = train(train_reinforce, tmp_path / "out", **flags, rollout_reload=reload)
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 3
    assert all(row["sampler_gap"] < 1e-5 for row in steps)
    pushed = (tmp_path / "out" / "rollout").resolve()
    assert stand_in.loaded[1:] == [str(pushed)] * 5  # 3 rollouts, 2 evaluations
    assert fingerprint(pushed) == fingerprint(tmp_path / "out" / "final")
    assert fingerprint(pushed) != fingerprint(toy / "model")
    with pytest.raises(ValueError, match="without --rollout-reload"):
        train(train_reinforce, tmp_path / "none", **flags)
    with pytest.raises(OSError, match=r"--rollout-reload: .*false.* failed \(1\)"):
        train(train_reinforce, tmp_path / "false", **flags, rollout_reload="false {folder}")


# ---- a server that does not do what it says --------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.slow
def test_stale_wrong_and_less_precise_servers_are_told_apart(
    dtype: str, toy: Path, engine, tmp_path: Path, train, capsys
):
    """The first two end the run with one line; another precision is noted, a good server is not."""
    stand_in = engine()
    request = (
        "import os, urllib.request as u; "
        f"u.urlopen('{stand_in.url}/reload?' + os.environ['PLUMB_FOLDER'])"
    )
    reload = f'{sys.executable} -c "{request}"'
    flags = {
        "model": toy / "model",
        "data": toy / "world" / "sft.jsonl",
        "batch_size": 4,
        "group_size": 3,
        "lr": 1e-2,
        "max_new_tokens": 8,
        "max_steps": 4,
        "reward": "length:5",
        "rollout_url": [stand_in.url],
        "dtype": dtype,
    }
    gap = {"fp32": 1e-5, "bf16": 0.05}[dtype]
    for name, more in (("ref", {}), ("none", {"kl": 0.0})):
        with pytest.raises(
            ValueError, match="stale server: .*--rollout-reload 'true' did not load"
        ):
            train(train_reinforce, tmp_path / name, **flags, **more, rollout_reload="true")
    stand_in.model.to(torch.bfloat16)
    rows = train(train_reinforce, tmp_path / "bf16", **{**flags, "lr": 0.0}, rollout_reload="true")
    assert all(1e-4 < row["sampler_gap"] < 0.1 for row in rows)
    assert ("computes in another precision" in capsys.readouterr().out) == (dtype == "fp32")
    stand_in.load(toy / "model")
    rows = train(train_reinforce, tmp_path / "good", **flags, rollout_reload=reload)
    assert all(row["sampler_gap"] < gap for row in rows)
    if dtype == "fp32":
        assert "another precision" not in capsys.readouterr().out
    stand_in.load(toy / "model")
    with torch.no_grad():
        for weight in stand_in.model.parameters():
            weight.mul_(1.5)
    with pytest.raises(
        ValueError, match="wrong server: sampler_gap is .*other weights than --model"
    ):
        train(train_reinforce, tmp_path / "wrong", **flags, rollout_reload="true")


def test_a_withheld_end_token_is_the_reported_one(toy: Path):
    """vLLM's and SGLang's report where it is an end, else the template's end of turn, else eos."""
    _, template, config, _ = ready(toy)
    client = object.__new__(Server)  # without a connection
    client.template, client.config = template, config
    client.url, client.warned = "http://none", True
    ends, no_end = sorted(template.stop_ids), 5
    other = next(i for i in ends if i != template.tokenizer.eos)
    assert no_end not in template.stop_ids
    bodies = ({"token_ids": [7, 8]}, {"logprobs": {"tokens": ["token_id:7", "token_id:8"]}})
    for body in (*bodies, {"text": "so"}):
        for report, wanted in (
            ({"stop_reason": other}, other),
            ({"matched_stop": other}, other),
            ({"stop_reason": template.tokenizer.eos_token}, template.tokenizer.eos),
            ({"stop_reason": no_end}, template.end),
            ({"stop_reason": None}, template.end),
            ({"stop_reason": True}, template.end),
            ({}, template.end),
        ):
            sample = client._read({"finish_reason": "stop", **body, **report}, 1.0)
            assert sample.ended and sample.tokens[-1] == wanted
    assert template.end == template.tokenizer.eos  # of a plain template
    template.end = other
    assert client._read({"finish_reason": "stop", "token_ids": [7]}, 1.0).tokens == [7, other]
    whole = client._read({"finish_reason": "stop", "token_ids": [7, other]}, 1.0)
    assert whole.tokens == [7, other]
    cut = client._read({"finish_reason": "length", "token_ids": [7, 8], "stop_reason": other}, 1.0)
    assert cut.tokens == [7, 8] and not cut.ended


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
def test_nothing_is_learned_from_nothing_through_a_server(
    dtype: str, toy: Path, engine, tmp_path: Path, train
):
    """The null test of tests/nulls.py with an fp32 engine, whose numbers serve the gap alone."""
    flags = null_flags(toy / "model", toy / "world" / "sft.jsonl", dtype=dtype, advantage="grpo")
    flags |= {"rollout_url": [engine().url], "rollout_reload": "true", "rollout_epochs": 2}
    train(train_reinforce, tmp_path / "out", **flags)
    assert null_numbers(tmp_path / "out", toy / "model") == NOTHING
    gaps = [row["sampler_gap"] for row in metrics(tmp_path / "out")]
    assert all(0 < gap < (0.1 if dtype == "bf16" else 1e-4) for gap in gaps)
