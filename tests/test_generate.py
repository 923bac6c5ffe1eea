"""Law 6: cached generation equals naive generation; a sample does not depend on its batch."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dataset_of, tiny_transformers

import generate
import hf
from data.trees import make_batch

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [3, 4], [20, 21, 22, 23, 24]]


def model_of(family: str, folder: Path):
    tiny_transformers(family, False).save_pretrained(folder)
    return hf.load_model(folder, torch.float64)


def next_logp(model, ids: list[int]) -> torch.Tensor:
    """Log-probs of the next token, without a cache."""
    batch = make_batch(dataset_of([(ids, [[0]])]), [0])
    return model.logits(model(batch), torch.tensor([len(ids) - 1]))[0].log_softmax(-1)


@pytest.mark.parametrize("family", ["llama3", "mistral_window", "qwen3", "gpt_neox"])
def test_greedy_equals_the_naive_loop_and_transformers(family: str, tmp_path: Path):
    """Token for token the argmax of a fresh forward over the whole text, and of transformers' generate."""
    model = model_of(family, tmp_path)
    theirs = tiny_transformers(family, False)
    answers = generate.generate(model, PROMPTS, 12, temperature=0, stop_ids={99}, batch_size=3)
    for prompt, answer in zip(PROMPTS, answers):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and ids[-1] != 99:
            with torch.no_grad():
                ids.append(int(next_logp(model, ids).argmax()))
        assert answer.tokens == ids[len(prompt) :] and answer.ended == (ids[-1] == 99)
        out = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=99, pad_token_id=0
        )
        assert answer.tokens == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["llama3", "mistral_window"])
def test_samples_and_their_logps_do_not_depend_on_the_batch(family: str, tmp_path: Path):
    """Batch size 1 or 4: the same tokens; their log-probs are those of a fresh forward under the same temperature."""
    model = model_of(family, tmp_path)
    prompts = PROMPTS + [[30 + i] * (1 + i % 4) for i in range(7)]
    one, four = (
        generate.generate(model, prompts, 10, temperature=0.7, stop_ids=set(range(0, 90, 7)), seed=1, batch_size=size)
        for size in (1, 4)
    )
    assert [a.tokens for a in one] == [a.tokens for a in four]
    assert len({len(a.tokens) for a in one}) > 4  # they end one by one, so rows are dropped from the batch
    for prompt, a, b in zip(prompts, one, four):
        assert np.allclose(a.logps, b.logps, atol=1e-10)
        for i, token in enumerate(a.tokens):
            with torch.no_grad():
                logp = (next_logp(model, prompt + a.tokens[:i]) / 0.7).log_softmax(-1)[token].item()
            assert a.logps[i] == pytest.approx(logp, abs=1e-9)
    other = generate.generate(model, prompts, 10, temperature=0.7, seed=2)
    assert [a.tokens for a in other] != [a.tokens for a in one]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.5, 3, 1.0), (1.0, 0, 0.7)]
)
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float):
    """Chi-square of 40,000 draws against the softmax after temperature, top-k and top-p, all written out here."""
    logits = torch.tensor([1.0, 2.0, 0.5, -1.0, 1.7, 0.0], dtype=torch.float64)
    p = np.exp(logits.numpy() / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    keep = order[: top_k or None]
    if top_p < 1:
        keep = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
    wanted = np.zeros(6)
    wanted[keep] = p[keep] / p[keep].sum()
    n = 40_000
    uniform = torch.tensor(np.random.default_rng(0).random(n))
    tokens, logps, _ = generate.sample(logits.expand(n, -1), uniform, temperature, top_k, top_p)
    counts = Counter(tokens.tolist())
    assert set(counts) == set(keep.tolist())
    chi = sum((counts[t] - n * wanted[t]) ** 2 / (n * wanted[t]) for t in keep)
    assert chi < 25  # five degrees of freedom at most: one in ten thousand
    assert torch.allclose(logps, torch.tensor(np.log(wanted[tokens.numpy()])), atol=1e-12)


def test_impossible_requests_are_refused(tmp_path: Path):
    """Empty prompts and settings that cannot be."""
    model = model_of("llama", tmp_path)
    with pytest.raises(ValueError, match="no token to go on from"):
        generate.generate(model, [[1], []], 3)
    with pytest.raises(ValueError, match="temperature >= 0"):
        generate.generate(model, [[1]], 3, temperature=-1)


def test_the_command_writes_a_row_for_every_row(toy: Path, tmp_path: Path, capsys):
    """Rows keep their keys and gain a response; one prompt is answered on the screen; bad calls are refused."""
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
    with pytest.raises(ValueError, match="row 2 of .*bad.jsonl has no prompt"):
        generate.main([*call, "--data", str(tmp_path / "bad.jsonl"), "--out", str(out)])
