"""plumb with vLLM itself, on the CPU: `make test-engine`.

PLUMB_VLLM is the interpreter of an environment that has vLLM; without it all tests are skipped.
PLUMB_ENGINE_FAMILIES=all tries every family that `hf.py new` makes, a server each; else two.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

import best_of_n
import hf
import score
import train_ppo
import train_reinforce
from config import RolloutConfig
from data import toyworld
from data.dataset import from_trees
from data.templates import Template
from data.tokenizer import load_tokenizer
from sampling import transfer
from sampling.engine import Engine
from sampling.rewards import load_reward
from sampling.sampler import generate
from sampling.scoring import score_trees
from weights import families
from weights.folder import load_model

ROOT = Path(__file__).parents[2]
VLLM = os.environ.get("PLUMB_VLLM", "")
FAMILIES = ["llama", "qwen3"]
if os.environ.get("PLUMB_ENGINE_FAMILIES") == "all":
    FAMILIES = list(get_args(get_type_hints(hf.New)["family"]))
CLOSE = 1e-4  # nats: two fp32 programs
pytestmark = pytest.mark.skipif(not VLLM, reason="PLUMB_VLLM names no interpreter that has vLLM")


class Vllm:
    """A vLLM server on a folder, in a process group of its own."""

    def __init__(self, folder: Path, log: Path, *flags: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        self.command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32"]
        self.command += ["--enforce-eager", "--max-model-len", "256", *flags]
        self.log = log
        self.start()

    def start(self) -> None:
        settings = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=output,
                env={**os.environ, **settings},
                start_new_session=True,
            )
        deadline = time.monotonic() + 300
        while not self.answers():
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.5)

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/v1/models", timeout=5).read()
        except OSError:
            return False
        return True

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    toyworld.main(["make", "--out", str(folder / "world")])
    return folder


def make_model(world: Path, family: str, seed: int = 0) -> Path:
    """Make a random model that vLLM's kernels for CPUs take: heads of at least 32 numbers."""
    folder = world / f"{family}_{seed}"
    if not folder.exists():
        sizes = "--width 64 --layers 2 --heads 2 --std 0.2"
        words = f"new --out {folder} --family {family} --seed {seed} {sizes}".split()
        for flag, key, size in (
            ("--kv-heads", "num_key_value_heads", 2),
            ("--head-size", "head_dim", 32),
        ):
            if families.reads(family, key):
                words += [flag, str(size)]
        words += ["--tied"] * (family == "gemma2")  # vLLM knows no other
        hf.main([*words, "--tokenizer", str(world / "world" / "tokenizer")])
    return folder


@pytest.fixture(scope="module")
def llama(world: Path):
    server = Vllm(make_model(world, "llama"), world / "vllm.log", "--enable-lora")
    yield server
    server.kill()


def flags_of(world: Path, server: Vllm, steps: int, **more) -> dict:
    return {
        "model": world / "llama_0",
        "data": world / "world" / "sft.jsonl",
        "batch_size": 4,
        "group_size": 3,
        "max_new_tokens": 12,
        "max_steps": steps,
        "reward": "length:5",
        "rollout_url": [server.url],
        "log_samples": 1,
        **more,
    }


def plumbs_logps(folder: Path, ids: list[int]) -> torch.Tensor:
    """Return the log-prob of every token but the first, as plumb computes it in fp32."""
    model = load_model(folder, torch.float32)
    trees = from_trees(
        [(ids[:1], [(ids[1 : k + 1], [0] * (k - 1) + [1])]) for k in range(1, len(ids))]
    )
    return torch.tensor([float(x[0]) for x in score_trees(model, trees)])


def distance(server: Vllm, folder: Path, template: Template) -> float:
    """Return the largest distance of a fixed text's log-probs between the server and plumb."""
    ids = template.prompt("Where does a duck sleep?") + list(range(40, 60))
    engine = Engine(template, RolloutConfig(rollout_url=[server.url]), learns=False)
    theirs = torch.tensor(engine.servers[0].logps(ids))
    return (theirs - plumbs_logps(folder, ids)).abs().max().item()


