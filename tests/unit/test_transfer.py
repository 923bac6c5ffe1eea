"""New weights over NCCL, by a stand-in for vLLM's server and communicator; tests/engine checks the
messages against vLLM's own classes.
"""

import re
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_engine import flags_of

import train_reinforce
from config import RolloutConfig
from sampling import rollout, transfer

pytestmark = pytest.mark.slow  # runs against servers


class Communicator:
    """A NCCL group with one server, whose broadcasts land in the stand-in's queue."""

    device = torch.device("cpu")

    def __init__(self, stand_in):
        self.stand_in = stand_in

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        assert src == 0
        self.stand_in.sent.put(tensor.clone())


@pytest.fixture
def nccl(monkeypatch, tmp_path: Path):
    """Pretend a GPU and vLLM's package; return (the stand-ins that may be joined, places met)."""
    stand_ins, places, devices = [], [], []

    def trainer_init(place: dict) -> Communicator:
        deadline = time.monotonic() + 5
        while not any(s.joined.get("master_port") == place["master_port"] for s in stand_ins):
            assert time.monotonic() < deadline, "nobody joined"
            time.sleep(0.01)
        places.append(place)
        for stand_in in stand_ins:
            stand_in.scratch = tmp_path
        return Communicator(stand_ins[0])

    module = types.ModuleType("vllm.distributed.weight_transfer.nccl_common")
    module.trainer_init = trainer_init
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    for name in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield stand_ins, places
    assert set(devices) <= {3}


def run(toy: Path, stand_in, out: Path, train, **more) -> list[dict]:
    flags = flags_of(toy, stand_in, rollout_transfer="nccl", device="cpu", **more)
    return train(train_reinforce, out, **flags)


@pytest.mark.parametrize("lora", [0, 4])
def test_weights_go_over_nccl_in_the_protocols_order(
    lora: int, toy: Path, engine, nccl, tmp_path: Path, train
):
    """Every rollout has the newest weights, also merged ones of --lora, and no folder is named."""
    stand_in = engine("vllm")
    nccl[0].append(stand_in)
    rows = run(toy, stand_in, tmp_path / "out", train, lora=lora)
    assert [row["sampler_gap"] < 1e-5 for row in rows] == [True] * 3
    once = ["/init_weight_transfer_engine"]
    update = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    after = ["/reset_prefix_cache", "/update_weight_version", "/resume"]
    rounds = ["/pause", *once, *update, *after] + ["/pause", *update, *after] * 2
    assert stand_in.calls == ["/reset_prefix_cache", *rounds]
    (place,) = nccl[1]
    assert stand_in.joined == {**place, "rank_offset": 1, "packed": False}
    assert place["world_size"] == 2 and re.fullmatch(r"127\.0\.0\.1", place["master_address"])
    last, sent = (
        load_file(Path(folder) / "model.safetensors")
        for folder in (tmp_path / "out" / "rollout", stand_in.loaded[-1])
    )
    assert last.keys() == sent.keys() and all(torch.equal(last[k], sent[k]) for k in last)


@pytest.mark.parametrize("when", ["in a rollout", "between two"])
def test_a_restarted_server_joins_again(
    when: str, toy: Path, engine, nccl, tmp_path: Path, train, capsys
):
    """It knows no group any more; every sample is of the newest weights."""
    stand_in = engine("vllm")
    nccl[0].append(stand_in)
    complete, call = stand_in.complete, stand_in.call

    def restart_once(body: dict) -> dict:
        if when == "in a rollout" and len(stand_in.requests) == 6:  # in the second
            stand_in.restart()
        return complete(body)

    def restart_before(path: str, body: dict) -> dict | None:
        if when == "between two" and path.startswith("/pause") and len(nccl[1]) == 1:
            stand_in.restart()
        return call(path, body)

    stand_in.complete, stand_in.call = restart_once, restart_before
    rows = run(toy, stand_in, tmp_path / "out", train)
    assert all(row["sampler_gap"] < 1e-5 for row in rows) and len(nccl[1]) == 2
    assert ("was restarted" in capsys.readouterr().out) == (when == "in a rollout")


def test_what_cannot_send_is_refused(toy: Path, engine, nccl, tmp_path: Path, train, monkeypatch):
    """No server to send to, another way named, no GPU, no vLLM, a server without the calls."""
    stand_in = engine("vllm")
    nccl[0].append(stand_in)
    with pytest.raises(ValueError, match="--rollout-transfer nccl needs --rollout-url"):
        rollout.validate(RolloutConfig(rollout_transfer="nccl"))
    with pytest.raises(ValueError, match="--rollout-reload and --rollout-transfer nccl"):
        run(toy, stand_in, tmp_path / "b", train, rollout_reload="true")
    stand_in.absent = {"/init_weight_transfer_engine"}
    with pytest.raises(OSError, match="--weight-transfer-config"):
        run(toy, stand_in, tmp_path / "c", train)
    assert not stand_in.paused
    monkeypatch.delitem(sys.modules, "vllm.distributed.weight_transfer.nccl_common")
    with pytest.raises(ImportError, match="pip install vllm"):
        transfer.check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU"):
        transfer.check()
