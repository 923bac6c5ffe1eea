"""--replay-routing: training takes the experts that sampling chose.

Faults that these tests are for: experts of another token, layer or sample; those of a prompt left
out; weights of the chosen experts that are not the router's; a critic or a reference that replays.
"""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dataset_of
from forked import Ranks, kill_all
from launch import launch
from standin import StandIn

import hf
import train_ppo
import train_reinforce
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.trees import make_batch
from model import GPT
from parallel import init_mesh
from routing import Routing
from sampling.engine import Engine
from sampling.rollout import trees
from sampling.sampler import generate
from sampling.source import make_sampler
from weights.config_json import model_config
from weights.folder import load_model, save_model

PROMPTS = [[1, 5, 9, 12], [1, 30], [1, 7, 8, 2, 40, 41]]


@pytest.fixture(autouse=True)
def nobody_stays():
    """Kill ranks that a failed test has left behind."""
    yield
    kill_all()


@pytest.fixture(scope="module")
def sparse(toy: Path, tmp_path_factory) -> Path:
    """Return a folder with models of three sparse layers, in two dtypes."""
    home = tmp_path_factory.mktemp("sparse")
    (home / "world").symlink_to(toy / "world")
    files = {"tokenizer": str(toy / "world/tokenizer")}
    sizes = {"heads": 4, "kv_heads": 2, "ffn": 9, "expert_ffn": 7}
    small = {"width": 16, "layers": 3, "experts": 6, "active": 2, "std": 0.4}
    close = {"width": 64, "layers": 6, "experts": 16, "active": 4, "std": 0.05}  # rounding decides
    for dtype, flags in (("fp64", small), ("bf16", close)):
        new = hf.New(family="qwen3_moe", dtype=dtype, out="", **files, **sizes, **flags)
        save_model(hf.new_model(new), home / dtype, new.tokenizer)
    return home


@pytest.mark.parametrize(("n", "rows"), [(1, 8), (3, 2), (2, 4)])
def test_sampling_keeps_what_every_layer_chose(sparse: Path, n: int, rows: int):
    """In float64 a forward of the samples' trees chooses the same, token by token and layer."""
    model = load_model(sparse / "fp64", torch.float64)
    many = [[*prompt, *range(3, 90)] for prompt in PROMPTS] if n == 2 else PROMPTS  # stored once
    samples = generate(model, many, 7, seed=1, n=n, batch_size=rows, keep_experts=True)
    data = trees(many, samples)
    batch = make_batch(data, list(range(len(many))))
    seen: list[torch.Tensor] = []
    forward = GPT.fixed_experts

    def watch(self, batch):
        return None

    GPT.fixed_experts = watch
    try:
        run = GPT.run

        def recorded(self, tokens, view, x=None):
            view.routing = Routing(None, chosen=seen)
            return run(self, tokens, view, x)

        GPT.run = recorded
        model(batch)
    finally:
        GPT.fixed_experts, GPT.run = forward, run
    wanted = torch.stack(seen, 1)  # (T, L, K)
    known = (batch.experts >= 0).all(-1).all(-1)
    assert torch.equal(batch.experts[known].long(), wanted[known])
    lasts = set(batch.last.tolist())  # of each response: sampled, and never fed
    assert set((~known).nonzero()[:, 0].tolist()) == lasts


def logps(folder: Path, sizes: dict) -> list[float]:
    """Return the log-probs of some trees with experts drawn at random, under a layout."""
    model = load_model(folder / "fp64", torch.float64, mesh=init_mesh(**sizes))
    data = dataset_of([(prompt, [[40, 41, 42], [50, 2]]) for prompt in PROMPTS])
    draws = np.random.default_rng(0).permuted(
        np.tile(np.arange(6), (len(data.tokens), 3, 1)), axis=-1
    )
    data.experts = draws[..., :2].astype(np.int16)
    batch = make_batch(data, [0, 1, 2])
    plain = model.logps(model(batch), batch)
    model.replays = True
    replayed = model.logps(model(batch), batch)
    assert (replayed - plain).abs().max() > 0.1
    return replayed.tolist()


def test_replayed_log_probs_do_not_depend_on_the_layout(sparse: Path):
    """One process, tensor, context and expert parallel: within 1e-10 in float64."""
    (wanted,) = launch(1, logps, sparse, {})
    for sizes in ({"tp": 2}, {"cp": 2}, {"ep": 2}):
        for ours in launch(2, logps, sparse, sizes):
            assert np.abs(np.subtract(ours, wanted)).max() < 1e-10


