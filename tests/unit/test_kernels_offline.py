"""Law 8, second half: every kernel compiles well for sm_80, sm_90 and sm_100, without a GPU.

    python tests/unit/test_kernels_offline.py                print registers, spills, shared memory
    python tests/unit/test_kernels_offline.py 90 --window    other architectures; sliding windows

Triton compiles for a named target, and its wheel brings ptxas and nvdisasm to look at the result.
This shows what no run would: registers spilled inside a loop, wgmma serialised by ptxas
(warning C7515: correct, at half the speed), tensor-core instructions of an older architecture, more
shared memory than there is.
"""

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SHARED_KB = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}  # limit of a block
MATRIX = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA", 120: "HMMA"}
# What a kernel's argument is, by its name. Strides and widths are multiples of 16 in real models.
ALIGNED = set("q_t q_h k_t k_h v_t v_h x_t x_h D C rows columns code_stride".split())
SIZES = set("T H G N D C".split())
FLOATS = set("scale root eps inverse sign mix log_mix log_rest".split())
POINTERS = {
    "*i32": set("KV_END ITEMS LISTS SLOTS".split()),
    "*i64": set("POSITION TARGET".split()),
    "*fp32": set("LSE DELTA PARTIAL SCALE COS SIN Z TOP SUM MIXED PICKED GRAD".split())
    | set("ENTROPIES D_ENTROPY D_W UNITS TEACHER SUMS".split()),
}


class Variant(NamedTuple):
    """One kernel with the constants of one use."""

    name: str
    kernel: object
    constants: dict
    warps: int
    stages: int


def tool(name: str) -> Path | None:
    """Return the path of a program from Triton's wheel, else from the PATH."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    path = bundled if bundled.exists() else shutil.which(name)
    return Path(path) if path else None


def variants(arch: int, window: bool) -> Iterator[Variant]:
    """Yield every kernel that runs on an architecture, for bf16 models."""
    import torch

    from kernels import attention, kl, logprob, quantized, rmsnorm, rope, swiglu, tiles

    for size in (64, 128):
        constants = {"GROUP": 4, "E": size, "EP": size, "PRECISION": "ieee"}
        constants["WINDOW"] = 4096 if window else 0
        kernels = {
            "forward": attention.forward_kernel,
            "d_q": attention.d_q_kernel,
            "d_kv": attention.d_kv_kernel,
        }
        table = tiles.tile_sizes(arch, size, torch.bfloat16)
        for (name, kernel), (m, n, warps, stages) in zip(kernels.items(), table, strict=True):
            name = f"attention_{name} E{size} {m}x{n} {warps} warps {stages} stages"
            yield Variant(name, kernel, {**constants, "M": m, "N": n}, warps, stages)
    if window:
        return
    constants = {"N": 128, "E": 128, "EP": 128}
    yield Variant("attention_merge E128", attention.merge_kernel, constants, 4, 3)
    for entropy in (False, True):
        constants = {"ENTROPY": entropy, "BLOCK": logprob.BLOCK}
        yield Variant(f"logprob_fold entropy={entropy}", logprob.fold_kernel, constants, 8, 3)
        yield Variant(f"logprob_slope entropy={entropy}", logprob.slope_kernel, constants, 8, 3)
    for divergence in kl.DIVERGENCES:
        constants = {"DIVERGENCE": divergence, "BLOCK": kl.BLOCK}
        yield Variant(f"kl_sums {divergence}", kl.sums_kernel, constants, 8, 3)
        yield Variant(f"kl_slope {divergence}", kl.slope_kernel, constants, 8, 3)
    for width in (128, 4096, 8192):
        row = torch.empty(1, width, device="meta")
        _, _, rows_each, padded, warps = rmsnorm.launch_shape(row)
        constants = {"ADD": True, "ROWS": rows_each, "DP": padded}
        yield Variant(f"rmsnorm_forward D{width}", rmsnorm.forward_kernel, constants, warps, 3)
        yield Variant(f"rmsnorm_backward D{width}", rmsnorm.backward_kernel, constants, warps, 1)
    for rest in (0, 64):
        half = (128 - rest) // 2
        constants = {"E": 128, "HALF": half, "HEADS": 32, "REST": rest}
        constants["PAIRS"] = 1 << (half - 1).bit_length()
        yield Variant(f"rope R{2 * half}", rope.rotate_kernel, constants, 4, 3)
    constants = {"BLOCK": swiglu.BLOCK}
    yield Variant("swiglu_forward", swiglu.forward_kernel, constants, 8, 3)
    yield Variant("swiglu_backward", swiglu.backward_kernel, constants, 8, 3)
    for format, tokens in itertools.product(quantized.FORMATS, (16, 8192)):
        constants = {"FORMAT": format, "PRECISION": "ieee", "LEVELS": quantized.NF4}
        constants |= {"WIDTH": quantized.BLOCK, "GROUP": quantized.GROUP}
        for backward in (False, True):
            kernel = quantized.backward_kernel if backward else quantized.forward_kernel
            m, n, warps, stages = quantized.tile_sizes(arch, tokens, torch.bfloat16, backward)
            constants = {**constants, "M": m, "N": n}
            name = f"quantized_{'backward' if backward else 'forward'} {format} {m}x{n}"
            yield Variant(f"{name} {warps} warps {stages} stages", kernel, constants, warps, stages)


def argument_type(name: str, constants: dict) -> str:
    """Return the Triton type of a kernel's argument; tensors of the model are bf16."""
    if name in constants:
        return "constexpr"
    if name == "CODES":
        return {"bf16": "*bf16", "int8": "*i8"}.get(constants["FORMAT"], "*u8")
    if name == "SCALES":
        return "*i8" if constants["FORMAT"] == "nf4" else "*fp32"
    if name.isupper() and name not in SIZES:
        return next((kind for kind, names in POINTERS.items() if name in names), "*bf16")
    return "fp32" if name in FLOATS else "i32"


