"""The kernels as they are compiled without a GPU: variants, argument types, intermediate code.

Set PLUMB_KERNELS=on before the first import of a kernel, and leave TRITON_INTERPRET unset.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

# What a kernel's argument is, by its name. Strides and widths are multiples of 16 in real models.
ALIGNED = set("q_t q_h k_t k_h v_t v_h x_t x_h D C rows columns outputs code_stride".split())
SIZES = set("T H G N D C".split())
FLOATS = set("scale inner root eps inverse sign mix log_mix log_rest".split())
POINTERS = {
    "*i32": set("KV_END ITEMS LISTS SLOTS".split()),
    "*i64": set("POSITION TARGET GATE_AT UP_AT W_AT W2_AT TILES_AT STARTS".split()),
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


def variants(arch: int, window: bool) -> Iterator[Variant]:
    """Yield every kernel that runs on an architecture, for bf16 models."""
    import torch

    from kernels import attention, grouped, kl, logprob, quantized, rmsnorm, rope, swiglu, tiles

    for size, capped in ((64, False), (128, False), (128, True), (256, True)):
        constants = {"GROUP": 4, "E": size, "EP": size, "CAPPED": capped, "PRECISION": "ieee"}
        constants["WINDOW"] = 4096 if window else 0
        kernels = {
            "forward": attention.forward_kernel,
            "d_q": attention.d_q_kernel,
            "d_kv": attention.d_kv_kernel,
        }
        table = tiles.tile_sizes(arch, size, torch.bfloat16, capped)
        for (name, kernel), (m, n, warps, stages) in zip(kernels.items(), table, strict=True):
            name = f"attention_{name} {'capped ' * capped}E{size}"
            name += f" {m}x{n} {warps} warps {stages} stages"
            yield Variant(name, kernel, {**constants, "M": m, "N": n}, warps, stages)
    if window:
        return
    constants = {"N": 128, "E": 128, "EP": 128}
    yield Variant("attention_merge E128", attention.merge_kernel, constants, 4, 3)
    for entropy, cap in ((False, 0.0), (True, 0.0), (True, 30.0)):
        constants = {"ENTROPY": entropy, "CAP": cap, "BLOCK": logprob.BLOCK}
        name = f"entropy={entropy}{' capped' * (cap > 0)}"
        yield Variant(f"logprob_fold {name}", logprob.fold_kernel, constants, 8, 3)
        yield Variant(f"logprob_slope {name}", logprob.slope_kernel, constants, 8, 3)
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
    for few in (1, 1000):
        table = grouped.tile_sizes(arch, torch.bfloat16, few)
        uses = {
            "swiglu": (grouped.swiglu_kernel, {"ALIGN": 8}),
            "down": (grouped.product_kernel, {"ALIGN": 8, "TRANSPOSED": True, "DUAL": False}),
            "d_x": (grouped.product_kernel, {"ALIGN": 8, "TRANSPOSED": False, "DUAL": True}),
            "d_w": (grouped.gradient_kernel, {}),
        }
        for (name, (kernel, constants)), sizes in zip(uses.items(), (*table[:2], *table[1:])):
            m, n, k, warps, stages = sizes
            constants = {**constants, "M": m, "N": n, "K": k, "PRECISION": "ieee"}
            name = f"grouped_{name} {m}x{n}x{k} {warps} warps {stages} stages"
            if few > 1 or kernel is not grouped.gradient_kernel:
                yield Variant(name, kernel, constants, warps, stages)
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


def source_of(variant: Variant):
    """Return a kernel with its types and constants: 16-byte pointers, aligned strides."""
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    signature = {name: argument_type(name, variant.constants) for name in names}
    aligned = ALIGNED - set(variant.constants)
    attributes = {}
    for i, name in enumerate(names):
        if signature[name].startswith("*") or name in aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(
        variant.kernel, signature=signature, constexprs=variant.constants, attrs=attributes
    )


def target_of(arch: int):
    """Return Triton's name of an architecture: 80 to 120 are NVIDIA's, 942 is AMD's gfx942."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", f"gfx{arch}", 64) if is_amd(arch) else GPUTarget("cuda", arch, 32)


def is_amd(arch: int) -> bool:
    """Tell AMD's architectures from NVIDIA's."""
    return arch >= 900


def compile_for(variant: Variant, arch: int):
    """Compile a kernel for an architecture."""
    import triton

    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    return triton.compile(source_of(variant), target=target_of(arch), options=options)


def lower(variant: Variant) -> str:
    """Return a kernel in Triton's intermediate language, with all functions inlined."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    target = target_of(90)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": variant.warps, "num_stages": variant.stages})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    module = source_of(variant).make_ir(
        target, options, functions, backend.get_module_map(), context
    )
    return backend.make_ttir(module, {}, options, 90).str_nodebug()
