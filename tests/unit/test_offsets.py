"""No kernel computes a place in memory with an integer that is too narrow for it.

    python tests/unit/test_offsets.py            print where an offset leaves 32 bits, if anywhere
    python tests/unit/test_offsets.py --break    also take out each cast to 64 bits, one by one

The largest batch here has 131,072 tokens of 128 heads and a vocabulary of 256,000: 3 · 10¹⁰ numbers
in one tensor. Nothing is run. Every kernel is lowered to Triton's own language, and each integer in
it gets the smallest and the largest value that it can take (interval arithmetic). One that leaves
its type is wrong wherever it ends up in a pointer.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
TOKENS, VOCAB, HEADS, HEAD, WIDTH = 1 << 17, 256000, 1 << 7, 1 << 8, 1 << 16
# Largest values of integer arguments; that of T is its only one.
ARGUMENTS = {
    **dict.fromkeys("q_t k_t v_t x_t".split(), 3 * HEADS * HEAD),  # rows of fused projections
    **dict.fromkeys("q_h k_h v_h x_h".split(), TOKENS * HEAD),  # heads first
    **{"tokens": TOKENS, "N": TOKENS * HEADS, "H": HEADS, "G": HEADS, "steps": 1 << 14},
    **{"C": VOCAB, "start": VOCAB, "D": WIDTH, "rows": VOCAB, "columns": WIDTH, "n": 2**31 - 1},
    **{"code_stride": WIDTH, "blocks": WIDTH // 64, "row_blocks": WIDTH // 64, "skip": 63},
    **{"first_block": VOCAB * WIDTH // 64, "outputs": WIDTH},
}
LOADED = {  # smallest and largest of the integers that a kernel reads
    "KV_END": (0, TOKENS),
    "POSITION": (0, TOKENS),
    "TARGET": (-100, VOCAB),
    "ITEMS": (-1, 1 << 22),
    "SLOTS": (0, 1 << 14),
    "CODES": (-128, 255),
    "SCALES": (-128, 127),
    **dict.fromkeys(("TILES_AT", "STARTS"), (0, 8 * TOKENS)),  # rows of 8 experts a token
    **dict.fromkeys("GATE_AT UP_AT W_AT W2_AT".split(), (-(1 << 40), 1 << 40)),
}
# Largest program ids. By kernel: module and name.
PROGRAMS = {
    "attention.merge_kernel": (1 << 14, HEADS, 2),
    "attention": (HEADS, 1 << 14),
    "logprob": (TOKENS, VOCAB // 1024),
    "kl": (TOKENS, VOCAB // 1024),
    "rmsnorm": (TOKENS * HEADS,),
    "rmsnorm.backward_kernel": (1 << 10,),
    "rope": (TOKENS, HEADS),
    "swiglu": (TOKENS * WIDTH // 2048,),
    "quantized": (TOKENS // 16, VOCAB // 32),
    "grouped": (TOKENS, WIDTH // 64),
    "grouped.gradient_kernel": (512, WIDTH // 128, WIDTH // 128),
}
MOVED = "splat expand_dims broadcast trans reshape unsplat".split()  # operations that keep values


class Range(NamedTuple):
    """Smallest and largest value of an integer; wrapped if it ever left its type."""

    low: int
    high: int
    wrapped: bool = False


def integer_bits(kind: str) -> int:
    """Return the bits of an integer type or of a tensor's elements, 0 for all others."""
    match = re.search(r"(?:^|x)i(\d+)>?$", kind.strip())
    return int(match[1]) if match else 0


