"""Hugging Face folder <-> model: one table row a weight, used in both directions.

    python hf.py check DIR        reads the folder as a training script would, and says what it holds
    python hf.py new --out DIR --family llama --width 96 --layers 2 --heads 4 --tokenizer DIR
                                  a new folder of random weights, for tests, benchmarks and training from scratch

An architecture, an option or a weight that plumb does not know is refused by name: what is not computed exactly must
not be computed silently. Weights are read from safetensors only, which cannot run code.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch

from config import parse
from data.tokenizer import load_tokenizer
from model import GPT, parameter_count
from weights.config_json import ARCHITECTURES, model_config, read_config, score_names
from weights.folder import DTYPES, load_model, save_model, weight_files


@dataclass
class New:
    """Flags of `hf.py new`."""

    out: str = ""  # the folder to make
    family: Literal["llama", "mistral", "qwen2", "qwen3", "gpt_neox"] = "llama"  # architecture
    tokenizer: str = ""  # folder whose tokenizer goes along
    vocab: int = 0  # rows of the embedding; 0 = what the tokenizer needs
    width: int = 256  # of the residual stream
    layers: int = 4  # blocks
    heads: int = 4  # query heads
    kv_heads: int = 0  # key/value heads; 0 = as many as query heads
    head_size: int = 0  # 0 = width / heads
    ffn: int = 0  # MLP width; 0 = 8/3 of the width (4 for gpt_neox), rounded up to a multiple of 16
    max_position: int = 2048  # longest row the model is meant for
    sliding_window: int = 0  # mistral only: tokens a token looks back; 0 = all
    rope_theta: float = 10000.0  # base of the rotary frequencies; larger for long contexts
    tied: bool = (
        False  # one matrix for embedding and head: saves parameters where the vocabulary is large
    )
    std: float = 0.02  # of the random weights; 1/sqrt(width) is a good choice for small models
    seed: int = 0  # of the random weights
    dtype: Literal["bf16", "fp32", "fp64"] = "fp32"  # of the weights in the file


def new_model(flags: New) -> GPT:
    """A model of random weights from sizes alone; ready for save_model."""
    tokenizer = load_tokenizer(flags.tokenizer) if flags.tokenizer else None
    if not (flags.vocab or tokenizer):
        raise ValueError("hf.py new needs --vocab N or --tokenizer DIR")
    if not flags.head_size and flags.width % flags.heads:
        raise ValueError(
            f"--width {flags.width} is no multiple of --heads {flags.heads}: or give --head-size"
        )
    if flags.sliding_window and flags.family != "mistral":
        raise ValueError("--sliding-window is for --family mistral")
    if tokenizer and flags.vocab and flags.vocab < tokenizer.size:
        raise ValueError(
            f"--vocab {flags.vocab} is too small for the tokenizer: it has {tokenizer.size} ids"
        )
    neox = flags.family == "gpt_neox"
    ffn = flags.ffn or (4 * flags.width if neox else -(-flags.width * 8 // 48) * 16)
    raw = {
        "architectures": [ARCHITECTURES[flags.family]],
        "model_type": flags.family,
        "vocab_size": flags.vocab or tokenizer.size,
        "hidden_size": flags.width,
        "intermediate_size": ffn,
        "num_hidden_layers": flags.layers,
        "num_attention_heads": flags.heads,
        "max_position_embeddings": flags.max_position,
        "tie_word_embeddings": flags.tied,
        "hidden_act": "gelu" if neox else "silu",
        "bos_token_id": tokenizer.bos if tokenizer else None,
        "eos_token_id": tokenizer.eos if tokenizer else None,
    }
    if neox:
        raw |= {"rotary_pct": 0.25, "rotary_emb_base": flags.rope_theta, "layer_norm_eps": 1e-5}
        if flags.kv_heads or flags.head_size:
            raise ValueError("--kv-heads and --head-size are not for gpt_neox: it has neither")
    else:
        raw |= {
            "num_key_value_heads": flags.kv_heads or flags.heads,
            "rope_theta": flags.rope_theta,
        }
        raw |= {"rms_norm_eps": 1e-6, "head_dim": flags.head_size or flags.width // flags.heads}
    if flags.family == "mistral":
        raw["sliding_window"] = flags.sliding_window or None
    model = GPT(model_config(raw, flags.family)).to(DTYPES[flags.dtype])
    model.init_weights(flags.seed, flags.std)
    model.hf_config = raw
    return model


def describe(folder: str) -> str:
    """What a folder holds, in a few lines; raises what loading it would raise."""
    names = score_names(read_config(folder)[1])
    model = load_model(folder, torch.float32, scores=() if names else None)
    c = model.c
    kept = {str(path.name) for path in weight_files(folder).values()}
    tokenizer = load_tokenizer(folder)
    if tokenizer.size > c.vocab:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.size} ids, the embedding only {c.vocab}: not a pair"
        )
    head = f"scores {', '.join(names)}" if names else f"{'tied' if c.tied else 'own'} head"
    return "\n".join([
        f"{folder}: {c.family}, {parameter_count(c) / 1e6:,.1f}M parameters in {len(kept)} file(s)",
        f"  {c.layers} layers, width {c.width}, {c.heads} heads of {c.head_size} ({c.kv_heads} key/value), MLP {c.ffn}",
        f"  vocabulary {c.vocab}, {head}, made for {c.max_position} positions"
        + (f", sliding window {max(c.windows)}" if c.windows else ""),
        f"  tokenizer of {tokenizer.size} ids, bos {tokenizer.bos_token!r}, eos {tokenizer.eos_token!r}, "
        + ("with a chat template" if tokenizer.chat_template else "no chat template (--template auto is plain)"),
    ])  # fmt: skip


def main(argv: list[str]) -> None:
    try:
        if argv[:1] == ["new"]:
            flags = parse(New, __doc__, argv[1:])
            if not flags.out:
                raise ValueError("hf.py new needs --out DIR")
            save_model(new_model(flags), flags.out, flags.tokenizer or None)
            argv = ["check", flags.out] if flags.tokenizer else []
        if argv[:1] == ["check"] and len(argv) == 2:
            print(describe(argv[1]))
        elif argv:
            print(__doc__)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["--help"])
