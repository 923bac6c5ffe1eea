"""Law 8, second half: every kernel compiles for sm_80, sm_90 and sm_100 with the tiles of its table, on any machine.

    python tests/test_kernels_offline.py                 the table: registers, spills, shared memory, products
    python tests/test_kernels_offline.py 90 --window     other architectures; the variants with a sliding window

No GPU is asked: Triton compiles for a named target, and its wheel brings ptxas, cuobjdump and nvdisasm to look at the
result. What no run could tell shows here: registers spilled inside a loop, wgmma serialised by ptxas (warning C7515:
correct, and half as fast), tensor cores of an older kind, more shared memory than there is.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_KB = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}  # a block's limit
MATRIX = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA", 120: "HMMA"}
ALIGNED = {
    "q_t",
    "q_h",
    "k_t",
    "k_h",
    "v_t",
    "v_h",
    "x_t",
    "x_h",
    "D",
    "C",
}  # multiples of 16 in real models
POINTERS = {
    "*i32": {"KV_END", "ITEMS", "LISTS", "SLOTS"}, "*i64": {"POSITION", "TARGET"},
    "*fp32": {"LSE", "DELTA", "PARTIAL", "SCALE", "COS", "SIN", "Z", "TOP", "SUM", "MIXED", "PICKED", "GRAD",
              "ENTROPIES", "D_ENTROPY", "D_W"},
}  # fmt: skip


def tool(name: str) -> Path | None:
    """A program of Triton's wheel, or of the PATH."""
    import shutil

    import triton

    inside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = inside if inside.exists() else shutil.which(name)
    return Path(found) if found else None


def kernels(arch: int, window: bool):
    """(name, kernel, constants, warps, stages) of everything that runs on an architecture; bf16."""
    import torch

    from kernels import attention, logprob, rmsnorm, rope, swiglu, tiles

    for size in (64, 128):
        table = tiles.tile_sizes(arch, size, torch.bfloat16)
        whole = {
            "GROUP": 4,
            "E": size,
            "EP": size,
            "WINDOW": 4096 if window else 0,
            "PRECISION": "tf32",
        }
        for kernel, (m, n, warps, stages) in zip(
            (attention._forward, attention._d_q, attention._d_kv), table
        ):
            tile = f"{m}x{n} {warps} warps {stages} stages"
            yield (
                f"attention{kernel.__name__} E{size} {tile}",
                kernel,
                {**whole, "M": m, "N": n},
                warps,
                stages,
            )
    if window:
        return
    yield "attention_merge E128", attention._merge, {"N": 128, "E": 128, "EP": 128}, 4, 3
    for entropy in (False, True):
        flags = {"ENTROPY": entropy, "BLOCK": logprob.BLOCK}
        yield f"logprob_fold entropy={entropy}", logprob._fold_kernel, flags, 8, 3
        yield f"logprob_slope entropy={entropy}", logprob._slope_kernel, flags, 8, 3
    for width in (128, 4096, 8192):
        _, _, together, padded, warps = rmsnorm._shape(torch.empty(1, width, device="meta"))
        flags = {"ADD": True, "ROWS": together, "DP": padded}
        yield f"rmsnorm_forward D{width}", rmsnorm._forward, flags, warps, 3
        yield f"rmsnorm_backward D{width}", rmsnorm._backward, flags, warps, 1
    for rest in (0, 64):
        half = (128 - rest) // 2
        flags = {
            "E": 128,
            "HALF": half,
            "HEADS": 32,
            "PAIRS": 1 << (half - 1).bit_length(),
            "REST": rest,
        }
        yield f"rope R{2 * half}", rope._rotate, flags, 4, 3
    yield "swiglu_forward", swiglu._forward, {"BLOCK": swiglu.BLOCK}, 8, 3
    yield "swiglu_backward", swiglu._backward, {"BLOCK": swiglu.BLOCK}, 8, 3