def train(
    script, sparse: Path, out: Path, *words: str, ranks: int = 1, dtype: str = "fp64"
) -> list:
    """Run two steps of a script; return the rows of its metrics."""
    flags = f"--model {sparse}/{dtype} --data {sparse}/world/sft.jsonl --out {out} --dtype {dtype}"
    flags += " --reward length:5 --max-steps 2 --batch-size 4 --group-size 4 --max-new-tokens 12"
    flags += " --lr 1e-2 --log-samples 0"
    argv = [*flags.split(), *words]
    run = Ranks(ranks, lambda rank: script.main(argv), out.parent / f"{out.name}_logs")
    assert run.wait() == [0] * ranks, run.text(0)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps(rows: list[dict], key: str) -> list[float]:
    return [row[key] for row in rows if key in row]


@pytest.mark.slow
def test_replay_changes_nothing_but_rounding(sparse: Path, tmp_path: Path):
    """In float64 REINFORCE takes the same steps with it; in bf16 the sampler's gap falls."""
    flag = "--replay-routing"
    words = ("--kl", "0.1", flag)
    plain = steps(train(train_reinforce, sparse, tmp_path / "plain", "--kl", "0.1"), "grad_norm")
    taken = steps(train(train_reinforce, sparse, tmp_path / "replay", *words), "grad_norm")
    assert np.allclose(plain, taken, rtol=1e-10)
    stages = train(train_reinforce, sparse, tmp_path / "pp", *words, "--pp", "2", ranks=2)
    assert np.allclose(steps(stages, "grad_norm"), taken, rtol=1e-10)
    half = {}
    for words in ((), (flag,)):
        more = ("--max-steps", "1", "--max-new-tokens", "40", *words)
        rows = train(train_reinforce, sparse, tmp_path / f"half{len(words)}", *more, dtype="bf16")
        half[words] = steps(rows, "sampler_gap")[0]
    assert half[(flag,)] < 0.99 * half[()]


def test_what_has_no_experts_to_replay_is_refused(sparse: Path, toy: Path, tmp_path: Path):
    """A dense model."""
    argv = f"--model {toy}/model --data {sparse}/world/sft.jsonl --reward length:5 --max-steps 1"
    argv += f" --max-new-tokens 8 --out {tmp_path / 'o'} --replay-routing"
    run = Ranks(1, lambda rank: train_reinforce.main(argv.split()), tmp_path / "logs")
    assert run.wait() != [0]
    assert "is for mixtures of experts" in run.text(0)


# ---- the experts of a server ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def glm(toy: Path, tmp_path_factory) -> Path:
    """Return a model of three layers whose first is dense."""
    home, tokenizer = tmp_path_factory.mktemp("glm"), str(toy / "world/tokenizer")
    sizes = {"width": 16, "layers": 3, "heads": 2, "experts": 6, "expert_ffn": 7, "std": 0.4}
    model = hf.new_model(hf.New(family="glm4_moe", tokenizer=tokenizer, **sizes))
    raw = {**model.hf_config, "first_k_dense_replace": 1}
    model = GPT(model_config(raw, "glm4_moe"))
    model.init_weights(0, 0.4)
    model.hf_config = raw
    save_model(model, home / "model", tokenizer)
    return home / "model"


@pytest.fixture
def server(glm: Path) -> Iterator[StandIn]:
    server = StandIn(glm, "vllm")
    yield server
    server.die()


def settings(glm: Path, url: str, out: Path) -> train_reinforce.Config:
    """Return the flags of a run that replays what a server chose."""
    sizes = dict(max_new_tokens=7, min_new_tokens=0)
    return train_reinforce.Config(
        model=str(glm), out=str(out), rollout_url=[url], replay_routing=True, **sizes
    )