# ---- every family ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_log_probs_are_plumbs_own(family: str, world: Path, llama: Vllm):
    """Tokens equal those of generate.py; log-probs of a text and of sampled tokens are close."""
    folder = make_model(world, family)
    template = Template("auto", load_tokenizer(folder))
    prompts = [template.prompt(text) for text in ("Where does a duck sleep?", "What is a hen?")]
    model = load_model(folder, torch.float32)
    server = llama if family == "llama" else Vllm(folder, world / f"{family}.log")
    try:
        engine = Engine(
            template, RolloutConfig(rollout_url=[server.url], max_new_tokens=24), learns=False
        )
        own = generate(model, prompts, 24, 0.0, stop_ids=template.stop_ids)
        theirs = engine.sample(prompts, [1, 2], 1, 0.0)
        assert [s.tokens for s in theirs] == [s.tokens for s in own]
        gaps = [
            abs(a - b) for x, y in zip(theirs, own) for a, b in zip(x.policy_logps, y.policy_logps)
        ]
        far = distance(server, folder, template)
        print(f"{family}: {max(gaps):.1e} nats in sampled tokens, {far:.1e} in a text")
        assert max(gaps) < CLOSE and far < CLOSE
    finally:
        if server is not llama:
            server.kill()


# ---- judging -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "/v1/completions"])
def test_a_server_judges_as_its_weights_do(path: str, world: Path, llama: Vllm, tmp_path: Path):
    """The value of an answer, by hand from the next token's log-probs as plumb computes them."""
    folder = world / "llama_0"
    Engine(ready(world), config_of(world, llama)).load(folder)
    tokenizer = load_tokenizer(folder)
    question = "How good is this answer to {prompt}? {response}"
    asked = question.format(prompt="Where does a duck sleep?", response="In a barn.")
    template = Template("auto", tokenizer)
    ids = list(tokenizer.encode(asked)) if path else template.prompt(asked)
    vocabulary = range(tokenizer.size)
    trees = from_trees([(ids, [([token], [1]) for token in vocabulary])])
    logps = score_trees(load_model(folder, torch.float32), trees, 8192)[0]
    likeliest = sorted(vocabulary, key=lambda token: -logps[token])[:20]
    chances: dict[str, float] = {}
    for token in likeliest:
        text = tokenizer.decode([token]).strip()
        chances[text] = chances.get(text, 0.0) + float(np.exp(logps[token]))
    labels = [text for text in chances if text.isalpha()]
    pair = next((a, b) for a in labels for b in labels if a[0] != b[0])
    worth = dict(zip(pair, (1.0, 5.0)))
    file = tmp_path / "judge.json"
    file.write_text(json.dumps({"question": question, "labels": worth}))
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "Where does a duck sleep?", "response": "In a barn."}
    rows.write_text(json.dumps(row))
    words = f"--judge {file} --data {rows} --out {tmp_path}/out.jsonl"
    score.main(["--model", llama.url + path, *words.split()])
    value = json.loads((tmp_path / "out.jsonl").read_text())["score"]
    mass = sum(chances[text] for text in pair)
    assert value == pytest.approx(sum(chances[x] * worth[x] for x in pair) / mass, abs=CLOSE)
    reward = load_reward(f"judge:{llama.url}{path}:{file}", None)
    (again,) = reward([row["prompt"]], [row["response"]], [{}], [None])
    assert again == pytest.approx(value, abs=1e-6)


def test_messages_over_nccl_have_vllms_fields(world: Path, monkeypatch):
    """vLLM's own classes take what sampling/transfer.py sends; its functions are as called."""
    sent: dict[str, dict] = {}

    def request(path: str, body: dict | None) -> dict:
        sent[path] = body or {}
        return {"world_size": 1}

    class Group:
        device = torch.device("cpu")

        def broadcast(self, tensor: torch.Tensor, src: int) -> None:
            pass

    monkeypatch.setattr(transfer, "_communicator", lambda: lambda place: Group())
    transfer.Link("http://127.0.0.1:1", request).send(make_model(world, "llama"))
    code = f"""
import inspect, json
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.weight_transfer import nccl_common, nccl_engine
from vllm.entrypoints.rl.online import api_router
sent = json.loads({json.dumps(sent)!r})
info = sent["/init_weight_transfer_engine"]["init_info"]
joined = nccl_common.NCCLWeightTransferInitInfo(**info)
assert (joined.rank_offset, joined.world_size, joined.packed) == (1, 2, False)
nccl_engine.NCCLWeightTransferUpdateInfo(**sent["/update_weights"]["update_info"])
inspect.signature(nccl_common.trainer_init).bind({{}})
inspect.signature(PyNcclCommunicator.broadcast).bind(None, None, src=0)
assert {{"master_address", "master_port", "world_size"}} <= info.keys()
paths = {{route.path for route in api_router.router.routes}}
assert set(sent) <= paths, set(sent) - paths
"""
    subprocess.run([VLLM, "-c", code], check=True, timeout=300)