def compile_for(variant: Variant, arch: int):
    """Compile a kernel for an architecture, with 16-byte pointers and aligned strides."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    signature = {name: argument_type(name, variant.constants) for name in names}
    aligned = ALIGNED - set(variant.constants)
    attributes = {}
    for i, name in enumerate(names):
        if signature[name].startswith("*") or name in aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        variant.kernel, signature=signature, constexprs=variant.constants, attrs=attributes
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def loop_ranges(instructions: list[str], labels: dict[str, int]) -> list[tuple[int, int]]:
    """Return the first and the last instruction of every loop, which is a branch back."""
    jumps = ((i, re.search(r"\bBRA\b.*?(\.L_\w+)", text)) for i, text in enumerate(instructions))
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


def faults(name: str, row: dict, arch: int) -> list[str]:
    """List what is wrong with a kernel's row of the table."""
    wrong = []
    if row["loop spills"]:
        wrong.append(f"{row['loop spills']} spills inside loops")
    if row["serialised"]:
        wrong.append("wgmma serialised (C7515)")
    if row["shared KB"] > SHARED_KB[arch]:
        wrong.append(f"{row['shared KB']:.0f} KB of shared memory, above {SHARED_KB[arch]}")
    if re.match(r"attention_(forward|d_q|d_kv)|quantized.* 128x", name) and not row["products"]:
        wrong.append(f"no {MATRIX[arch]}")
    if row["instructions"] < 50:
        wrong.append("nothing was compiled")
    return wrong


def main(architectures: list[int], window: bool) -> int:
    """Print the table; return the number of faulty rows."""
    faulty = 0
    for arch in architectures:
        print(f"\nsm_{arch}: {'kernel':48} registers  spills (in loops)  products  shared KB")
        for variant in variants(arch, window):
            row = inspect(compile_for(variant, arch), arch)
            wrong = faults(variant.name, row, arch)
            faulty += bool(wrong)
            print(
                f"       {variant.name:50} {row['registers']:7}"
                f" {row['spills']:7} ({row['loop spills']})"
                f" {row['products']:12} {row['shared KB']:10.1f}  {'; '.join(wrong)}",
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
    environment = {**os.environ, "PLUMB_KERNELS": "on", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)  # the interpreter would replace the compiler
    command = [sys.executable, __file__, str(arch)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]


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
    code = ["MOV", "STL [R1]", "LDL R2", "@P0 BRA `(.L_x_1)", "STL [R1]"]
    assert loop_ranges(code, {".L_x_1": 1}) == [(1, 3)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("architectures", nargs="*", type=int, default=[80, 90, 100])
    parser.add_argument("--window", action="store_true", help="the variants with a sliding window")
    flags = parser.parse_args()
    os.environ["PLUMB_KERNELS"] = "on"
    sys.path.insert(0, str(ROOT))
    sys.exit(min(1, main(flags.architectures, flags.window)))