def test_experts_of_a_server_are_those_of_its_weights(glm: Path, server: StandIn, tmp_path: Path):
    """They are those that the same draws choose here, token by token, of the sparse layers."""
    model = load_model(glm, torch.float32)
    template, config = Template("auto", load_tokenizer(glm)), settings(glm, server.url, tmp_path)
    engine = Engine(template, config)
    drawn = make_sampler(model, template, config, engine)(PROMPTS, [11, 12, 21, 22, 31, 32], 2, 1.0)
    stops = {"stop_ids": template.stop_ids, "keep_experts": True}
    for i, prompt in enumerate(PROMPTS):
        seed = 10 * i + 11
        here = generate(model, [prompt], 7, 1.0, n=2, seeds=[seed, seed + 1], **stops)
        for ours, theirs in zip(here, drawn[2 * i : 2 * i + 2], strict=True):
            assert theirs.tokens == ours.tokens
            assert np.array_equal(theirs.experts, ours.experts)
        assert np.array_equal(drawn[2 * i].prompt_experts, here[0].prompt_experts)
        assert drawn[2 * i + 1].prompt_experts is None
    batch = make_batch(trees(PROMPTS, drawn), [0, 1, 2])
    assert batch.experts.shape == (len(batch.tokens), 2, 2)  # the tokens, their sparse layers


class Trap:
    """An object that leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def npy(table: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, table)
    return base64.b64encode(file.getvalue()).decode()


def test_experts_that_cannot_be_are_refused(
    glm: Path, server: StandIn, tmp_path: Path, monkeypatch
):
    """None, other numbers of tokens, layers or experts, no array, or one that would run code."""
    model = load_model(glm, torch.float32)
    template, config = Template("auto", load_tokenizer(glm)), settings(glm, server.url, tmp_path)
    sampler = make_sampler(model, template, config, Engine(template, config))
    trap = np.array([Trap(tmp_path / "ran")], dtype=object)
    bad = {
        npy(np.zeros((3, 3, 2), np.uint8)): "the experts of 3 tokens, for 4 of the prompt",
        npy(np.zeros((90, 3, 2), np.uint8)): "the experts of 90 tokens",
        npy(np.zeros((6, 4, 2), np.uint8)): "and 4 layers; the policy has 6, 2 and 3",
        npy(np.zeros((6, 3, 1), np.uint8)): "does it serve the policy",
        npy(np.full((6, 3, 2), 6, np.uint8)): "the server has 7 experts",
        npy(np.full((6, 3, 2), -1)): "experts from -1 to -1",
        npy(np.zeros((6, 3, 2), np.float32)): "an array of float32",
        npy(trap): "cannot be read",
        "what?": "cannot be read",
        base64.b64encode(b"what").decode(): "cannot be read",
    }
    for text, words in bad.items():
        monkeypatch.setattr(server, "routed", lambda *_, text=text: text)
        with pytest.raises((OSError, ValueError), match=words):
            sampler([PROMPTS[0]], [1], 1, 1.0)
    assert not (tmp_path / "ran").exists()
    server.silent = True
    with pytest.raises(OSError, match="start vLLM with --enable-return-routed-experts"):
        sampler([PROMPTS[0]], [1], 1, 1.0)


def test_a_run_replays_what_a_server_chose(
    sparse: Path, glm: Path, server: StandIn, tmp_path: Path
):
    """Two steps with new weights each: the sampler's gap is that of rounding."""
    argv = f"--model {glm} --data {sparse}/world/sft.jsonl --out {tmp_path / 'out'} --device cpu"
    argv += " --reward length:5 --max-steps 2 --batch-size 4 --group-size 4 --max-new-tokens 12"
    argv += f" --lr 1e-2 --rollout-url {server.url} --replay-routing --balance-bias 0.01"
    train_reinforce.main(argv.split())
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert len(server.loaded) == 3  # at its start, and before each step
    gaps = steps(rows, "sampler_gap")
    assert len(gaps) == 2 and max(gaps) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "layout", "words"),
    [
        (train_reinforce, "--ep 2", []),
        (train_reinforce, "--ep 2 --zero 3", ["--replay-routing"]),
        (train_ppo, "--ep 2", ["--replay-routing"]),
    ],
)
def test_sampling_with_shared_experts_is_that_of_one_process(
    script, layout: str, words: list[str], sparse: Path, tmp_path: Path
):
    """Two ranks with half of the experts each draw and learn the same, even where one is idle."""
    words = [*words, "--kl", "0.1", "--batch-size", "3", "--rollout-batch", "2"]  # 2 prompts and 1
    one = train(script, sparse, tmp_path / "one", *words)
    two = train(script, sparse, tmp_path / "two", *words, *layout.split(), ranks=2)
    for key in ("reward", "kl", "grad_norm", "policy/grad_norm"):
        assert np.allclose(steps(two, key), steps(one, key), rtol=1e-9, atol=1e-12), key