# ---- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "lora"), [(train_reinforce, 0), (train_ppo, 0), (train_reinforce, 4)]
)
def test_the_server_has_the_trainers_weights_after_every_update(
    script, lora: int, world: Path, llama: Vllm, tmp_path: Path, train, monkeypatch
):
    """Ten steps; after each update a fixed text has the same log-probs in both."""
    template = Template("auto", load_tokenizer(world / "llama_0"))
    seen = []
    load = Engine.load

    def load_and_compare(engine: Engine, folder: Path):
        answer = load(engine, folder)
        if not lora:
            seen.append(distance(llama, folder, template))
        return answer

    monkeypatch.setattr(Engine, "load", load_and_compare)
    flags = flags_of(world, llama, 10, lr=1e-3, lora=lora)
    rows = train(script, tmp_path / "out", **flags)
    gaps = [row["sampler_gap"] for row in rows]
    print(f"sampler_gap at most {max(gaps):.1e}; fixed text at most {max(seen, default=0):.1e}")
    assert len(gaps) == 10 and max(gaps) < CLOSE
    assert lora or (len(seen) == 10 and max(seen) < CLOSE)


def test_rejection_sampling_draws_from_the_server(world: Path, llama: Vllm, tmp_path: Path):
    """Ten batches of prompts; the server must have --model's weights, which is checked."""
    Engine(ready(world), config_of(world, llama)).load(world / "llama_0")  # as after a restart
    words = f"--model {world}/llama_0 --data {world}/world/sft.jsonl --prompts 20 --batch-size 2"
    words += f" --max-new-tokens 12 --group-size 4 --reward length:5 --out {tmp_path}/best"
    best_of_n.main([*words.split(), "--rollout-url", llama.url])
    rows = [
        json.loads(line) for line in (tmp_path / "best" / "kept.jsonl").read_text().splitlines()
    ]
    assert rows and all(row["response_ids"] for row in rows)
    Engine(ready(world), config_of(world, llama)).load(make_model(world, "llama", seed=5))
    with pytest.raises(ValueError, match="wrong server"):
        best_of_n.main([*words.split(), "--rollout-url", llama.url, "--out", f"{tmp_path}/wrong"])


def ready(world: Path) -> Template:
    return Template("auto", load_tokenizer(world / "llama_0"))


def config_of(world: Path, server: Vllm) -> RolloutConfig:
    return RolloutConfig(model=str(world / "llama_0"), rollout_url=[server.url])


# ---- faults, by real signals -------------------------------------------------------------------


def test_a_prompt_that_does_not_fit_is_refused_before_step_1(world, llama, tmp_path, train):
    flags = flags_of(world, llama, 2, max_new_tokens=250)
    with pytest.raises(ValueError, match="takes 256 tokens, .*--max-model-len"):
        train(train_reinforce, tmp_path / "out", **flags)


@pytest.mark.parametrize("fault", ["hangs", "is killed", "restarts"])
def test_a_run_outlives_its_server(
    fault: str, world: Path, llama: Vllm, tmp_path: Path, train, monkeypatch, capsys
):
    """A hang or a death ends the run in one line, and it goes on where it was; a restart with the
    weights of step 0 is noticed and mended."""
    load = Engine.load
    loads = []

    def load_and_break(engine: Engine, folder: Path):
        answer = load(engine, folder)
        loads.append(folder)
        if len(loads) == 4:
            llama.signal(signal.SIGSTOP if fault == "hangs" else signal.SIGKILL)
            if fault == "restarts":
                llama.process.wait()
                llama.start()
        return answer

    monkeypatch.setattr(Engine, "load", load_and_break)
    flags = flags_of(world, llama, 6, lr=1e-2, save_every=1, rollout_timeout=4.0)
    if fault != "restarts":
        with pytest.raises(OSError, match="v1/completions: no answer in 4 tries .* server up"):
            train(train_reinforce, tmp_path / "out", **flags)
        llama.signal(signal.SIGCONT)
        if fault == "is killed":
            llama.process.wait()
            llama.start()
    flags["rollout_timeout"] = 60.0
    rows = train(train_reinforce, tmp_path / "out", **flags, resume="auto")
    assert ("was restarted" in capsys.readouterr().out) == (fault == "restarts")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["sampler_gap"] < CLOSE for row in rows)
    samples = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == sorted([1, 2, 3, 4, 5, 6] * 12)
