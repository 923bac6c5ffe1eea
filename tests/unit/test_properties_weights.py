"""Any weight file, index, config.json or manifest loads as it says, or is an error with its name.

Inputs are damaged by hypothesis. No input may crash the process or fill its memory.
"""

import hashlib
import json
import math
import multiprocessing
import resource
import struct
import traceback
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

pytestmark = pytest.mark.slow  # together more than ten seconds

OFFERS = [0, -1, 1, 2**31, 2**32, 2**53, 2**60, 2**63, 2**64 - 1, 2**64, 1.5, "3", None, [], {}]
DTYPES = "BOOL U8 I8 F8_E5M2 F8_E4M3 I16 F16 BF16 I32 U32 F32 F64 I64 C64 F4 X".split()


def header_of(content: bytes) -> tuple[dict, bytes]:
    """Return (header, data) of a safetensors file: 8 bytes of length, that much JSON, tensors."""
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def file_of(header, data: bytes, size: int | None = None) -> bytes:
    """Return a safetensors file; size: a wrong length of the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Return a safetensors file with errors in its header, in its bytes, or both."""
    header, data = header_of(content)
    errors = draw(st.integers(0, 2))
    for _ in range(errors):
        names = sorted(name for name in header if name != "__metadata__")
        name = draw(st.sampled_from(names))
        entry = header[name]
        kind = draw(st.sampled_from("shape reshape dtype offsets swap drop".split()))
        if kind == "shape":
            offers = st.sampled_from(OFFERS)
            entry["shape"] = draw(st.lists(offers, max_size=4) | offers)
        elif kind == "reshape" and "query_key_value" not in name:
            shape = header_of(content)[0][name]["shape"]
            entry["shape"] = draw(st.sampled_from([[math.prod(shape)], [1, *shape], shape[::-1]]))
        elif kind == "dtype":
            entry["dtype"] = draw(st.sampled_from(DTYPES))
        elif kind == "offsets":
            entry["data_offsets"] = draw(st.lists(st.sampled_from(OFFERS), max_size=3))
        elif kind == "swap":
            other = header[draw(st.sampled_from(names))]
            offsets = entry["data_offsets"]
            entry["data_offsets"] = other["data_offsets"]
            other["data_offsets"] = offsets
        elif kind == "drop":
            header.pop(name)
    damaged_file = file_of(header, data)
    if errors == 0 or draw(st.integers(0, 3)) == 0:
        return draw(damaged_bytes(damaged_file))
    return damaged_file


@st.composite
def damaged_bytes(draw, content: bytes) -> bytes:
    """Return a file that is cut, has a flipped bit, or a header of a wrong size or content."""
    header, data = header_of(content)
    kind = draw(st.sampled_from("cut size text flip nested".split()))
    if kind == "cut":
        return content[: draw(st.integers(0, len(content) - 1))]
    if kind == "size":
        sizes = [0, 1, 7, 2**20, 10**8, 2**31, 2**60, 2**63, 2**64 - 1]
        return file_of(header, data, draw(st.sampled_from(sizes)))
    if kind == "text":
        any_json = json_values.map(json.dumps).map(str.encode)
        return file_of(draw(st.binary(max_size=20) | any_json), data)
    if kind == "nested":
        return file_of(b'{"a":' * 50_000, data)
    flipped = bytearray(content[: 8 + len(json.dumps(header))])
    flipped[draw(st.integers(0, len(flipped) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(flipped) + content[len(flipped) :]


def in_a_small_process(work) -> None:
    """Run work() in a forked child with 512 MB more than this process has; a crash fails too."""

    def child(pipe) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), used + (512 << 20)))
        torch.set_num_threads(1)
        try:
            work()
            pipe.send("")
        except BaseException as error:  # noqa: BLE001 - the parent reports it
            lines = "".join(traceback.format_exception(error)).splitlines()
            pipe.send("\n".join(line[:300] for line in lines)[:6000])

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


def small_model(folder: Path, family: str) -> bytes:
    """Write a tiny folder without a tokenizer and return its weight file."""
    flags = hf.New(family=family, vocab=10, width=16, heads=2, layers=1, ffn=8)
    save_model(hf.new_model(flags), folder)
    return (folder / "model.safetensors").read_bytes()


