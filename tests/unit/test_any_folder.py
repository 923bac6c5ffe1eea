"""Any model folder or checkpoint: it loads, or is rejected by name, in bounded memory."""

import json
import math
import multiprocessing
import resource
import struct
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from strategies import json_values, lines, quick

import checkpoint
import hf
from weights.folder import load_model, save_model, weight_files

ODD_VALUES = [0, -1, 1, 2**31, 2**32, 2**53, 2**60, 2**63, 2**64 - 1, 2**64, 1.5, "3", None, [], {}]
LYING_SIZES = [0, 1, 7, 2**20, 10**8, 2**31, 2**60, 2**63, 2**64 - 1]
DTYPES = "BOOL U8 I8 F8_E5M2 F8_E4M3 I16 F16 BF16 I32 U32 F32 F64 I64 C64 F4 X".split()
DAMAGES = "cut size text flip shape reshape dtype offsets swap drop nested".split()
SIZES = """
    hidden_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size
    intermediate_size head_dim
""".split()


# ---- helpers -------------------------------------------------------------------------------------


def split_file(content: bytes) -> tuple[dict, bytes]:
    """Return (header, data) of a safetensors file: 8 bytes of length, so much JSON, the tensors."""
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def join_file(header: dict | bytes, data: bytes, size: int | None = None) -> bytes:
    """Return a safetensors file of a header and data; `size` lies about the header's length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def weight_names(header: dict) -> list[str]:
    """Return the names of the tensors in a header."""
    return [name for name in header if name != "__metadata__"]


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Draw a safetensors file with one or two errors in it."""
    header, data = split_file(content)
    names = sorted(weight_names(header))
    for _ in range(draw(st.integers(1, 2))):
        damage = draw(st.sampled_from(DAMAGES))
        name = draw(st.sampled_from(names))
        entry = header[name]
        if damage == "cut":
            return content[: draw(st.integers(0, len(content) - 1))]
        if damage == "size":
            return join_file(header, data, draw(st.sampled_from(LYING_SIZES)))
        if damage == "text":
            noise = st.binary(max_size=20) | json_values.map(json.dumps).map(str.encode)
            return join_file(draw(noise), data)
        if damage == "nested":
            return join_file(b'{"a":' * 50_000, data)
        if damage == "flip":
            flipped = bytearray(content[: 8 + len(json.dumps(header))])
            flipped[draw(st.integers(0, len(flipped) - 1))] ^= 1 << draw(st.integers(0, 7))
            return bytes(flipped) + content[len(flipped) :]
        odd = st.sampled_from(ODD_VALUES)
        if damage == "shape":
            entry["shape"] = draw(st.lists(odd, max_size=4) | odd)
        elif damage == "reshape" and "query_key_value" not in name:
            before = split_file(content)[0][name]["shape"]
            shapes = [[math.prod(before)], [1, *before], before[::-1]]
            entry["shape"] = draw(st.sampled_from(shapes))
        elif damage == "dtype":
            entry["dtype"] = draw(st.sampled_from(DTYPES))
        elif damage == "offsets":
            entry["data_offsets"] = draw(st.lists(odd, max_size=3))
        elif damage == "swap":
            other = header[draw(st.sampled_from(names))]
            mine, theirs = entry["data_offsets"], other["data_offsets"]
            entry["data_offsets"], other["data_offsets"] = theirs, mine
        elif damage == "drop":
            names.remove(name)
            header.pop(name)
    return join_file(header, data)


