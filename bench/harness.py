"""Clock, result rows and inputs, shared by the parts of bench/gpu.py."""

import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

UNITS = ("tflops", "gbs")  # measured as ceilings first; other parts report their share of them


def read_rows(path: Path) -> list[dict]:
    """Return the objects of a JSONL file, none if there is no file."""
    return [json.loads(line) for line in path.open()] if path.exists() else []


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


def ceilings_in(rows: list[dict]) -> dict[str, float]:
    """Return unit -> rate of the measured ceilings among some rows."""
    return {u: row[u] for row in rows if row["part"] == "ceilings" for u in UNITS if u in row}


class Bench:
    """Device, sizes, clock and results of one part."""

    def __init__(self, part: str, rows: str, device: str, tiny: bool, seconds: float):
        self.part = part
        self.rows = Path(rows)
        self.tiny = tiny  # smallest sizes, one call each
        self.cuda = device == "cuda"
        self.pretended = device == "pretend"  # tests/pretend.py: host memory under CUDA's rules
        self.device = torch.device("cpu" if device == "cpu" else "cuda")
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.deadline = time.monotonic() + seconds
        if self.cuda:  # zeroing this much memory empties the L2 cache
            self.flush = torch.empty(1 << 28, dtype=torch.int8, device=self.device)
        torch.manual_seed(0)

    def record(self, name: str, **values) -> None:
        """Write a result at once, with its share of the ceiling measured before."""
        ceilings = ceilings_in(self.earlier_rows()) if self.part != "ceilings" else {}
        for key in list(values):
            unit = next((unit for unit in UNITS if key.endswith(unit)), None)
            if unit in ceilings:
                values[key.replace(unit, "share")] = values[key] / ceilings[unit]
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

    def earlier_rows(self) -> list[dict]:
        """Return the rows of all stages in this one's folder that ran on the same GPU."""
        stages = [read_rows(path) for path in sorted(self.rows.parent.glob("*.jsonl"))]
        gpu = read_rows(self.rows)[0].get("gpu")
        return [row for rows in stages if rows and rows[0].get("gpu") == gpu for row in rows]

    def synchronize(self) -> None:
        """Wait until the GPU has done all that it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def host_waits(self, work: Callable[[], object]) -> int:
        """Count how often work() makes the host wait for the GPU; 0 on a CPU."""
        if self.pretended:
            import pretend

            pretend.WAITS.clear()
            work()
            return sum(pretend.WAITS.values())
        if not self.cuda:
            return 0
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # of every wait that torch knows of
            work()
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(wait.message) for wait in waits)

    def data_sheet_tflops(self) -> float | None:
        """Return the GPU's dense bf16 peak in TFLOP/s, None if it is not known."""
        from reporting import PEAK_TFLOPS

        name = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)

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
