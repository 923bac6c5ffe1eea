"""Rollouts: a function of (weights, seed, step), whoever draws them; and engines that sample in our stead."""

import json
import math
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dataset_of

import train_reinforce
from data.dataset import Prompts, load_prompts
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.trees import make_batch
from parallel import Mesh
from sampling import rollout
from sampling.sampler import generate
from sampling.server import Server
from weights.folder import fingerprint, load_model


def ready(toy: Path, **flags) -> tuple:
    """(prompts of the toy world, template, config, model in float64)."""
    config = rollout.RolloutConfig(model=str(toy / "model"), max_new_tokens=12, **flags)
    template = Template("auto", load_tokenizer(toy / "model"))
    template.stop_ids = template.stop_ids | set(
        range(4, 640, 9)
    )  # or a model of random weights would never end
    prompts = load_prompts(
        [toy / "world" / "prompts_test.jsonl"], template, 100, log=lambda line: None
    )
    return prompts, template, config, load_model(toy / "model", torch.float64)


def words(prompts: list, texts: list[str], rows: list[dict], trees) -> np.ndarray:
    assert len(prompts) == len(texts) == len(rows) == len(trees.response_len)
    assert all(row["prompt"] == prompt for row, prompt in zip(rows, prompts))
    return np.array([float(len(text)) for text in texts])


def test_a_token_column_follows_its_token():
    """Values of scored tokens come out beside their targets whatever is packed, shared or left out."""
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
        batch = make_batch(data, examples, share, only)
        assert (
            batch.to(torch.device("cpu")).token_columns["double"].tolist()
            == (2.0 * batch.target).tolist()
        )


def test_seeds_are_the_samples_own():
    """Another seed, step, prompt or place gives another; the number of samples does not change the first ones."""
    found = [s for seed in (0, 1) for step in (0, 1, 2) for s in rollout.seeds(seed, step, 5, 4)]
    assert len(set(found)) == len(found) and min(found) >= 0 and max(found) < 2**63
    assert rollout.seeds(3, 7, 2, 4)[:4] == rollout.seeds(3, 7, 9, 4)[:4]


def test_a_rollout_is_its_samples_side_by_side(toy: Path):
    """Trees, texts, rewards, penalty and metrics belong together, sample by sample."""
    prompts, template, config, model = ready(toy, no_eos_penalty=0.5, rollout_batch=5)
    prompts = prompts.take([3, 1, 4])
    own = rollout.seeds(0, 1, 3, 4)
    found = rollout.collect(
        prompts, rollout.local(model, template, config), words, template, config, Mesh(), own, 1.0
    )
    assert len(found.samples) == 12 and found.data.columns == {} and len(found.data) == 3
    assert 0 < found.ended.sum() < 12
    for i, sample in enumerate(found.samples):
        tree = i // 4
        start = found.data.tree_start[tree] + found.data.prompt_len[tree]
        start += found.data.response_len[4 * tree : i].sum()
        assert found.data.tokens[start : start + len(sample.tokens)].tolist() == sample.tokens
        assert found.texts[i] == template.tokenizer.decode(sample.tokens).strip()
        assert found.rewards[i] == len(found.texts[i]) - 0.5 * (not sample.ended)
        alone = generate(
            model, [prompts.ids[tree]], 12, stop_ids=template.stop_ids, n=1, seeds=[own[i]]
        )[0]
        assert alone.tokens == sample.tokens and alone.ended == found.ended[i]
    row = found.metrics()
    assert (
        row["reward"] == pytest.approx(found.rewards.mean())
        and row["completions/ended"] == found.ended.mean()
    )
    assert row["completions/mean_length"] == np.mean([len(s.tokens) for s in found.samples])
    # What the sampler says of its samples is what the path of training says of them.
    bins = [[2], [0, 1]]
    logps = rollout.token_logps(model, found.data, bins, config)
    assert logps.tolist() == pytest.approx(found.logps.tolist(), abs=1e-9)
    assert found.metrics()["frac_reward_zero_std"] == np.mean(
        [len(set(g)) == 1 for g in found.rewards.reshape(3, 4)]
    )


