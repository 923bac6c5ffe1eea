"""Assumed specs of GPUs, and sizes of well-known models, for plan.py."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """Assumed GPU specs: vendor data sheets; links at 80 % of the stated one-way rate."""

    gib: float  # memory that torch sees
    flops: float  # dense bf16 FLOPs a second, summed in fp32
    node: float  # bytes a second to a GPU of the same node: NVLink, Infinity Fabric, else PCIe x16
    network: float  # bytes a second to another node; one adapter a GPU of 100, 200 or 400 Gb/s


GPUS = {
    "4090": Gpu(23.6, 165e12, 25e9, 10e9),
    "5090": Gpu(31.4, 209e12, 50e9, 10e9),
    "l40s": Gpu(44.4, 362e12, 25e9, 20e9),
    "a6000": Gpu(47.5, 155e12, 25e9, 10e9),
    "a100": Gpu(79, 312e12, 240e9, 20e9),
    "a100-40": Gpu(39.4, 312e12, 240e9, 20e9),
    "h100": Gpu(79, 989e12, 360e9, 40e9),
    "h200": Gpu(139, 989e12, 360e9, 40e9),
    "b200": Gpu(178, 2250e12, 720e9, 40e9),
    "mi300x": Gpu(191, 1307e12, 358e9, 40e9),
    "mi355x": Gpu(287, 2500e12, 430e9, 40e9),
}
# Sizes that many models have. Name -> width, layers, heads, key/value heads, MLP width, vocabulary.
MODELS = {
    "1.1B": (2048, 22, 32, 4, 5632, 32000),  # TinyLlama
    "3B": (3200, 26, 32, 32, 8640, 32000),  # OpenLLaMA
    "7B": (4096, 32, 32, 32, 11008, 32000),  # Llama 2
    "13B": (5120, 40, 40, 40, 13824, 32000),  # Llama 2
    "34B": (8192, 48, 64, 8, 22016, 32000),  # Code Llama
    "70B": (8192, 80, 64, 8, 28672, 32000),  # Llama 2
    "405B": (16384, 126, 128, 8, 53248, 128256),  # Llama 3.1
}