def loads_or_names(folder: Path, call=lambda folder: load_model(folder, torch.float32)):
    """Return the result of loading, or None after an error whose message names the folder."""
    try:
        return call(folder)
    except (ValueError, FileNotFoundError) as error:
        assert str(folder) in str(error), f"no file is named: {error}"
        return None


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_lying_weight_files_are_refused(family: str, tmp_path: Path):
    """A damaged weight file is an error with its name, in bounded memory.

    A file that loads all the same has floating-point weights of the config's shapes.
    """
    content = small_model(tmp_path, family)
    whole = {name: entry for name, entry in header_of(content)[0].items() if name != "__metadata__"}

    @settings(quick, max_examples=150, database=None)
    @given(damaged(content))
    def check(broken: bytes):
        (tmp_path / "model.safetensors").write_bytes(broken)
        loads_or_names(tmp_path, weight_files)
        if loads_or_names(tmp_path):
            header, _ = header_of(broken)
            kinds = {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
            assert kinds <= {"F64", "F32", "F16", "BF16"}
            assert all(header[name]["shape"] == entry["shape"] for name, entry in whole.items())

    in_a_small_process(check)


def test_a_fused_weight_of_another_shape_is_refused(tmp_path: Path):
    """As many numbers in another shape are an error too."""
    header, data = header_of(small_model(tmp_path, "gpt_neox"))
    header["gpt_neox.layers.0.attention.query_key_value.weight"]["shape"].reverse()
    (tmp_path / "model.safetensors").write_bytes(file_of(header, data))
    assert loads_or_names(tmp_path) is None


@settings(quick, max_examples=150)
@given(st.data())
def test_lying_indexes_are_refused(tmp_path: Path, data):
    """Any model.safetensors.index.json gives the weights it lists, or an error with its folder."""
    folder = tmp_path / "model"
    if not folder.exists():
        small_model(folder, "llama")
    header, _ = header_of((folder / "model.safetensors").read_bytes())
    names = [name for name in header if name != "__metadata__"]
    # This file has one weight, of a wrong shape.
    save_file({names[0]: torch.zeros(1)}, folder / "other.safetensors")
    odd = ["", ".", "no.safetensors", "other.safetensors", "../model/model.safetensors", "\0", 3]
    good = dict.fromkeys(names, "model.safetensors")
    lie = st.tuples(st.sampled_from([*names[1:], "spare"]), st.sampled_from(odd)).map(
        lambda pair: {**good, pair[0]: pair[1]}
    )
    maps = (json_values | st.just(good)).map(lambda m: json.dumps({"weight_map": m}).encode())
    for index in (json.dumps({"weight_map": data.draw(lie)}).encode(), data.draw(maps | lines)):
        (folder / "model.safetensors.index.json").write_bytes(index)
        if loads_or_names(folder):
            assert json.loads(index)["weight_map"] == good


NUMBERS = """hidden_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size
intermediate_size head_dim"""


def test_impossible_configs_are_refused(tmp_path: Path):
    """Any config.json gives a model, or an error with its folder, in bounded memory."""
    small_model(tmp_path, "llama")
    good = json.loads((tmp_path / "config.json").read_text())
    keys = st.sampled_from([*NUMBERS.split(), *good])
    changed = st.dictionaries(keys, st.sampled_from(OFFERS) | json_values, min_size=1, max_size=2)

    @settings(quick, max_examples=200, database=None)
    @given(changed.map(lambda change: json.dumps({**good, **change}).encode()) | lines)
    def check(content: bytes):
        (tmp_path / "config.json").write_bytes(content)
        loads_or_names(tmp_path)

    in_a_small_process(check)


@quick
@given(st.data())
def test_any_manifest_is_whole_or_says_what_is_wrong(tmp_path: Path, data):
    """checkpoint.damage gives a reason for any manifest; "" only for the one with every file."""
    good = {}
    for name in ("state.safetensors", "state.json"):
        (tmp_path / name).write_bytes(name.encode())
        digest = hashlib.sha256(name.encode()).hexdigest()
        good[name] = {"bytes": len(name), "sha256": digest}
    changes = st.dictionaries(st.sampled_from([*good, "x", "..", "\0"]), json_values)
    manifests = st.just(good) | changes.map(lambda more: {**good, **more})
    content = data.draw(manifests.map(json.dumps).map(str.encode) | lines)
    (tmp_path / "manifest.json").write_bytes(content)
    reason = checkpoint.damage(tmp_path)
    assert isinstance(reason, str)
    if not reason:
        assert json.loads(content) == good