def compile_for(kernel, constants: dict, arch: int, warps: int, stages: int):
    """What Triton makes of a kernel with bf16 activations, 16-byte pointers and aligned strides."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.isupper() and name not in ("T", "H", "G", "N", "D", "C"):
            return next((k for k, names in POINTERS.items() if name in names), "*bf16")
        return "fp32" if name in ("scale", "root", "eps", "inverse", "sign") else "i32"

    names = kernel.arg_names
    signature = {name: kind(name) for name in names}
    aligned = [
        i
        for i, name in enumerate(names)
        if signature[name][0] == "*" or name in ALIGNED - set(constants)
    ]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def loop_ranges(instructions: list[str], labels: dict[str, int]) -> list[tuple[int, int]]:
    """First and last instruction of every loop: a branch back."""
    jumps = ((i, re.search(r"\bBRA\b.*?(\.L_\w+)", text)) for i, text in enumerate(instructions))
    return [(labels[m[1]], i) for i, m in jumps if m and labels.get(m[1], i) < i]


def inspect(compiled, arch: int) -> dict:
    """Registers, spills, matrix products, shared memory and warnings of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        name = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
        for ptxas in filter(
            None, (tool("ptxas"), tool("ptxas-blackwell"))
        ):  # one of them made the cubin
            command = [ptxas, "-v", "--gpu-name", name, ptx, "-o", os.devnull]
            said = subprocess.run(command, capture_output=True, text=True).stderr
            if "registers" in said:
                break
        sass = subprocess.run(
            [tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True
        ).stdout
    instructions, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(code[1])
    spills = [i for i, text in enumerate(instructions) if re.search(r"\b(STL|LDL)\b", text)]
    loops = loop_ranges(instructions, labels)
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spills": len(spills),
        "loop spills": sum(any(a <= i <= b for a, b in loops) for i in spills),
        "products": sum(bool(re.search(MATRIX[arch], text)) for text in instructions),
        "instructions": len(instructions),
        "shared KB": compiled.metadata.shared / 1024,
        "serialised": "C7515" in said,
    }


def rows(arch: int, window: bool = False):
    """(name, what was found or what went wrong) of every kernel on an architecture."""
    for name, kernel, constants, warps, stages in kernels(arch, window):
        yield name, inspect(compile_for(kernel, constants, arch, warps, stages), arch)


def faults(name: str, found: dict, arch: int) -> list[str]:
    """What a row of the table must not show."""
    wrong = []
    if found["loop spills"]:
        wrong.append(f"{found['loop spills']} spills inside loops")
    if found["serialised"]:
        wrong.append("wgmma serialised (C7515)")
    if found["shared KB"] > SHARED_KB[arch]:
        wrong.append(
            f"{found['shared KB']:.0f} KB of shared memory, the limit is {SHARED_KB[arch]}"
        )
    if re.match(r"attention_(forward|d_q|d_kv)", name) and not found["products"]:
        wrong.append(f"no {MATRIX[arch]}")
    if found["instructions"] < 50:
        wrong.append("nothing was compiled")
    return wrong


def main(architectures: list[int], window: bool) -> int:
    """Prints the table; the number of rows at fault."""
    bad = 0
    for arch in architectures:
        print(f"\nsm_{arch}: {'kernel':48} registers  spills (in loops)  products  shared KB")
        for name, found in rows(arch, window):
            wrong = faults(name, found, arch)
            bad += bool(wrong)
            print(
                f"       {name:50} {found['registers']:7} {found['spills']:7} ({found['loop spills']})"
                f" {found['products']:12} {found['shared KB']:10.1f}  {'; '.join(wrong)}",
                flush=True,
            )
    return bad


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_well(arch: int):
    """No spills inside loops, no serialised wgmma, the architecture's own matrix products, shared memory that fits."""
    pytest.importorskip("triton")
    if not (tool("nvdisasm") and tool("ptxas")):
        pytest.skip("this Triton brings no nvdisasm")
    environment = {**os.environ, "PLUMB_KERNELS": "on", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)  # the interpreter replaces what would be compiled
    run = subprocess.run(
        [sys.executable, __file__, str(arch)], env=environment, capture_output=True, text=True
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]


def test_faults_are_seen():
    """A spill in a loop, a serialised wgmma, too much shared memory and a missing product each fail the row."""
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
    parser.add_argument("--window", action="store_true")
    flags = parser.parse_args()
    os.environ["PLUMB_KERNELS"] = "on"
    sys.path.insert(0, str(ROOT))
    sys.exit(min(1, main(flags.architectures, flags.window)))
