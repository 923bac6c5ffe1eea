"""What several tests need: tiny transformers models, hand-made data sets, small folders to train from."""

import os

from weights.folder import save_model

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import hf
from data import toyworld
from data.dataset import Dataset

REAL = Path(__file__).parents[2] / "shared" / "data"  # real rows; tests that need them skip without
FAMILIES = (
    "llama2 llama3 mistral mistral_window qwen2 qwen2_window qwen3 gpt_neox gpt_neox_seq".split()
)


def tiny_transformers(family: str, tied: bool):
    """A random transformers model of a family, 100 tokens, two layers; weights large enough to tell models apart."""
    import transformers as tf

    sizes = {
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": tied, "initializer_range": 0.3,
    }  # fmt: skip
    grouped = {**sizes, "num_key_value_heads": 2}
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 50.0,
    }  # fmt: skip
    window = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
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
        "gpt_neox_seq": lambda: tf.GPTNeoXConfig(
            **sizes, use_parallel_residual=False, hidden_act="gelu_new"
        ),
    }[family]()
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for (
        name,
        p,
    ) in model.named_parameters():  # norms and biases of a fresh model are all ones and zeros
        if p.dim() == 1:
            p.data += 0.3 * torch.randn_like(p) if "norm" in name else 0.1 * torch.randn_like(p)
    return model


def dataset_of(trees: list[tuple[list[int], list[list[int]]]], **columns: list[float]) -> Dataset:
    """A data set in memory from (prompt, responses) of token ids; every response token is scored."""
    tokens, scored, tree_start, prompt_len, response_start, response_len = [], [], [0], [], [0], []
    for prompt, responses in trees:
        tokens += prompt + [t for r in responses for t in r]
        scored += [0] * len(prompt) + [1] * sum(map(len, responses))
        prompt_len.append(len(prompt))
        response_len += map(len, responses)
        tree_start.append(len(tokens))
        response_start.append(len(response_len))
    return Dataset(
        np.array(tokens, np.int32), np.array(scored, np.uint8), np.array(tree_start), np.array(prompt_len, np.int32),
        np.array(response_start), np.array(response_len, np.int32),
        {name: np.array(values, np.float32) for name, values in columns.items()}, {}, "in memory",
    )  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of tests/ranks/ and tests/e2e/ by the name of their folder."""
    for item in items:
        if item.path.parent.name in ("ranks", "e2e"):
            item.add_marker(item.path.parent.name)


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A small toy world, a random Llama for it, and nothing trained: world/ and model/."""
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
    words = [w for name, n in counts.items() for w in (f"--{name.replace('_', '-')}", str(n))]
    toyworld.main(["make", "--out", str(folder / "world"), *words])
    flags = hf.New(
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        std=0.2,
        tokenizer=str(folder / "world" / "tokenizer"),
    )
    save_model(hf.new_model(flags), folder / "model", flags.tokenizer)
    return folder


@pytest.fixture(scope="session")
def real_model(tmp_path_factory) -> Path:
    """A random tiny Llama with the Llama-2 tokenizer."""
    if not (REAL / "llama2_tokenizer.model").exists():
        pytest.skip("shared/data is absent")
    folder = tmp_path_factory.mktemp("real")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.model").write_bytes(
        (REAL / "llama2_tokenizer.model").read_bytes()
    )
    flags = hf.New(
        width=32, layers=2, heads=4, kv_heads=2, std=0.15, tokenizer=str(folder / "tokenizer")
    )
    save_model(hf.new_model(flags), folder / "model", flags.tokenizer)
    return folder / "model"


@pytest.fixture
def train(monkeypatch):
    """Runs a script's main in this process and returns the rows of its metrics.jsonl; signal handlers are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(script, out: Path, **flags) -> list[dict]:
        words = []
        for name, value in flags.items():
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        script.main(["--out", str(out), *words])
        return read_metrics(out)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def read_metrics(out: Path) -> list[dict]:
    """metrics.jsonl without what differs from run to run: times and memory."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not any(w in k for w in ("second", "memory"))}
        for row in rows
    ]