def test_two_ranks_draw_what_one_draws(toy: Path):
    """Each of two ranks draws its share; put together in any order it is the rollout of one rank."""
    prompts, template, config, model = ready(toy)
    prompts, own = prompts.take(range(5)), rollout.seeds(0, 1, 5, 2)
    sample = rollout.local(model, template, config)
    alone = rollout.collect(prompts, sample, words, template, config, Mesh(), own, 1.0)
    said: dict[int, list] = {0: [], 1: []}

    class Pair:
        tp_rank = cp_rank = 0
        dp, last_stage = 2, True

        def __init__(self, rank: int, others: list | None):
            self.dp_rank, self.others, self.calls = rank, others, -1

        def everyone(self, value):
            self.calls += 1
            said[self.dp_rank].append(value)
            return [value, self.others[self.calls] if self.others else value]

    sampled = {i: s for i, s in enumerate(alone.samples)}
    odd = [
        {i: sampled[i] for i in (2, 3, 6, 7)},
        {i: float(alone.rewards[i]) for i in (2, 3, 6, 7)},
    ]
    even = [
        {i: sampled[i] for i in (0, 1, 4, 5, 8, 9)},
        {i: float(alone.rewards[i]) for i in (0, 1, 4, 5, 8, 9)},
    ]
    for rank, others in ((0, odd), (1, even)):
        found = rollout.collect(
            prompts, sample, words, template, config, Pair(rank, others), own, 1.0
        )
        assert [s.tokens for s in found.samples] == [s.tokens for s in alone.samples]
        assert (found.rewards == alone.rewards).all() and (
            found.data.tokens == alone.data.tokens
        ).all()
    for (mine, scores), (sampled, wanted) in ((said[0], even), (said[1], odd)):
        assert {i: s.tokens for i, s in mine.items()} == {
            i: s.tokens for i, s in sampled.items()
        } and scores == wanted


def test_a_group_that_may_not_fit_is_refused_at_the_start():
    """Before anything is sampled, with the number that would do."""
    prompts = Prompts([{}], ["p"], [[1] * 30])
    config = rollout.RolloutConfig(group_size=4, max_new_tokens=100, max_tokens=430)
    rollout.check(prompts, config)
    config.max_tokens = 429
    with pytest.raises(
        ValueError,
        match="may have 430 tokens, more than a micro-batch of 429: raise --max-tokens to 430",
    ):
        rollout.check(prompts, config)
    config.max_tokens, config.share_prompts = 519, False
    with pytest.raises(ValueError, match="520 tokens"):
        rollout.check(prompts, config)


# ---- a stand-in for vLLM and SGLang ----------------------------------------------------------------------------------


