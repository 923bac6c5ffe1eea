"""Law 6: cached generation equals naive generation; samples do not depend on batch or cache."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dataset_of, tiny_transformers

import generate
from data.tokenizer import load_tokenizer
from data.trees import make_batch
from kernels.attention import plain_attention
from layout import TreeLayout
from mixers import partial_attention
from parallel import Mesh
from sampling import cache, sampler
from sampling.cache import Cache
from weights.folder import load_model

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [3, 4], [20, 21, 22, 23, 24]]


def model_of(family: str, folder: Path):
    tiny_transformers(family, False).save_pretrained(folder)
    return load_model(folder, torch.float64)


def next_logp(model, ids: list[int]) -> torch.Tensor:
    """Return log-probs of the next token, computed without a cache, (V,)."""
    batch = make_batch(dataset_of([(ids, [[0]])]), [0])
    return model.logits(model(batch), torch.tensor([len(ids) - 1]))[0].log_softmax(-1)


# Prompts copied to every row, or stored once for their samples; shapes fixed, or not.
# name: (SHARE_FROM, PLUMB_DECODE)
WAYS = {
    "copied": (10**9, ""),
    "shared": (0, ""),
    "copied, fixed": (10**9, "static"),
    "shared, fixed": (0, "static"),
}


@pytest.fixture
def way(request, monkeypatch) -> str:
    """Make generate store its prompts in one of WAYS."""
    share_from, mode = WAYS[request.param]
    monkeypatch.setattr(sampler, "SHARE_FROM", share_from)
    monkeypatch.setattr(cache, "BUCKET", 8)
    monkeypatch.setenv("PLUMB_DECODE", mode)
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("family", ["llama3", "mistral_window", "qwen3", "gpt_neox"])
def test_greedy_equals_the_naive_loop_and_transformers(family: str, way: str, tmp_path: Path):
    """Each token is the argmax of a fresh forward over the whole text, and transformers' choice."""
    model = model_of(family, tmp_path)
    theirs = tiny_transformers(family, False)
    answers = sampler.generate(model, PROMPTS, 12, temperature=0, stop_ids={99}, batch_size=3, n=2)
    assert [a.tokens for a in answers[::2]] == [a.tokens for a in answers[1::2]]
    for prompt, answer in zip(PROMPTS, answers[::2]):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and ids[-1] != 99:
            with torch.no_grad():
                ids.append(int(next_logp(model, ids).argmax()))
        assert answer.tokens == ids[len(prompt) :] and answer.ended == (ids[-1] == 99)
        assert answer.logps == [0.0] * len(answer.tokens)  # the likeliest token is certain
        out = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=99,
            pad_token_id=0,
        )
        assert answer.tokens == out[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("family", ["llama3", "mistral_window"])
def test_samples_and_their_logps_do_not_depend_on_the_batch(family: str, way: str, tmp_path: Path):
    """Batch sizes 1 and 8, with rows refilled, give the same tokens.

    Both log-probs are those of a fresh forward, with and without the temperature.
    """
    model = model_of(family, tmp_path)
    prompts = PROMPTS + [[30 + i] * (1 + i % 4) for i in range(4)]
    settings = {"temperature": 0.7, "stop_ids": set(range(0, 90, 7)), "n": 3}
    one, eight = (
        sampler.generate(model, prompts, 10, seed=1, batch_size=size, **settings) for size in (1, 8)
    )
    assert [a.tokens for a in one] == [a.tokens for a in eight]
    assert len({len(a.tokens) for a in one}) > 4  # they end one by one
    assert (
        {a.ended for a in one}
        == {a.tokens[-1] % 7 == 0 and a.tokens[-1] < 90 for a in one}
        == {True, False}
    )
    assert len({tuple(a.tokens) for a in one}) > 20  # the samples of a prompt differ
    for i, (a, b) in enumerate(zip(one, eight)):
        assert np.allclose(a.logps, b.logps, atol=1e-10) and np.allclose(
            a.policy_logps, b.policy_logps, atol=1e-10
        )
        for j, token in enumerate(a.tokens):
            with torch.no_grad():
                logps = next_logp(model, prompts[i // 3] + a.tokens[:j])
            assert a.policy_logps[j] == pytest.approx(logps[token].item(), abs=1e-10)
            assert a.logps[j] == pytest.approx(
                (logps / 0.7).log_softmax(-1)[token].item(), abs=1e-10
            )
    other = sampler.generate(model, prompts, 10, seed=2, **settings)
    assert [a.tokens for a in other] != [a.tokens for a in one]


def test_logps_in_fp32(tmp_path: Path):
    """fp32 log-probs are within 1e-5 of a fresh forward with top_k and top_p applied."""
    model = model_of("llama3", tmp_path).float()
    for answer, prompt in zip(sampler.generate(model, PROMPTS, 8, 0.8, 20, 0.9), PROMPTS):
        for j, token in enumerate(answer.tokens):
            with torch.no_grad():
                logps = next_logp(model, prompt + answer.tokens[:j])
            kept = distribution(logps.double().numpy(), 0.8, 20, 0.9)
            assert answer.policy_logps[j] == pytest.approx(logps[token].item(), abs=1e-5)
            assert answer.logps[j] == pytest.approx(float(np.log(kept[token])), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_do_not_depend_on_how_many_rows_a_step_has(dtype, tmp_path: Path):
    """2, 5 or 20 rows a step take different ways through a linear (kernels/linear.py).

    Each reported log-prob is that of a fresh forward over the whole text, up to rounding. In bf16
    that is seldom needed: both attend in fp32 on a CPU.
    """
    model = model_of("llama3", tmp_path).to(dtype)
    step = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    gaps = []
    for rows in (2, 5, 20):
        answers = sampler.generate(model, PROMPTS[:4], 5, batch_size=rows, n=5)
        for i, answer in enumerate(answers):
            with torch.no_grad():
                last = next_logp(model, PROMPTS[i // 5] + answer.tokens[:-1])
            gaps.append(abs(answer.policy_logps[-1] - last[answer.tokens[-1]].item()))
    assert max(gaps) < step and sum(gaps) / len(gaps) < step / 10


def test_a_sample_depends_on_its_seed_alone(tmp_path: Path):
    """A rank that samples a part of the list draws what it would draw in the whole list."""
    model = model_of("llama", tmp_path)
    whole = sampler.generate(model, PROMPTS, 6, n=2, seeds=list(range(100, 110)))
    part = sampler.generate(model, PROMPTS[2:4], 6, n=2, seeds=[104, 105, 106, 107])
    assert [a.tokens for a in part] == [a.tokens for a in whole[4:8]]
    derived = sampler.generate(model, PROMPTS, 6, seed=7)
    assert [a.tokens for a in derived] == [
        a.tokens for a in sampler.generate(model, PROMPTS, 6, seeds=[[7, i] for i in range(5)])
    ]


@pytest.mark.parametrize("way", ["copied", "shared"], indirect=True)
@pytest.mark.parametrize("size", [1, 4, 64])
def test_prompts_are_computed_once_and_rows_are_refilled_at_once(
    way: str, size: int, tmp_path: Path, monkeypatch
):
    """Prompts cost their tokens once for n samples, and no row is idle while samples wait.

    A sample of k tokens costs k - 1 more tokens, and at most one when it starts. The number of
    steps is that of a list scheduler with `size` workers.
    """
    model = model_of("llama", tmp_path)
    runs, run = [], model.run
    monkeypatch.setattr(
        model, "run", lambda tokens, *rest: (runs.append(tokens.tolist()), run(tokens, *rest))[1]
    )
    prompts = [[90 + i] * (2 + i) for i in range(6)]
    answers = sampler.generate(
        model, prompts, 12, stop_ids=set(range(0, 80, 9)), n=5, batch_size=size
    )
    lengths = [len(a.tokens) for a in answers]
    fed = sum(length - 1 for length in lengths)
    rows = sum(map(len, runs)) - sum(map(len, prompts))
    assert fed <= rows <= fed + len(answers)
    workers = [0] * min(size, len(answers))
    for length in lengths:
        workers[workers.index(min(workers))] += length
    slack = len(prompts) if way == "shared" else 0  # a row may wait for a place there
    assert max(map(len, runs)) <= min(size, 30) + sum(map(len, prompts))
    assert len(runs) <= max(workers) + slack


@pytest.mark.parametrize("way", ["copied", "shared"], indirect=True)
def test_the_cache_is_bounded(way: str, tmp_path: Path, monkeypatch):
    """It has at most batch_size * (longest prompt + max_new_tokens) positions for any n."""
    model, made = model_of("llama", tmp_path), []
    cache = Cache
    monkeypatch.setattr(sampler, "Cache", lambda *args: (made.append(cache(*args)), made[-1])[1])
    sampler.generate(model, [[5] * 20] * 9, 6, n=8, batch_size=16)
    layer = made[0].layers[0]
    positions = sum(x.shape[0] * x.shape[2] for x in (layer.keys, layer.prompt_keys))
    assert positions == {"copied": 16 * 26, "shared": 16 * 6 + 4 * 20}[way]


def distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Apply temperature, top-k and top-p in this order, in numpy; return probabilities (V,)."""
    p = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")
    p[order[top_k or len(p) :]] = 0
    p /= p.sum()
    total, kept = 0.0, np.zeros_like(p)
    for i in order:
        kept[i] = p[i]
        total += p[i]
        if total >= top_p:
            break
    return kept / kept.sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (1.5, 3, 1.0),
        (1.0, 0, 0.7),
        (1.0, 0, 0.05),
        (0.8, 5, 0.6),
        (2.0, 1, 1.0),
    ],
)
@pytest.mark.parametrize("vocabulary", [6, 600])
def test_draws_follow_the_distribution(
    vocabulary: int, temperature: float, top_k: int, top_p: float
):
    """Chi-square of 40,000 draws against numpy; 600 tokens are three blocks of `_draw`."""
    logits = (
        np.random.default_rng(3).normal(0, 1, vocabulary)
        if vocabulary > 6
        else np.array([1, 2, 0.5, -1, 1.7, 0])
    )
    wanted = distribution(logits, temperature, top_k, top_p)
    n = 40_000
    uniform = torch.tensor(np.random.default_rng(0).random(n))
    z = torch.tensor(logits).expand(n, -1)
    tokens, logps, policy_logps = (
        x.numpy() for x in sampler.sample(z, uniform, temperature, top_k, top_p)
    )
    counts = np.bincount(tokens, minlength=vocabulary)
    kept = np.flatnonzero(wanted)
    assert set(np.flatnonzero(counts)) <= set(kept)
    if vocabulary == 6:
        assert set(np.flatnonzero(counts)) == set(kept)
    expected = n * wanted[kept]
    chi, freedom = ((counts[kept] - expected) ** 2 / expected).sum(), len(kept) - 1
    assert chi <= freedom + 4 * np.sqrt(2 * freedom) + 1e-9  # four deviations
    assert np.allclose(logps, np.log(wanted[tokens]), atol=1e-12)
    assert np.allclose(policy_logps, np.log(distribution(logits, 1, 0, 1)[tokens]), atol=1e-12)


def test_top_p_of_a_flat_distribution_keeps_enough_tokens():
    """The kept set is larger than the number of tokens that are sorted first."""
    logits = torch.zeros(3, 3000, dtype=torch.float64) - torch.arange(3000) * 1e-9
    uniform = torch.tensor([0.0, 0.5001, 1 - 1e-12], dtype=torch.float64)
    tokens, logps, _ = sampler.sample(logits, uniform, 1.0, 0, 0.9)
    assert tokens.tolist() == [0, 1350, 2699] and torch.allclose(
        logps.exp(), torch.tensor(1 / 2700).double()
    )


def test_stop_texts_end_a_response(tmp_path: Path):
    """A response ends at the first token that completes a stop text, even one of several tokens."""
    model = model_of("llama", tmp_path)

    def decode(tokens: list[int]) -> str:
        return "".join(f"{t:02d}" for t in tokens)

    free = sampler.generate(model, PROMPTS, 30, seed=3)
    texts = [decode(a.tokens) for a in free]
    stops = [texts[0][13:17], texts[1][24:26], texts[2][41:44]]
    cut = sampler.generate(
        model, PROMPTS, 30, seed=3, stop_texts=stops, decode=decode, batch_size=2
    )
    for answer, text in zip(cut, texts):
        ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
        assert decode(answer.tokens) == text[: -(-min(ends, default=60) // 2) * 2]
        assert answer.ended == bool(ends)
    assert sum(a.ended for a in cut) >= 3


def test_a_response_that_repeats_itself_is_cut(tmp_path: Path):
    """A model without attention falls into a cycle: its responses are cut there, not ended."""
    model = model_of("llama", tmp_path)
    for block in model.blocks.values():
        torch.nn.init.zeros_(block.mixer.out.weight)
    free = sampler.generate(model, PROMPTS, 60, temperature=0)
    cut = sampler.generate(model, PROMPTS, 60, temperature=0, no_repeat=8)

    def cyclic(tail: list[int]) -> bool:
        return len(tail) == 8 and any(
            all(tail[i] == tail[i % p] for i in range(8)) for p in (1, 2, 3, 4)
        )

    for a, b in zip(free, cut):
        first = next((i for i in range(8, 61) if cyclic(a.tokens[i - 8 : i])), 60)
        assert b.tokens == a.tokens[:first] and not b.ended
    assert len({len(b.tokens) for b in cut}) > 1


def test_on_token_gets_every_token_in_order(tmp_path: Path):
    """on_token is called with (sample, token) for every token."""
    heard = {}

    def listen(i: int, token: int) -> None:
        heard.setdefault(i, []).append(token)

    model = model_of("llama", tmp_path)
    answers = sampler.generate(model, PROMPTS, 5, n=2, batch_size=3, on_token=listen)
    assert [heard[i] for i in range(10)] == [a.tokens for a in answers]


def test_bad_arguments_are_refused(tmp_path: Path, monkeypatch):
    """Empty prompts and settings out of range raise ValueErrors that name them."""
    model = model_of("llama", tmp_path)
    with pytest.raises(ValueError, match="no token to go on from"):
        sampler.generate(model, [[1], []], 3)
    assert sampler.generate(model, [], 3) == []
    for settings, match in [
        ({"temperature": -1}, "temperature >= 0"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"n": 0}, "n >= 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"no_repeat": 1}, "no_repeat"),
        ({"seeds": [1, 2]}, "2 seeds for 1"),
        ({"stop_texts": ["."]}, "give a decode"),
        ({"stop_texts": [""], "decode": str}, "no empty text"),
    ]:
        with pytest.raises(ValueError, match=match):
            sampler.generate(model, [[1]], **{"max_new_tokens": 3, **settings})
    monkeypatch.setenv("PLUMB_DECODE", "fast")
    with pytest.raises(ValueError, match="use static or graphs"):
        sampler.generate(model, [[1]], 3)
    monkeypatch.setenv("PLUMB_DECODE", "static")
    with pytest.raises(ValueError, match="--replay-routing does not go with PLUMB_DECODE=static"):
        sampler.generate(model, [[1]], 3, keep_experts=True)
    model.mesh = Mesh(dp=2, ep=2)  # whose ranks run one forward a step, where static runs two
    with pytest.raises(ValueError, match="--ep 2 does not go with PLUMB_DECODE=static"):
        sampler.generate(model, [[1]], 3)


def test_the_command_answers_files_and_single_prompts(toy: Path, tmp_path: Path, capsys):
    """Rows keep their keys and gain a response; --prompt prints one; bad calls are refused."""
    out = tmp_path / "answers.jsonl"
    prompts = toy / "world" / "prompts_test.jsonl"
    call = ["--model", str(toy / "model"), "--max-new-tokens", "5"]
    generate.main([*call, "--data", str(prompts), "--out", str(out), "--limit", "3"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    asked = [json.loads(line) for line in prompts.read_text().splitlines()][:3]
    assert [{k: v for k, v in row.items() if k != "response"} for row in rows] == asked
    assert all(isinstance(row["response"], str) for row in rows)
    capsys.readouterr()
    generate.main([*call, "--prompt", "Where does Ada live?"])
    assert len(capsys.readouterr().out.strip().splitlines()) == 1
    with pytest.raises(ValueError, match="one of --prompt TEXT, --data FILE"):
        generate.main(call)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"text": "y"}\n')
    with pytest.raises(ValueError, match=r"row 2 of .*bad\.jsonl: no `prompt`"):
        generate.main([*call, "--data", str(tmp_path / "bad.jsonl"), "--out", str(out)])


def test_the_command_samples_n_responses_and_applies_stop_texts(toy: Path, tmp_path: Path, capsys):
    """--n gives rows "responses", --stop cuts the text before the stop text."""
    prompts, out = toy / "world" / "prompts_test.jsonl", tmp_path / "answers.jsonl"
    call = [
        "--model",
        str(toy / "model"),
        "--max-new-tokens",
        "12",
        "--data",
        str(prompts),
        "--out",
        str(out),
    ]
    generate.main([*call, "--limit", "2", "--n", "3"])
    free = [json.loads(line)["responses"] for line in out.read_text().splitlines()]
    assert [len(texts) for texts in free] == [3, 3] and len({*free[0], *free[1]}) == 6
    assert "6 answers in" in capsys.readouterr().out
    stop = free[0][0][3:5]
    generate.main([*call, "--limit", "2", "--n", "3", "--stop", stop])
    for texts, before in zip(
        (json.loads(line)["responses"] for line in out.read_text().splitlines()), free
    ):
        assert texts == [text.split(stop)[0].strip() for text in before]


def test_chat_keeps_the_conversation_and_streams(toy: Path, capsys, monkeypatch):
    """Each prompt holds the earlier turns; the samples are printed; an empty line ends the chat."""
    asked, questions = [], iter(["Where does Ada live?", "And Bo?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(questions))
    real = sampler.generate

    def listen(model, prompts, **settings):
        asked.append((prompts[0], real(model, prompts, **settings)[0].tokens))

    monkeypatch.setattr(generate, "generate", listen)
    generate.main(
        ["--model", str(toy / "model"), "--chat", "--template", "chatml", "--max-new-tokens", "8"]
    )
    tokenizer = load_tokenizer(toy / "model")
    (first, one), (second, two) = asked
    printed = capsys.readouterr().out
    assert tokenizer.decode(one) in printed and tokenizer.decode(two) in printed
    text = tokenizer.decode(second, skip_special=False)
    assert (
        "Where does Ada live?" in text
        and "And Bo?" in text
        and tokenizer.decode(one).strip() in text
    )
    assert second[: len(first)] == first and len(second) > len(first) + len(one)


def test_a_stopped_command_keeps_its_answers_and_goes_on(
    toy: Path, tmp_path: Path, capsys, monkeypatch
):
    """Ctrl-C in the third part: two parts are kept, the second call draws the rest alone, and the
    file is that of one call. Another seed starts anew; a line cut in half is drawn again."""
    monkeypatch.setattr(generate, "PART", 1)
    prompts = toy / "world" / "prompts_test.jsonl"
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    call = ["--model", str(toy / "model"), "--data", str(prompts), "--max-new-tokens", "5"]
    call += ["--batch-size", "4", "--n", "2"]
    generate.main([*call, "--out", str(whole)])
    sampler, parts, limit = generate.generate, [], [2]

    def counted(model, ids, **flags):
        if len(parts) == limit[0]:
            raise KeyboardInterrupt
        parts.append(len(ids))
        return sampler(model, ids, **flags)

    monkeypatch.setattr(generate, "generate", counted)

    def call_again(parts_at_most: int, *flags: str) -> list[int]:
        parts.clear()
        limit[0] = parts_at_most
        generate.main([*call, "--out", str(out), *flags])
        return list(parts)

    for _ in range(2):  # another seed in between does not take the first one's rows
        with pytest.raises(SystemExit) as stopped:
            call_again(2)
        assert stopped.value.code == 130 and parts == [2, 2]
        assert "stopped after 4 of 8 rows: the same command goes on" in capsys.readouterr().out
        assert call_again(9, "--seed", "1") == [2, 2, 2, 2]
        assert out.read_bytes() != whole.read_bytes()
        out.unlink()
    with pytest.raises(SystemExit):
        call_again(2)
    partial = tmp_path / ".out.jsonl.partial"
    partial.write_text(partial.read_text()[:-9])  # as a killed process leaves it
    assert call_again(9) == [2, 2, 1]
    assert out.read_bytes() == whole.read_bytes() and not partial.exists()


def test_capped_scores_of_bf16_are_not_rounded():
    """A cap bends scores as exact as the kernels have them, in sampling and in the plain twin: the
    log of the sum of weights, and outputs, against float64 of the same bf16 numbers."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 256).mul(1.6).bfloat16() for _ in range(3))
    scores = q.double() @ k.double().mT / 16
    scores = 50 * torch.tanh(scores / 50)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    wanted = scores.masked_fill(~causal, -torch.inf)
    assert wanted[wanted > -torch.inf].abs().max() > 8  # where a rounding is seen
    out, weight = partial_attention(q, k, v, ~causal, 50.0)
    assert (weight[..., 0] - wanted.logsumexp(-1)).abs().max() < 1e-5
    exact = wanted.softmax(-1) @ v.double()
    assert (out - exact).abs().max() < 2e-2
    layout = TreeLayout.from_spans([(9, [])])
    flat = (x[0].transpose(0, 1) for x in (q, k, v))
    twin = plain_attention(*flat, layout, 0, 50.0).transpose(0, 1)
    assert (twin - exact[0]).abs().max() < 2e-2  # of numbers up to 5, which are rounded once
