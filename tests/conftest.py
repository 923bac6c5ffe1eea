"""Shared by several tests: tiny transformers models, data sets by hand, small folders to train."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")  # before torch is imported
os.environ["HF_HUB_OFFLINE"] = "1"
# A torch store looks up every client's host name, 5 s each where no name server answers.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import hf
from data import toyworld
from data.dataset import Dataset
from weights.folder import save_model

REAL = Path(__file__).parents[2] / "shared" / "data"  # real rows; without it, tests are skipped
FAMILIES = (
    "llama2 llama3 mistral mistral_window qwen2 qwen2_window qwen3 gpt_neox gpt_neox_seq".split()
)


def tiny_transformers(family: str, tied: bool):
    """Return a random transformers model of a family, with 100 tokens and two layers.

    Its weights are large enough for two models to give different outputs.
    """
    import transformers as tf

    sizes = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
    }
    grouped = {**sizes, "num_key_value_heads": 2}
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 50.0,
    }
    window = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    sequential = {"use_parallel_residual": False, "hidden_act": "gelu_new"}
    config = {
        "llama": lambda: tf.LlamaConfig(**grouped),
        "llama2": lambda: tf.LlamaConfig(**sizes, attention_bias=True, mlp_bias=True),
        "llama3": lambda: tf.LlamaConfig(**grouped, rope_parameters=llama3),
        "mistral": lambda: tf.MistralConfig(**grouped, sliding_window=None, head_dim=16),
        "mistral_window": lambda: tf.MistralConfig(**grouped, sliding_window=7),
        "qwen2": lambda: tf.Qwen2Config(**grouped),
        "qwen2_window": lambda: tf.Qwen2Config(**grouped, **window),
        "qwen3": lambda: tf.Qwen3Config(**grouped, head_dim=16),
        "gpt_neox": lambda: tf.GPTNeoXConfig(**sizes),
        "gpt_neox_seq": lambda: tf.GPTNeoXConfig(**sizes, **sequential),
    }[family]()
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, p in model.named_parameters():
        if p.dim() == 1:  # norms and biases, which start as ones and zeros
            p.data += 0.3 * torch.randn_like(p) if "norm" in name else 0.1 * torch.randn_like(p)
    return model


def dataset_of(trees: list[tuple[list[int], list[list[int]]]], **columns: list[float]) -> Dataset:
    """Return a data set in memory from one (prompt, responses) of ids a tree, all tokens scored."""
    tokens: list[int] = []
    scored: list[int] = []
    tree_start = [0]
    response_start = [0]
    response_len: list[int] = []
    for prompt, responses in trees:
        tokens += prompt
        scored += [0] * len(prompt)
        for response in responses:
            tokens += response
            scored += [1] * len(response)
            response_len.append(len(response))
        tree_start.append(len(tokens))
        response_start.append(len(response_len))
    return Dataset(
        tokens=np.array(tokens, np.int32),
        scored=np.array(scored, np.uint8),
        tree_start=np.array(tree_start),
        prompt_len=np.array([len(prompt) for prompt, _ in trees], np.int32),
        response_start=np.array(response_start),
        response_len=np.array(response_len, np.int32),
        columns={name: np.array(values, np.float32) for name, values in columns.items()},
        key="in memory",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of tests/ranks/ and tests/e2e/ by the name of their folder."""
    for item in items:
        if item.path.parent.name in ("ranks", "e2e"):
            item.add_marker(item.path.parent.name)


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """Return a folder with a small toy world, world/, and a random Llama for it, model/."""
    folder = tmp_path_factory.mktemp("toy")
    counts = {
        "base": 40,
        "sft": 60,
        "preferences": 48,
        "preferences_test": 16,
        "labels": 48,
        "attributes": 60,
        "attributes_test": 16,
        "prompts_test": 8,
    }
    words = []
    for name, n in counts.items():
        words += [f"--{name.replace('_', '-')}", str(n)]
    toyworld.main(["make", "--out", str(folder / "world"), *words])
    save_tiny_llama(folder / "model", folder / "world" / "tokenizer", std=0.2)
    return folder


@pytest.fixture(scope="session")
def real_model(tmp_path_factory) -> Path:
    """Return the folder of a random tiny Llama with the Llama-2 tokenizer."""
    real = REAL / "llama2_tokenizer.model"
    if not real.exists():
        pytest.skip("shared/data is absent")
    folder = tmp_path_factory.mktemp("real")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.model").write_bytes(real.read_bytes())
    save_tiny_llama(folder / "model", folder / "tokenizer", std=0.15)
    return folder / "model"


def save_tiny_llama(folder: Path, tokenizer: Path, std: float) -> None:
    """Save a random Llama of width 32 and two layers, with a tokenizer."""
    flags = hf.New(width=32, layers=2, heads=4, kv_heads=2, std=std, tokenizer=str(tokenizer))
    save_model(hf.new_model(flags), folder, flags.tokenizer)


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Give every test the handlers of a foreground process: a script's main sets its own.

    A suite that a shell starts in the background inherits an ignored SIGINT.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return (yield)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture
def train():
    """Return a function that runs a script's main in this process and returns its metrics."""

    def run(script, out: Path, **flags) -> list[dict]:
        words = []
        for name, value in flags.items():
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        script.main(["--out", str(out), *words])
        return read_metrics(out)

    return run


def read_metrics(out: Path) -> list[dict]:
    """Return the rows of metrics.jsonl without times and memory, which differ from run to run."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not any(w in k for w in ("second", "memory"))}
        for row in rows
    ]


@pytest.fixture
def engine(toy: Path):
    """Start stand-ins of a sampling server on the toy model: engine() or engine("vllm")."""
    from standin import StandIn

    started = []

    def start(form: str = "token_ids") -> StandIn:
        started.append(StandIn(toy / "model", form))
        return started[-1]

    yield start
    for stand_in in started:
        stand_in.die()