class Engine(ThreadingHTTPServer):
    """Serves /v1/models, /v1/completions and /reload?FOLDER with generate on a tiny model."""

    def __init__(self, folder: Path, form: str = "token_ids"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.form, self.requests, self.failures, self.loaded = form, [], [], []
        self.lock = threading.Lock()
        self.load(folder)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def load(self, folder: Path) -> None:
        self.tokenizer, self.model = (
            load_tokenizer(folder),
            load_model(folder, torch.float32),
        )
        self.loaded.append(str(folder))

    def complete(self, body: dict) -> dict:
        with self.lock:
            found = generate(
                self.model, [body["prompt"]], body["max_tokens"], body["temperature"],
                stop_ids=body["stop_token_ids"], n=body["n"], seeds=[body["seed"] + k for k in range(body["n"])],
            )  # fmt: skip
        choices = []
        for i, sample in enumerate(found):
            choice = {
                "index": i,
                "text": self.tokenizer.decode(sample.tokens),
                "finish_reason": "length",
            }
            choice["finish_reason"] = "stop" if sample.ended else "length"
            if self.form == "token_ids":
                choice |= {
                    "token_ids": sample.tokens,
                    "logprobs": {"token_logprobs": sample.policy_logps},
                }
            if self.form == "names":  # some leave the end token out
                own = slice(0, len(sample.tokens) - sample.ended)
                names = [f"token_id:{token}" for token in sample.tokens[own]]
                choice["logprobs"] = {"tokens": names, "token_logprobs": sample.policy_logps[own]}
            choices.append(choice)
        return {"choices": choices[::-1]}


class Handler(BaseHTTPRequestHandler):
    def reply(self, code: int, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        if self.path.startswith("/reload?"):
            self.server.load(Path(self.path.partition("?")[2]))
        self.reply(200, {"data": [{"id": "tiny"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((dict(self.headers), body))
        if self.server.failures:
            self.reply(self.server.failures.pop(0), {"error": "no, thanks"})
        else:
            self.reply(200, self.server.complete(body))

    def log_message(self, *args):
        pass


@pytest.fixture
def engine(toy: Path):
    servers = []

    def start(form: str = "token_ids") -> Engine:
        servers.append(Engine(toy / "model", form))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("form", ["token_ids", "names", "text"])
def test_samples_of_a_server_are_its_tokens(form: str, toy: Path, engine, capsys, monkeypatch):
    """Prompt ids go out, samples come back in order with their log-probs where given; text is tokenised again."""
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    server = engine(form)
    prompts, template, config, _ = ready(toy, rollout_url=server.url + "/v1/")
    client = Server(template, config)
    own = rollout.seeds(0, 1, 3, 2)
    ids = prompts.ids[:3]
    found = client.sample(ids, own, 2, 1.0)
    assert len(found) == 6 and client.model == "tiny"
    for i in range(3):
        seed = own[2 * i] % 2**31
        wanted = generate(
            server.model, [ids[i]], 12, stop_ids=template.stop_ids, n=2, seeds=[seed, seed + 1]
        )
        for got, sample in zip(found[2 * i : 2 * i + 2], wanted):
            assert got.ended == sample.ended
            if form == "text":
                text = template.tokenizer.decode(sample.tokens)
                assert template.tokenizer.decode(got.tokens) == text and math.isnan(got.logps[0])
            else:
                end = (
                    [template.tokenizer.eos]
                    if form == "names" and sample.ended
                    else sample.tokens[-1:]
                )
                assert got.tokens == sample.tokens[:-1] + end
                whole = form == "token_ids" or not sample.ended
                assert got.logps == sample.policy_logps if whole else math.isnan(got.logps[0])
    headers, body = server.requests[0]
    assert (
        headers["Authorization"] == "Bearer abc"
        and body["top_p"] == 1.0
        and body["model"] == "tiny"
    )
    assert (
        set(body["stop_token_ids"]) == template.stop_ids
        and body["max_tokens"] == 12
        and body["logprobs"] == 1
    )
    assert ("tokenised again" in capsys.readouterr().err) == (form == "text")
    hot = client.sample(ids[:1], own[:1], 1, 0.7)[
        0
    ]  # an engine reports the log-probs of temperature 1
    assert math.isnan(hot.logps[0])


def test_a_server_that_fails_is_asked_again_or_named(toy: Path, engine, monkeypatch):
    """Busy or broken for a moment: tried again. A refusal, no server, no http, too few samples: one clear line."""
    pauses = []
    monkeypatch.setattr(rollout.time, "sleep", pauses.append)
    server = engine()
    prompts, template, config, _ = ready(toy, rollout_url=server.url, rollout_timeout=5.0)
    client = Server(template, config)
    server.failures = [503, 429, 500]
    assert len(client.sample(prompts.ids[:1], [1], 1, 1.0)) == 1 and pauses == [1, 2, 4]
    server.failures = [503] * 4
    with pytest.raises(
        OSError, match="v1/completions: no answer in 4 tries .503: .*no, thanks.*: is the server up"
    ):
        client.sample(prompts.ids[:1], [1], 1, 1.0)
    server.failures = [400]
    with pytest.raises(OSError, match="refused: 400: .*no, thanks"):
        client.sample(prompts.ids[:1], [1], 1, 1.0)
    assert len(server.requests) == 4 + 4 + 1
    monkeypatch.setattr(server, "complete", lambda body: {"choices": []})
    with pytest.raises(OSError, match="asked for 2 samples, got 0"):
        client.sample(prompts.ids[:1], [1, 2], 2, 1.0)
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match="v1/models: no answer in 4 tries"):
        Server(template, config)
    config.rollout_url = "localhost:8000"
    with pytest.raises(ValueError, match="must begin with http"):
        Server(template, config)


def test_training_through_a_server_pushes_its_weights(toy: Path, engine, tmp_path: Path, train):
    """The engine samples from the policy of every step: its log-probs are those of the weights that were pushed."""
    server = engine()
    reload = f"{sys.executable} -c \"import urllib.request as u; u.urlopen('{server.url}/reload?{{folder}}')\""
    flags = {
        "model": toy / "model", "data": toy / "world" / "sft.jsonl", "batch_size": 4, "group_size": 3, "lr": 1e-2,
        "max_new_tokens": 8, "max_steps": 3, "reward": "length:5", "minibatches": 2, "rollout_url": server.url,
        "eval_data": toy / "world" / "prompts_test.jsonl",
    }  # fmt: skip
    rows = train(train_reinforce, tmp_path / "out", **flags, rollout_reload=reload)
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 3 and all(row["sampler_gap"] < 1e-5 for row in steps)
    assert (
        server.loaded[1:] == [str((tmp_path / "out" / "rollout").resolve())] * 5
    )  # 3 rollouts, 2 evaluations
    final, pushed = (fingerprint(tmp_path / "out" / name) for name in ("final", "rollout"))
    assert final == pushed != fingerprint(toy / "model")
    with pytest.raises(ValueError, match="without --rollout-reload"):
        train(train_reinforce, tmp_path / "none", **flags)
    with pytest.raises(OSError, match=r"--rollout-reload: .*false.* failed \(1\)"):
        train(train_reinforce, tmp_path / "false", **flags, rollout_reload="false {folder}")
    stale = train(
        train_reinforce, tmp_path / "stale", **flags, rollout_reload="true"
    )  # a command that lies
    assert [row for row in stale if "loss" in row][-1]["sampler_gap"] > 1e-3
