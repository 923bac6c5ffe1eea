"""Clock, result rows and inputs, shared by the parts of bench/gpu.py."""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

UNITS = ("tflops", "gbs")  # measured as ceilings first; other parts report their share of them


def read_rows(path: Path) -> list[dict]:
    """Return the objects of a JSONL file, none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_row(path: Path, part: str, name: str, **values) -> None:
    """Append a result to the rows of all parts."""
    with open(path, "a") as file:
        file.write(json.dumps({"part": part, "name": name, **values}) + "\n")


def describe(row: dict) -> str:
    """Format a result as one line."""
    words = [f"{row['part']:10} {row['name']:58}"]
    for key, value in row.items():
        if key not in ("part", "name"):
            words.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return "  ".join(words)


def ceiling_variable(unit: str) -> str:
    """Name the environment variable that carries a measured ceiling to the later parts."""
    return f"BENCH_{unit.upper()}"


class Bench:
    """Device, sizes, clock and results of one part."""

    def __init__(self, part: str, rows: str, device: str, tiny: bool, seconds: float):
        self.part = part
        self.rows = Path(rows)
        self.tiny = tiny  # smallest sizes, one call each
        self.device = torch.device(device)
        self.cuda = device == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.deadline = time.monotonic() + seconds
        if self.cuda:  # zeroing this much memory empties the L2 cache
            self.flush = torch.empty(1 << 28, dtype=torch.int8, device=self.device)
        torch.manual_seed(0)

    def record(self, name: str, **values) -> None:
        """Write a result at once, with its share of the ceiling measured before."""
        for key in list(values):
            unit = next((unit for unit in UNITS if key.endswith(unit)), None)
            ceiling = os.environ.get(ceiling_variable(unit)) if unit else None
            if ceiling and self.part != "ceilings":
                values[key.replace(unit, "share")] = values[key] / float(ceiling)
        write_row(self.rows, self.part, name, **values)
        print(describe({"part": self.part, "name": name, **values}), flush=True)

    def attempt(self, name: str, work: Callable[..., dict], *inputs) -> None:
        """Record what work(*inputs) measures. A failure becomes a row, and the part goes on."""
        if time.monotonic() > self.deadline:
            self.record(name, skipped="no time left")
            return
        try:
            self.record(name, **work(*inputs))
        except Exception as error:  # noqa: BLE001
            self.record(name, error=f"{type(error).__name__}: {str(error)[:300]}")
            self.free()

    def free(self) -> None:
        """Return cached memory to the GPU."""
        if self.cuda:
            torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        """Forget the peak of GPU memory so far."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float:
        """Return the peak of GPU memory in GiB, 0 on a CPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0

    def seconds(self, work: Callable[[], object], least: int = 5, budget: float = 1.5) -> float:
        """Return the median time of a call: at least `least` calls, about `budget` seconds."""
        if self.tiny:
            least, budget = 1, 0.01
        for _ in range(1 if self.tiny else 2):  # compiles and warms up
            work()
        times = []
        end = time.monotonic() + budget
        while len(times) < least or (time.monotonic() < end and len(times) < 100):
            times.append(self._time_on_gpu(work) if self.cuda else self._time_on_cpu(work))
        return statistics.median(times)

    def _time_on_gpu(self, work: Callable[[], object]) -> float:
        self.flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000

    def _time_on_cpu(self, work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return normal random numbers on the device, in the part's dtype by default."""
        return torch.randn(*shape, device=self.device).to(dtype or self.dtype)

    def leaf(self, *shape: int) -> torch.Tensor:
        """Return random numbers that take a gradient."""
        return self.randn(*shape).requires_grad_()
