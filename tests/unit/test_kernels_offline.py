"""Law 8, second half: every kernel compiles well for NVIDIA's and AMD's GPUs, without one.

    python tests/unit/test_kernels_offline.py                print registers, spills, shared memory
    python tests/unit/test_kernels_offline.py 90 --window    other architectures; sliding windows
    python tests/unit/test_kernels_offline.py 942 950        AMD: gfx942, gfx950 (MI300X, MI355X)

Triton compiles for a named target, and its wheel brings ptxas and nvdisasm to look at the result.
This shows what no run would: registers spilled inside a loop, wgmma serialised by ptxas
(warning C7515: correct, at half the speed), tensor-core instructions of an older architecture, more
shared memory than there is. AMD's compiler spills vectors to scratch, which is memory, and scalars
to lanes of a vector register, which is not ("to lanes" in the table).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))  # as a script
from offline import compile_for, is_amd, variants  # noqa: E402

FOLDERS = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
SHARED_KB = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99, 942: 64, 950: 160}  # limit of a block
MATRIX = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA", 120: "HMMA"}
MATRIX |= dict.fromkeys((942, 950), "v_mfma")
# For the test of AMD's, whose compiler is slow: one variant of each kernel; the largest ones again.
FEW = r"attention_\w+ E128|logprob.*True|kl.*jsd|rmsnorm.*4096|rope R128|swiglu|quantized.*nf4 128"
FEW += r"|grouped.* 128x"


def tool(name: str) -> Path | None:
    """Return the path of a program from Triton's wheel, else from the PATH."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    path = bundled if bundled.exists() else shutil.which(name)
    return Path(path) if path else None


def loop_ranges(instructions: list[str], labels: dict[str, int]) -> list[tuple[int, int]]:
    """Return the first and the last instruction of every loop, which is a branch back."""
    branch = r"(?:\bBRA\b|s_c?branch).*?(\.LB?B?_?\w+)"
    jumps = ((i, re.search(branch, text)) for i, text in enumerate(instructions))
    return [(labels[m[1]], i) for i, m in jumps if m and labels.get(m[1], i) < i]


def assemble(compiled) -> tuple[str, str]:
    """Return what ptxas reports of a compiled kernel, and its disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
        report = ""
        for name in ("ptxas", "ptxas-blackwell"):  # one of them made the cubin
            if "registers" in report or not (ptxas := tool(name)):
                continue
            command = [ptxas, "-v", "--gpu-name", target, ptx, "-o", os.devnull]
            report = subprocess.run(command, capture_output=True, text=True).stderr
        command = [tool("nvdisasm"), "-c", cubin]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return report, sass


def inspect(compiled, arch: int) -> dict:
    """Count registers, spills, matrix instructions, shared memory and warnings of a kernel."""
    if is_amd(arch):
        return inspect_amd(compiled)
    report, sass = assemble(compiled)
    instructions, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(code[1])
    spills = [i for i, text in enumerate(instructions) if re.search(r"\b(STL|LDL)\b", text)]
    loops = loop_ranges(instructions, labels)
    return {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spills": len(spills),
        "loop spills": sum(any(a <= i <= b for a, b in loops) for i in spills),
        "products": sum(bool(re.search(MATRIX[arch], text)) for text in instructions),
        "instructions": len(instructions),
        "shared KB": compiled.metadata.shared / 1024,
        "serialised": "C7515" in report,
    }


def inspect_amd(compiled) -> dict:
    """Do what `inspect` does from the assembly of AMD's compiler."""
    instructions, labels = [], {}
    for line in compiled.asm["amdgcn"].splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(instructions)
        elif re.match(r"\t[a-z]", line):
            instructions.append(line.strip())
    spills = [i for i, text in enumerate(instructions) if text.startswith("scratch_")]
    lanes = [i for i, text in enumerate(instructions) if re.match("v_(read|write)lane", text)]
    loops = loop_ranges(instructions, labels)

    def noted(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", compiled.asm["amdgcn"])[1])

    return {
        "registers": noted("vgpr_count"),
        "spills": noted("vgpr_spill_count"),
        "loop spills": sum(any(a <= i <= b for a, b in loops) for i in spills),
        "to lanes": sum(any(a <= i <= b for a, b in loops) for i in lanes),
        "scratch": noted("private_segment_fixed_size"),
        "products": sum(text.startswith("v_mfma") for text in instructions),
        "instructions": len(instructions),
        "shared KB": compiled.metadata.shared / 1024,
        "serialised": False,
        "threads": noted("max_flat_workgroup_size"),
        "warp": noted("wavefront_size"),
    }


def faults(name: str, row: dict, arch: int) -> list[str]:
    """List what is wrong with a kernel's row of the table."""
    wrong = []
    if row["loop spills"]:
        wrong.append(f"{row['loop spills']} spills inside loops")
    if row["serialised"]:
        wrong.append("wgmma serialised (C7515)")
    if row["shared KB"] > SHARED_KB[arch]:
        wrong.append(f"{row['shared KB']:.0f} KB of shared memory, above {SHARED_KB[arch]}")
    if (
        re.match(r"attention_(forward|d_q|d_kv)|quantized.* 128x|grouped.* 128x", name)
        and not row["products"]
    ):
        wrong.append(f"no {MATRIX[arch]}")
    if row.get("scratch"):
        wrong.append(f"{row['scratch']} bytes of scratch a thread")
    if row.get("warp", 64) != 64 or row.get("threads", 64) % 64:
        wrong.append(f"warps of {row['warp']}, {row['threads']} threads")
    if row["instructions"] < 50:
        wrong.append("nothing was compiled")
    return wrong


def main(architectures: list[int], window: bool, only: str = "") -> int:
    """Print the table; return the number of faulty rows."""
    faulty = 0
    for arch in architectures:
        name = f"gfx{arch}" if is_amd(arch) else f"sm_{arch}"
        print(f"\n{name}: {'kernel':48} registers  spills (in loops)  products  shared KB")
        for variant in variants(arch, window):
            if not re.match(only, variant.name):
                continue
            row = inspect(compile_for(variant, arch), arch)
            wrong = faults(variant.name, row, arch)
            faulty += bool(wrong)
            print(
                f"       {variant.name:50} {row['registers']:7}"
                f" {row['spills']:7} ({row['loop spills']})"
                f" {row['products']:12} {row['shared KB']:10.1f}"
                f" {'  to lanes ' + str(row['to lanes']) if row.get('to lanes') else ''}"
                f"  {'; '.join(wrong)}",
                flush=True,
            )
    return faulty


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_well(arch: int):
    """No spills in loops, no serialised wgmma, the architecture's own matrix instructions, shared
    memory that fits."""
    pytest.importorskip("triton")
    if not (tool("nvdisasm") and tool("ptxas")):
        pytest.skip("this Triton brings no nvdisasm")
    compile_all(str(arch))


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "only"), [(942, FEW), (950, r"attention_\w+ E128")])
def test_kernels_compile_well_for_amd(arch: int, only: str):
    """The same of one variant of each kernel; no scratch, warps of 64, 64 or 160 KB of memory."""
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / "backends" / "amd").exists():
        pytest.skip("this Triton brings no compiler for AMD")
    compile_all(str(arch), "--only", only)