class Intervals:
    """The intervals of one kernel's integers, and its faulty offsets."""

    def __init__(self, code: str, names: list[str], programs: tuple, lists: int):
        self.programs = programs
        self.loaded = {**LOADED, "LISTS": (0, lists - 1)}
        self.values: dict[str, Range] = {}
        self.bases: dict[str, str] = {}  # pointer -> argument
        self.faults: list[str] = []
        lines = code.splitlines()
        start = next(i for i, line in enumerate(lines) if "tt.func public" in line)
        for name, kind in re.findall(r"%(arg\d+): ([^,{)]+)", lines[start]):
            argument = names[int(name[3:])]
            if kind.startswith("!tt.ptr"):
                self.bases[name] = argument
            elif integer_bits(kind):
                self.values[name] = self.argument(argument)
        for line in lines[start + 1 :]:
            self.read(line.strip())

    @staticmethod
    def argument(name: str) -> Range:
        """Return the values of an integer argument."""
        return Range(TOKENS, TOKENS) if name == "T" else Range(0, ARGUMENTS[name])

    def read(self, line: str) -> None:
        """Add what one line defines."""
        if loop := re.search(r"scf\.for %(\w+) = %(\w+) to %(\w+) step", line):
            name, low, high = loop.groups()
            first, last = self.values[low], self.values[high]
            top = max(first.low, last.high - 1)
            self.values[name] = Range(first.low, top, first.wrapped or last.wrapped)
            return
        match = re.match(r'%(\w+)(?::\d+)? = "?([\w.]+)"?(.*)', line)
        if not match or match[2].startswith("scf."):
            return
        name, operation, rest = match.groups()
        operation = operation.split(".")[-1]
        operands = re.findall(r"%(\w+)", rest.rsplit(" : ", 1)[0])
        kind = re.split(r" : | -> | to ", rest)[-1]
        if operation == "addptr":
            self.bases[name] = self.bases[operands[0]]
            if self.values[operands[1]].wrapped:
                self.faults.append(f"{self.bases[name]}: {line}")
        elif operation in MOVED and operands[0] in self.bases:
            self.bases[name] = self.bases[operands[0]]
        elif operation == "load":
            element = re.search(r"ptr<(\w+)>", kind)
            if element and integer_bits(element[1]):
                self.values[name] = Range(*self.loaded[self.bases[operands[0]]])
        elif operation not in ("cmpi", "cmpf") and integer_bits(kind):
            self.values[name] = self.result(operation, rest, operands, integer_bits(kind))

    def result(self, operation: str, rest: str, operands: list[str], bits: int) -> Range:
        """Return the values of an integer operation."""
        if operation == "constant":
            word = re.search(r"(?:dense<)?(-?\d+|true|false)", rest)[1]
            number = {"true": 1, "false": 0}.get(word)
            number = int(word) if number is None else number
            return Range(number, number)
        if operation == "make_range":
            end, first = (int(re.search(rf"{key} = (\d+)", rest)[1]) for key in ("end", "start"))
            return Range(first, end - 1)
        if operation == "get_program_id":
            return Range(0, self.programs["xyz".index(rest.split()[0])] - 1)
        inputs = [self.values.get(operand, Range(-(2**63), 2**63 - 1)) for operand in operands]
        low, high = self.bounds(operation, inputs, bits)
        fits = -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1)
        return Range(low, high, not fits or any(x.wrapped for x in inputs))

    @staticmethod
    def bounds(operation: str, inputs: list[Range], bits: int) -> tuple[int, int]:
        """Return the smallest and the largest result, were integers without bounds."""
        a, b = inputs[0], inputs[-1]
        if operation in (*MOVED, "extsi", "extui", "trunci"):
            return a.low, a.high
        if operation == "addi":
            return a.low + b.low, a.high + b.high
        if operation == "subi":
            return a.low - b.high, a.high - b.low
        if operation == "muli":
            products = [x * y for x in a[:2] for y in b[:2]]
            return min(products), max(products)
        if operation == "minsi":
            return min(a.low, b.low), min(a.high, b.high)
        if operation == "maxsi":
            return max(a.low, b.low), max(a.high, b.high)
        if operation in ("divsi", "remsi"):
            largest = max(abs(a.low), abs(a.high))
            return (0 if a.low >= 0 and b.low >= 0 else -largest), largest
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1  # bits of a code, and the like


def short_name(kernel) -> str:
    """Return module.function of a kernel."""
    return f"{kernel.fn.__module__.split('.')[-1]}.{kernel.fn.__name__}"