def run_in_bounded_memory(work: Callable[[], None]) -> None:
    """Run work() in a forked child that may use 512 MB more than this process.

    An exception there fails here, and so does a death by signal.
    """

    def child(pipe) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + (512 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.set_num_threads(1)
        try:
            work()
            pipe.send("")
        except BaseException as error:  # noqa: BLE001 - the parent reports it, whatever it is
            report = "".join(traceback.format_exception(error)).splitlines()
            pipe.send("\n".join(line[:300] for line in report)[:6000])

    ours, theirs = multiprocessing.Pipe(False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    theirs.close()
    try:
        report = ours.recv()
    except EOFError:
        report = "died"
    process.join()
    assert process.exitcode == 0 and not report, f"{report} (exit {process.exitcode})"


def write_small_model(folder: Path, family: str) -> bytes:
    """Write a tiny model folder without a tokenizer and return the content of its weight file."""
    flags = hf.New(family=family, vocab=10, width=16, heads=2, layers=1, ffn=8)
    save_model(hf.new_model(flags), folder)
    return (folder / "model.safetensors").read_bytes()


def load_weights(folder: Path):
    """Load a folder in fp32."""
    return load_model(folder, torch.float32)


def load_or_check_error(folder: Path, load: Callable = load_weights):
    """Return load(folder), or None if it is rejected; the message must name the folder."""
    try:
        return load(folder)
    except (ValueError, FileNotFoundError) as error:
        assert str(folder) in str(error), f"no file is named: {error}"
        return None


# ---- laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_damaged_weight_files_are_rejected(family: str, tmp_path: Path):
    """Cut files, wrong sizes, shapes of 2**60, overlapping offsets, other types, no JSON.

    Each is an error with the file's name, in bounded memory. A file that loads in spite of it has
    floating-point weights of the config's shapes.
    """
    content = write_small_model(tmp_path, family)
    whole, _ = split_file(content)

    @settings(quick, max_examples=150, database=None)
    @given(damaged(content))
    def check(broken: bytes):
        (tmp_path / "model.safetensors").write_bytes(broken)
        load_or_check_error(tmp_path, weight_files)
        if load_or_check_error(tmp_path):
            header, _ = split_file(broken)
            types = {header[name]["dtype"] for name in weight_names(header)}
            assert types <= {"F64", "F32", "F16", "BF16"}
            for name in weight_names(whole):
                assert header[name]["shape"] == whole[name]["shape"]

    run_in_bounded_memory(check)


def test_a_fused_weight_of_another_shape_is_rejected(tmp_path: Path):
    """As many numbers in another shape: rejected like every other weight that does not fit."""
    header, data = split_file(write_small_model(tmp_path, "gpt_neox"))
    header["gpt_neox.layers.0.attention.query_key_value.weight"]["shape"].reverse()
    (tmp_path / "model.safetensors").write_bytes(join_file(header, data))
    assert load_or_check_error(tmp_path) is None


@settings(quick, max_examples=150)
@given(st.data())
def test_wrong_indexes_are_rejected(tmp_path: Path, data):
    """model.safetensors.index.json of any content: the weights that it truly lists, or an error."""
    folder = tmp_path / "model"
    if not folder.exists():
        write_small_model(folder, "llama")
    names = weight_names(split_file((folder / "model.safetensors").read_bytes())[0])
    # A second file, with one weight of a wrong shape.
    save_file({names[0]: torch.zeros(1)}, folder / "other.safetensors")
    good = dict.fromkeys(names, "model.safetensors")
    odd = ["", ".", "no.safetensors", "other.safetensors", "../model/model.safetensors", "\0", 3]
    lies = st.tuples(st.sampled_from([*names[1:], "spare"]), st.sampled_from(odd))
    maps = lies.map(lambda lie: {**good, lie[0]: lie[1]}), json_values | st.just(good)
    one_lie, any_map = (m.map(lambda m: json.dumps({"weight_map": m}).encode()) for m in maps)
    for index in (data.draw(one_lie), data.draw(any_map | lines)):
        (folder / "model.safetensors.index.json").write_bytes(index)
        if load_or_check_error(folder):
            assert json.loads(index)["weight_map"] == good


def test_impossible_configs_are_rejected(tmp_path: Path):
    """config.json of any content, or with any value for a size: a model, or an error that names it.

    Memory is bounded: no list of 2**60 layers is ever made.
    """
    write_small_model(tmp_path, "llama")
    good = json.loads((tmp_path / "config.json").read_text())
    keys = st.sampled_from([*SIZES, *good])
    odd = st.sampled_from(ODD_VALUES) | json_values
    changes = st.dictionaries(keys, odd, min_size=1, max_size=2)

    @settings(quick, max_examples=200, database=None)
    @given(changes.map(lambda change: json.dumps({**good, **change}).encode()) | lines)
    def check(content: bytes):
        (tmp_path / "config.json").write_bytes(content)
        load_or_check_error(tmp_path)

    run_in_bounded_memory(check)


@quick
@given(st.data())
def test_any_manifest_is_whole_or_its_damage_is_named(tmp_path: Path, data):
    """checkpoint.damage gives a reason, and "" only for the manifest that lists every file."""
    good = {}
    for name in ("state.safetensors", "state.json"):
        (tmp_path / name).write_bytes(name.encode())
        good[name] = {"bytes": len(name), "sha256": checkpoint._digest(tmp_path / name)}
    additions = st.dictionaries(st.sampled_from([*good, "x", "..", "\0"]), json_values)
    changed = additions.map(lambda more: {**good, **more})
    content = data.draw((st.just(good) | changed).map(json.dumps).map(str.encode) | lines)
    (tmp_path / "manifest.json").write_bytes(content)
    reason = checkpoint.damage(tmp_path)
    assert isinstance(reason, str)
    if not reason:
        assert json.loads(content) == good