def compile_all(*words: str) -> None:
    """Run this file in a process of its own, which must find nothing wrong."""
    environment = {**os.environ, "PLUMB_KERNELS": "on", "PYTHONPATH": FOLDERS}
    environment.pop("TRITON_INTERPRET", None)  # the interpreter would replace the compiler
    command = [sys.executable, __file__, *words]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]


@pytest.mark.parametrize(
    ("name", "number"),
    [("gfx942:sramecc+:xnack-", 942), ("gfx950", 950), ("gfx90a", 910), ("gfx1100", 1100)],
)
def test_an_amd_gpu_gets_tiles_of_amds(name: str, number: int, monkeypatch):
    """torch calls it cuda; its name decides, and one that is not known gets those of gfx942."""
    import torch

    from kernels import device, tiles

    properties = SimpleNamespace(gcnArchName=name)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert device.architecture(torch.device("cuda")) == number
    assert tiles.tile_sizes(number, 128, torch.bfloat16) == tiles.TILES[942][128]


def test_faults_are_seen():
    """A spill in a loop, serialised wgmma, too much shared memory and a missing matrix instruction
    each make a row faulty."""
    good = {
        "loop spills": 0,
        "serialised": False,
        "shared KB": 99.0,
        "products": 8,
        "instructions": 900,
    }
    name = "attention_d_q E128"
    assert not faults(name, good, 90)
    for change in ({"loop spills": 1}, {"serialised": True}, {"shared KB": 228.0}, {"products": 0}):
        assert len(faults(name, {**good, **change}, 90)) == 1
    for change in ({"scratch": 8}, {"warp": 32, "threads": 256}, {"shared KB": 65.0}):
        assert len(faults(name, {**good, "shared KB": 9.0, **change}, 942)) == 1
    code = ["MOV", "STL [R1]", "LDL R2", "@P0 BRA `(.L_x_1)", "STL [R1]"]
    assert loop_ranges(code, {".L_x_1": 1}) == [(1, 3)]
    assert loop_ranges(["s_nop", "s_cbranch_scc1 .LBB0_3"], {".LBB0_3": 0}) == [(0, 1)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("architectures", nargs="*", type=int, default=[80, 90, 100])
    parser.add_argument("--window", action="store_true", help="the variants with a sliding window")
    parser.add_argument("--only", default="", help="variants whose name begins like this (regex)")
    flags = parser.parse_args()
    os.environ["PLUMB_KERNELS"] = "on"
    sys.path.insert(0, str(ROOT))
    sys.exit(min(1, main(flags.architectures, flags.window, flags.only)))
