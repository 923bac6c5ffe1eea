"""The order of collectives: what gloo forgives and NCCL does not, in every layout.

Seen to fail: new weights published in another order on one rank; no wait for new weights before a
forward; gradients added to while they are summed; calls of two groups swapped in a recording.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from collectives import Event, Recorder, find_faults
from conftest import read_metrics
from launch import launch

import hf
import train_dpo
import training
from model import GPT
from optimizer import AdamW, Bucket
from weights.folder import save_model

LAYOUTS = {  # flags, number of ranks
    "dp2": (2, ""),
    "dp2 zero2": (2, "--zero 2"),
    "dp2 zero3": (2, "--zero 3"),
    "cp2": (2, "--cp 2"),
    "tp2 dp2 zero2": (4, "--tp 2 --zero 2"),
    "tp2 pp2": (4, "--tp 2 --pp 2"),
    "dp2 pp2 zero2": (4, "--pp 2 --zero 2"),
    "cp2 dp2": (4, "--cp 2"),
}
Results = list[tuple[list[Event], list[str]]]


def no_change(rank: int) -> None:
    pass


def train(
    toy: Path, model: Path, out: Path, flags: str, change: Callable[[int], None] = no_change
) -> tuple[list[Event], list[str]]:
    """Take two DPO steps with an evaluation and a checkpoint; return what was recorded."""
    recorder = Recorder()
    report = training.report_step

    def report_step(*args) -> None:
        recorder.step += 1
        report(*args)

    training.report_step = report_step
    change(int(os.environ["RANK"]))
    words = ["--model", str(model), "--data", str(toy / "world/preferences.jsonl")]
    words += ["--eval-data", str(toy / "world/preferences_test.jsonl"), "--out", str(out)]
    words += "--batch-size 8 --max-tokens 200 --max-steps 2 --save-every 2 --lr 1e-2".split()
    train_dpo.main([*words, *"--dtype fp64 --device cpu".split(), *flags.split()])
    return recorder.events, recorder.faults


@pytest.fixture(scope="module")
def tied(toy: Path, tmp_path_factory) -> Path:
    """Return a random model with a tied embedding, which the first and the last stage share."""
    folder = tmp_path_factory.mktemp("tied") / "model"
    sizes = {"family": "qwen2", "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "tied": True}
    flags = hf.New(**sizes, std=0.3, dtype="fp64", tokenizer=str(toy / "world/tokenizer"))
    save_model(hf.new_model(flags), folder, flags.tokenizer)
    return folder


@pytest.fixture(scope="module")
def alone(toy: Path, tied: Path, tmp_path_factory) -> list[dict]:
    """Return the metrics of one process."""
    out = tmp_path_factory.mktemp("alone")
    launch(1, train_alone, toy, tied, out)
    return read_metrics(out)


def train_alone(toy: Path, model: Path, out: Path) -> None:
    train(toy, model, out, "")


def test_expert_ranks_call_in_one_order(toy: Path, tmp_path: Path):
    """Pipeline stages whose experts are shared: messages, sums and all-to-alls in one order."""
    sizes = {"family": "mixtral", "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 9}
    flags = hf.New(
        **sizes, experts=4, std=0.3, dtype="fp64", tokenizer=str(toy / "world/tokenizer")
    )
    save_model(hf.new_model(flags), tmp_path / "model", flags.tokenizer)
    words = "--pp 2 --ep 2 --zero 2"
    results: Results = launch(4, train, toy, tmp_path / "model", tmp_path / "out", words)
    assert any(event.kind == "all_to_all_single" for events, _ in results for event in events)
    assert find_faults([events for events, _ in results]) == ""
    assert [faults for _, faults in results] == [[]] * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_call_in_one_order_and_read_nothing_early(
    layout: str, toy: Path, tied: Path, alone: list[dict], tmp_path: Path
):
    """Two steps, an evaluation and a checkpoint with outputs that are NaN until their wait."""
    world, flags = LAYOUTS[layout]
    results: Results = launch(world, train, toy, tied, tmp_path / "out", flags)
    assert find_faults([events for events, _ in results]) == ""
    assert [faults for _, faults in results] == [[]] * world
    for row, wanted in zip(read_metrics(tmp_path / "out"), alone, strict=True):
        for name in ("loss", "grad_norm", "eval/loss"):
            if name in wanted:
                assert row[name] == pytest.approx(wanted[name], abs=1e-10), name


# ---- faults that are seen ------------------------------------------------------------------------


def swap_groups(rank: int) -> None:
    """Let rank 1 take the groups of its buckets in another order: gloo does not mind."""
    init = AdamW.__init__

    def swapped(self: AdamW, *args) -> None:
        init(self, *args)
        self.buckets.sort(key=lambda bucket: bucket.group.n, reverse=rank == 1)

    AdamW.__init__ = swapped


def forget_to_wait(rank: int) -> None:
    GPT.wait = lambda self, part=None: None


def add_too_early(rank: int) -> None:
    """Change gradients while they are summed."""
    start = Bucket.start_reduce

    def start_reduce(self: Bucket) -> None:
        start(self)
        if self.keeps_grad and self.work is not None:
            self.grad.add_(1.0)

    Bucket.start_reduce = start_reduce


def test_a_swapped_order_is_seen(toy: Path, tied: Path, tmp_path: Path):
    """One rank sends the weights of two groups in another order than the rest."""
    results: Results = launch(4, train, toy, tied, tmp_path / "out", "--tp 2", swap_groups)
    assert "share" in find_faults([events for events, _ in results])


def test_a_missing_wait_is_seen(toy: Path, tied: Path, tmp_path: Path):
    """A forward with weights that are still on their way."""
    with pytest.raises(AssertionError, match="not finite"):
        launch(2, train, toy, tied, tmp_path / "out", "", forget_to_wait)


def test_an_input_that_changes_is_seen(toy: Path, tied: Path, tmp_path: Path):
    """Gradients that change while they are summed."""
    results: Results = launch(2, train, toy, tied, tmp_path / "out", "", add_too_early)
    assert any("changed before its wait" in fault for _, faults in results for fault in faults)


WORLD, ROW, COLUMN = ((0, 1, 2), 0), ((0, 1), 1), ((1, 2), 2)


def event(group: tuple[tuple[int, ...], int], kind: str = "all_reduce", size: int = 8) -> Event:
    return Event(*group, kind, size, 0)


def test_the_rules():
    """Recordings by hand: right ones, and one for each rule that they break."""
    right = [
        [event(ROW), event(WORLD)],
        [event(ROW), event(COLUMN), event(WORLD)],
        [event(COLUMN), event(WORLD)],
    ]
    assert find_faults(right) == ""
    swapped = [right[0], [event(COLUMN), event(WORLD), event(ROW)], right[2]]
    assert "ranks 0 and 1 share" in find_faults(swapped)
    assert "share 1 and 0 calls" in find_faults([right[0], right[1], right[2][:1]])
    assert "share" in find_faults([[event(ROW)], [event(ROW, size=16)], []])
    assert "share" in find_faults([[event(ROW)], [event(ROW, kind="all_gather")], []])
    assert "share" in find_faults([[event(ROW)], [event(ROW)._replace(stream="side")], []])
    # Two ranks never share two groups, and yet all three wait: 0 for 1, 1 for 2, 2 for 0.
    ring = [((0, 1), 1), ((1, 2), 2), ((0, 2), 3)]
    circle = [
        [event(ring[0]), event(ring[2])],
        [event(ring[1]), event(ring[0])],
        [event(ring[2]), event(ring[1])],
    ]
    assert "wait for each other" in find_faults(circle)

    def sends(*messages: tuple[int, int, int]) -> Event:
        return Event((0, 1), 1, "messages", 0, 0, "main", messages)

    both = (0, 1, 8), (1, 0, 8)
    assert find_faults([[sends(*both)], [sends(*both)]]) == ""  # at once: neither waits
    apart = [[sends(both[0]), sends(both[1])], [sends(both[1]), sends(both[0])]]
    assert "wait for each other" in find_faults(apart)
    assert "wait for each other" in find_faults([[sends((0, 1, 8))], [sends((0, 1, 16))]])