def faults(module: str = "") -> Iterator[str]:
    """Yield the wrong offsets of all kernels, or of one module's."""
    import itertools

    from offline import lower, variants

    for variant in itertools.chain(variants(90, False), variants(90, True)):
        name = short_name(variant.kernel)
        if not name.startswith(module):
            continue
        walked = variant.constants.get("M" if "d_kv" in name else "N", 1)  # tiles of a list
        programs = PROGRAMS.get(name, PROGRAMS[name.split(".")[0]])
        names = variant.kernel.arg_names
        intervals = Intervals(lower(variant), names, programs, TOKENS // walked)
        yield from (f"{variant.name}: {fault}" for fault in intervals.faults)


def without_casts() -> Iterator[tuple[str, str]]:
    """Take out each cast to 64 bits in turn; yield its line and the first fault that appears."""
    import kernels
    from kernels import attention, grouped, kl, logprob, quantized, rmsnorm, rope, swiglu

    cast = ".to(tl.int64)"
    for module in attention, grouped, kl, logprob, quantized, rmsnorm, rope, swiglu:
        name = module.__name__.split(".")[-1]
        pieces = Path(module.__file__).read_text().split(cast)
        for i in range(1, len(pieces)):
            source = cast.join(pieces[:i]) + cast.join(["", *pieces[i:]])[len(cast) :]
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, f"{name}.py")
                path.write_text(source)
                spec = importlib.util.spec_from_file_location(name, path)
                broken = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(broken)
                setattr(kernels, name, broken)
                line = source[: len(cast.join(pieces[:i]))].count("\n")
                yield f"{name}.py:{line + 1} {source.splitlines()[line]}", next(faults(name), "")
                setattr(kernels, name, module)


def main(breaks: bool) -> int:
    """Print faults, and the casts that nothing needs; return their number."""
    from kernels import device

    device.operator = lambda *_: lambda function: device._UncallableOperator()  # register once only
    wrong = list(faults())
    print("\n".join(wrong))
    for line, fault in without_casts() if breaks else ():
        print(f"{line}\n    without the cast: {fault or 'NOTHING SEEN'}")
        wrong += [] if fault else [line]
    return len(wrong)


def test_a_product_that_leaves_32_bits_is_seen():
    """In a pointer only, through casts to 64 bits that come too late; an early one is right."""

    def offsets(*lines: str) -> list[str]:
        head = "tt.func public @k(%arg0: !tt.ptr<bf16>, %arg1: i32)"
        return Intervals("\n".join((head, *lines)), ["Z", "C"], (TOKENS,), 1).faults

    row, place = "%0 = tt.get_program_id x : i32", "%9 = tt.addptr %arg0, %2 : !tt.ptr<bf16>, i64"
    narrow = ("%1 = arith.muli %0, %arg1 : i32", "%2 = arith.extsi %1 : i32 to i64")
    wide = ("%1 = arith.extsi %0 : i32 to i64", "%3 = arith.extsi %arg1 : i32 to i64")
    product = "%2 = arith.muli %1, %3 : i64"
    assert len(offsets(row, *narrow, place)) == 1
    assert not offsets(row, *narrow)
    assert not offsets(row, *wide, product, place)
    late = "%4 = arith.trunci %2 : i64 to i32"
    assert offsets(row, *wide, product, late, place.replace("%2", "%4").replace("i64", "i32"))


@pytest.mark.slow
def test_every_offset_fits_and_every_cast_is_needed():
    """131,072 tokens, a vocabulary of 256,000; each cast to 64 bits, left out, is missed."""
    pytest.importorskip("triton")
    folders = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {**os.environ, "PLUMB_KERNELS": "on", "PYTHONPATH": folders}
    environment.pop("TRITON_INTERPRET", None)  # the interpreter would replace the compiler
    command = [sys.executable, __file__, "--break"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--break", dest="breaks", action="store_true", help="take out casts")
    flags = parser.parse_args()
    os.environ["PLUMB_KERNELS"] = "on"
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    sys.exit(min(1, main(flags.breaks)))
