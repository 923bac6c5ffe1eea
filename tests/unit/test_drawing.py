"""Truncated rollouts: what is drawn, its log-probs, and the weights that correct for them."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config import RolloutConfig
from data.templates import Template
from data.tokenizer import load_tokenizer
from sampling import draw, rollout, sampler, source, updates
from weights.folder import load_model


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.8), (4, 0.7)])
def test_forbidden_tokens_share_out_their_probability(temperature, top_k, top_p):
    """As if their logit were -inf; the policy's own log-probs stay those of the whole softmax."""
    logits = torch.randn(64, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[::2, 4] += 300.0  # an end token that the policy is sure of
    forbidden = torch.zeros(64, 11, dtype=torch.bool)
    forbidden[:48, [4, 7]] = True
    uniform = torch.linspace(0.001, 0.999, 64, dtype=torch.float64)
    drawn = draw.sample(logits, uniform, temperature, top_k, top_p, forbidden)
    assert not forbidden[torch.arange(64), drawn[0]].any()
    for row in range(64):
        z = logits[row].tolist()
        allowed = [i for i in range(11) if not forbidden[row, i]]
        token = int(drawn[0][row])
        whole = max(z) + math.log(sum(math.exp(x - max(z)) for x in z))
        assert drawn[2][row].item() == pytest.approx(z[token] - whole, abs=1e-10)
        if temperature == 0:
            assert token == max(allowed, key=z.__getitem__) and drawn[1][row] == 0
            continue
        best = max(z[i] for i in allowed)
        weights = {i: math.exp((z[i] - best) / temperature) for i in allowed}
        order = sorted(weights, key=weights.get, reverse=True)[: top_k or None]
        total, kept, mass = sum(weights[i] for i in order), [], 0.0
        for i in order:
            if mass >= top_p * total - 1e-15:
                break
            kept.append(i)
            mass += weights[i]
        assert token in kept
        assert drawn[1][row].item() == pytest.approx(math.log(weights[token] / mass), abs=1e-10)


@pytest.fixture(scope="module")
def policy(toy: Path):
    return load_model(toy / "model", torch.float64), Template("auto", load_tokenizer(toy / "model"))


def test_no_sample_ends_before_min_new_tokens(policy):
    """The first tokens are no end tokens; later ones are drawn from all, and samples end."""
    model, template = policy
    ids = [template.prompt("What is this?"), template.prompt("Where does Ada live?")]
    ends = set(range(0, model.c.vocab, 3))  # a third of all tokens end a sample
    settings = {"stop_ids": ends, "n": 8, "seed": 3}
    for least in (0, 1, 4):
        drawn = sampler.generate(model, ids, 12, min_new_tokens=least, batch_size=3, **settings)
        lengths = [len(one.tokens) for one in drawn]
        assert min(lengths) == least + 1 and all(one.ended for one in drawn if len(one.tokens) < 12)
        for one in drawn:
            assert not ends & set(one.tokens[:-1])
            early = np.array(one.logps[:least]) - one.policy_logps[:least]
            assert (early > 0.1).all()  # a third of the probability was shared out
            assert np.allclose(one.logps[least:], one.policy_logps[least:], atol=1e-12)
        same = sampler.generate(model, ids, 12, min_new_tokens=least, batch_size=16, **settings)
        assert [one.tokens for one in same] == [one.tokens for one in drawn]
    for bad in (-1, 12):
        with pytest.raises(ValueError, match="min_new_tokens"):
            sampler.generate(model, ids, 12, min_new_tokens=bad, **settings)


def test_a_stop_text_ends_a_sample_that_keeps_it(policy):
    """The text is part of the sample, which counts as ended; not before --min-new-tokens."""
    model, template = policy
    ids = [template.prompt("What is this?")]
    seeds = list(range(12))
    config = RolloutConfig(max_new_tokens=20)
    plain = source.local_sampler(model, template, config)(ids, seeds, 12, 1.0)
    texts = [template.tokenizer.decode(one.tokens) for one in plain]
    stop = next(text[5:6] for text in texts if len(text) > 8 and text[5:6].strip())
    for least in (0, 6):
        config = RolloutConfig(max_new_tokens=20, stop=[stop], min_new_tokens=least)
        stopped = source.local_sampler(model, template, config)(ids, seeds, 12, 1.0)
        assert any(stop in template.tokenizer.decode(one.tokens) for one in stopped)
        for one in stopped:
            late = template.tokenizer.decode(one.tokens[least:])
            assert one.ended if stop in late else len(one.tokens) in (least, 20)
            assert stop not in template.tokenizer.decode(one.tokens[least:-1])


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"top_k": 5}, {"top_p": 0.6}, {"min_new_tokens": 3}])
def test_weights_of_truncated_samples_are_the_share_that_was_kept(how: dict, policy):
    """w = π_old / μ = Σ of π over the tokens that could be drawn: at most 1; exact at 1e-9.

    The distribution is formed again from the logits of the whole text.
    """
    model, template = policy
    config = RolloutConfig(
        max_new_tokens=5, temperature=0.8, engine_correction="truncate", group_size=2, **how
    )
    ids = [template.prompt("What is this?")]
    drawn = source.local_sampler(model, template, config)(ids, [0, 1], 2, 0.8)
    data = rollout.trees(ids, drawn)
    data.add_tokens("token_index", np.arange(data.scored_len.sum()))
    samples = rollout.Rollout(
        SimpleNamespace(ids=ids), drawn, [""] * 2, np.zeros(2), np.ones(2, bool), data, {}
    )
    plan = updates.plan(samples, 1, 1, 0, config, model.mesh)
    with torch.no_grad():
        _, _, row = updates.add_logps(samples, plan, model, None, config)
    wanted = []
    for one in drawn:
        for i in range(len(one.tokens)):
            p = next_token(model, ids[0] + one.tokens[:i], 0.8)
            order = np.argsort(-p)
            if "top_k" in how:
                kept = order[:5]
            elif "top_p" in how:
                kept = order[: int(np.searchsorted(np.cumsum(p[order]), 0.6)) + 1]
            else:
                ends = set(template.stop_ids) if i < 3 else set()
                kept = [t for t in order if t not in ends]
            wanted.append(p[kept].sum())
    got = data.token_columns["engine_weight"][data.scored == 1]
    assert got.tolist() == pytest.approx(wanted, abs=1e-9) and max(wanted) < 1 + 1e-12
    assert min(wanted) < 0.999 or "min_new_tokens" in how
    assert row["rollout/kept"] == pytest.approx(np.mean(wanted), abs=1e-9)


def next_token(model, ids: list[int], temperature: float) -> np.ndarray:
    """Return the probabilities of the token after a text, by one draw for every token: (V,)."""
    from data.dataset import from_trees
    from data.trees import make_batch

    tokens = list(range(model.c.vocab))
    data = from_trees([(ids, [([token], [1]) for token in tokens])])
    batch = make_batch(data, [0])
    with torch.no_grad():
        return model.logps(model(batch), batch, temperature).double().exp().numpy()


def test_what_has_no_meaning_is_refused():
    ok = RolloutConfig(rollout_url=["http://x"], rollout_reload="x", top_p=0.9)
    rollout.validate(ok)
    for flags, message in [
        ({"min_new_tokens": 256}, "below --max-new-tokens"),
        ({"stop": [""]}, "end every sample at once"),
        (
            {"top_k": 5, "rollout_url": ["http://x"], "engine_correction": "mask"},
            "which servers do not report",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            draw.check_drawing(RolloutConfig(**flags))
