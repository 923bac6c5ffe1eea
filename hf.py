"""Check a Hugging Face folder, or make a new one of random weights.

    python hf.py check DIR
        loads the folder as a training script would, and prints what it holds or what is wrong
    python hf.py merge BASE ADAPTER --out DIR
        adds an adapter (--lora, or of peft) to its base, for servers that load whole models
    python hf.py from-gguf FILE --out DIR
        converts a GGUF file of llama.cpp into a folder (pip install gguf)
    python hf.py text DIR --out NEW
        takes the text model out of a folder whose model reads images: Gemma 3 from 4B on
    python hf.py new --out DIR --family llama --width 96 --layers 2 --heads 4 --tokenizer DIR
        for tests, benchmarks and training from scratch

`check` refuses by name every architecture, option and weight that plumb does not know. Weights are
read from safetensors only, which cannot run code. The library is weights/.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch

import hub
from architecture import GPTConfig
from commandline import parse
from config import Above0, Amount, Count, Number, Seed
from data.templates import Template
from data.tokenizer import Tokenizer, load_tokenizer
from model import GPT, active_count, parameter_count
from weights import families, gguf, text_model
from weights.config_json import ARCHITECTURES, model_config, read_config, score_names
from weights.folder import DTYPES, load_model, save_model, weight_files
from weights.peft import adapter_scores, load_adapter


@dataclass
class New:
    """Flags of `hf.py new`."""

    out: str = ""  # folder to make
    family: Literal[
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "smollm3",
        "olmo2",
        "olmo3",
        "nemotron",
        "granite",
        "stablelm",
        "ministral3",
        "phi3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt_neox",
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "olmoe",
        "glm4_moe",
    ] = "llama"  # architecture
    tokenizer: str = ""  # folder whose tokenizer is copied
    vocab: Count = 0  # rows of the embedding; 0 = what the tokenizer needs
    width: Number = 256  # of the residual stream
    layers: Number = 4  # blocks
    heads: Number = 4  # query heads
    kv_heads: Count = 0  # key/value heads; 0 = as many as query heads
    head_size: Count = 0  # 0 = width / heads
    ffn: Count = 0  # MLP width; 0 = 8/3 of the width, 4 without a gate, in multiples of 16
    experts: Number = 8  # of mixtures of experts: experts of a layer
    active: Number = 2  # experts that a token takes
    expert_ffn: Count = 0  # hidden width of an expert; 0 = --ffn, of which mixtral and olmoe have
    # no other
    max_position: Number = 2048  # longest text the model is meant for, in tokens
    sliding_window: Count = 0  # of mistral, olmo3, gemma2 and gemma3_text; 0 = all
    rope_theta: Above0 = 10000.0  # base of the rotary frequencies; larger for long contexts
    tied: bool = False  # one matrix for embedding and head: fewer parameters
    std: Amount = 0.02  # of the random weights; 1/sqrt(width) is a good choice for small models
    seed: Seed = 0  # of the random weights
    dtype: Literal["bf16", "fp32", "fp64"] = "fp32"  # of the weights in the file


def new_model(flags: New) -> GPT:
    """Return a model of random weights for save_model. ValueError names the flag to change."""
    tokenizer = load_tokenizer(flags.tokenizer) if flags.tokenizer else None
    _validate(flags, tokenizer)
    ungated = flags.family in ("gpt_neox", "nemotron")
    ffn = 4 * flags.width if ungated else -(-flags.width * 8 // 48) * 16
    raw = {
        "architectures": [ARCHITECTURES[flags.family]],
        "model_type": flags.family,
        "vocab_size": flags.vocab or tokenizer.size,
        "hidden_size": flags.width,
        "intermediate_size": flags.ffn or ffn,
        "num_hidden_layers": flags.layers,
        "num_attention_heads": flags.heads,
        "max_position_embeddings": flags.max_position,
        "tie_word_embeddings": flags.tied,
        "hidden_act": "silu",
        "bos_token_id": tokenizer.bos if tokenizer else None,
        "eos_token_id": tokenizer.eos if tokenizer else None,
        "pad_token_id": None,  # some families have a default beyond a small vocabulary
        "rope_theta": flags.rope_theta,
        "num_key_value_heads": flags.kv_heads or flags.heads,
        "head_dim": flags.head_size or flags.width // flags.heads,
        "layer_norm_eps": 1e-5,
        "norm_eps": 1e-5,
        "rms_norm_eps": families.EPS.get(flags.family, 1e-6),  # vLLM knows some by heart
        **families.NEW.get(flags.family, {}),
    }
    if flags.family in families.SPARSE:
        raw |= families.expert_keys(
            flags.family, flags.experts, flags.active, flags.expert_ffn or raw["intermediate_size"]
        )
    raw = {key: value for key, value in raw.items() if families.reads(flags.family, key)}
    if flags.family == "gpt_neox":
        raw["rotary_emb_base"] = raw.pop("rope_theta")
    if flags.family in families.LOCAL_ROPE:
        del raw["rope_theta"]
        rope = {"rope_type": "default", "rope_theta": flags.rope_theta}
        raw["rope_parameters"] = {"full_attention": rope, "sliding_attention": rope}
    if flags.family in families.WINDOW:
        # transformers computes an olmo3 only with a window
        no_window = None if flags.family == "mistral" else flags.max_position
        raw["sliding_window"] = flags.sliding_window or no_window
    dtype = DTYPES[flags.dtype]
    model = GPT(model_config(raw, flags.family)).to(dtype)
    for name, weight in model.weights().items():
        p = model.get_parameter(name)
        p.data = p.data.to(weight.held_in(dtype))
    model.init_weights(flags.seed, flags.std)
    model.hf_config = raw
    return model


def _validate(flags: New, tokenizer: Tokenizer | None) -> None:
    """Raise ValueError for the first flag that does not fit the others."""
    if not (flags.vocab or tokenizer):
        raise ValueError("hf.py new needs --vocab N or --tokenizer DIR")
    if not flags.head_size and flags.width % flags.heads:
        raise ValueError(
            f"--width {flags.width} is no multiple of --heads {flags.heads}: or give --head-size"
        )
    if flags.sliding_window and flags.family not in families.WINDOW:
        names = ", ".join(families.WINDOW)
        raise ValueError(f"--sliding-window is for --family {names}")
    if tokenizer and flags.vocab and flags.vocab < tokenizer.size:
        raise ValueError(
            f"--vocab {flags.vocab} is too small for the tokenizer: it has {tokenizer.size} ids"
        )
    given = (flags.experts, flags.active, flags.expert_ffn) != (8, 2, 0)
    if given and flags.family not in families.SPARSE:
        names = ", ".join(families.SPARSE)
        raise ValueError(f"--experts, --active and --expert-ffn are for --family {names}")
    if flags.active > flags.experts:
        raise ValueError(f"--active {flags.active} is more than --experts {flags.experts}")
    for flag, key in (("kv_heads", "num_key_value_heads"), ("head_size", "head_dim")):
        if getattr(flags, flag) and not families.reads(flags.family, key):
            name = flag.replace("_", "-")
            raise ValueError(f"--{name} is not for {flags.family}: its config.json has no {key}")


def describe(folder: str) -> str:
    """Return a few lines about the contents of a folder. Raises what loading it would raise."""
    raw = read_config(folder)[1]
    names = score_names(raw)
    model = load_model(folder, own_dtype(raw), scores=() if names else None)
    c = model.c
    files = set(weight_files(folder).values())
    tokenizer = load_tokenizer(folder)
    if tokenizer.size > c.vocab:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.size} ids, the embedding only {c.vocab}: they "
            "belong to different models"
        )
    head = "tied head" if c.tied else "own head"
    if names:
        head = f"scores {', '.join(names)}"
    window = f", sliding window {max(c.windows)}" if c.windows else ""
    template = "no chat template (--template auto is plain)"
    if tokenizer.chat_template:
        template = "with a chat template"
    lines = [
        f"{folder}: {c.family}, {parameter_count(c) / 1e6:,.1f}M parameters in "
        f"{len(files)} file(s)",
        f"  {c.layers} layers, width {c.width}, {c.heads} heads of {c.head_size} "
        f"({c.kv_heads} key/value), {describe_mlp(c)}",
        f"  vocabulary {c.vocab}, {head}, made for {c.max_position} positions{window}",
        f"  tokenizer of {tokenizer.size} ids, bos {tokenizer.bos_token!r}, "
        f"eos {tokenizer.eos_token!r}, {template}",
    ]
    return "\n".join(lines)


def describe_mlp(c: GPTConfig) -> str:
    """Return a few words on the MLPs of a model."""
    if not c.experts:
        return f"MLP {c.ffn}"
    words = f"{c.experts} experts of {c.expert_ffn}, {c.active} a token"
    words += f", beside a shared MLP {c.shared_ffn}" if c.shared_ffn else ""
    words += f", {len(c.dense_layers)} layers with an MLP {c.ffn}" if c.dense_layers else ""
    return f"{words}; {active_count(c) / 1e6:,.1f}M parameters meet a token"


def own_dtype(raw: dict) -> torch.dtype:
    """Return the dtype that a config.json names; fp32 where it names none."""
    dtype = getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype")), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def merge(base: str, adapter: str, out: str) -> None:
    """Write a folder in which an adapter is merged into its base, in the base's own dtype."""
    raw = read_config(base)[1]
    names = () if score_names(raw) else adapter_scores(adapter) or None
    model = load_model(base, own_dtype(raw), scores=names)
    load_adapter(model, adapter)
    template = Template("auto", load_tokenizer(base))
    save_model(model, out, base, None if template.plain else template)


def main(argv: list[str]) -> None:
    try:
        if argv[:1] == ["merge"] and len(argv) == 5 and argv[3] == "--out":
            merge(argv[1], argv[2], argv[4])
            argv = ["check", argv[4]]
        if argv[:1] == ["from-gguf"] and len(argv) == 4 and argv[2] == "--out":
            gguf.convert(argv[1], argv[3])
            argv = ["check", argv[3]]
        if argv[:1] == ["text"] and len(argv) == 4 and argv[2] == "--out":
            left_out = text_model.extract(hub.model_folder(argv[1]), argv[3])
            print(f"left out {left_out} weight(s) that read images")
            argv = ["check", argv[3]]
        if argv[:1] == ["new"]:
            flags = parse(New, __doc__, argv[1:])
            if not flags.out:
                raise ValueError("hf.py new needs --out DIR")
            save_model(new_model(flags), flags.out, flags.tokenizer or None)
            argv = ["check", flags.out] if flags.tokenizer else []
        if argv[:1] == ["check"] and len(argv) == 2:
            print(describe(hub.model_folder(argv[1])))
        elif argv:
            print(__doc__)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["--help"])
