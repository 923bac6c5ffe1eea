"""New weights for vLLM over NCCL, from a GPU here to the server's: --rollout-transfer nccl.

The server is started with --weight-transfer-config '{"backend": "nccl"}' and sees no disk of this
process, which reads OUT/rollout and sends weight after weight. The protocol is that of vLLM 0.32:

    GET  /get_world_size                 workers of the server
    POST /init_weight_transfer_engine    once: all workers meet this process, rank 0, at an address
    POST /start_weight_update
    POST /update_weights                 names, types, shapes; meanwhile rank 0 broadcasts each
    POST /finish_weight_update

vLLM's own communicator is used on this side as well. Tested against stand-ins and the fields of
vLLM's messages; never run on NCCL.
"""

import socket
import urllib.parse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sampling.together import start
from weights.files import open_weights, weight_files

# (path, body or None for a GET) -> the reply of a server.
Request = Callable[[str, dict | None], dict]


def check() -> None:
    """Raise ValueError or ImportError, with the fix, where this process cannot send over NCCL."""
    if not torch.cuda.is_available():
        raise ValueError("--rollout-transfer nccl needs a GPU: use folder, and a disk in common")
    _communicator()


def _communicator() -> Callable[[dict], Any]:
    """Return a function that joins a NCCL group as rank 0 with this thread's GPU, in any thread."""
    try:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init
    except ImportError as error:
        raise ImportError(
            "--rollout-transfer nccl uses vLLM's communicator on this side as well: pip install "
            f"vllm==0.32.* ({error})"
        ) from None
    device = torch.cuda.current_device()

    def join(place: dict) -> Any:
        torch.cuda.set_device(device)  # a new thread has the first
        return trainer_init(place)

    return join


class Link:
    """A NCCL group of this process, rank 0, with the workers of one server."""

    def __init__(self, url: str, request: Request):
        self.request = request
        workers = int(request("/get_world_size", None)["world_size"])
        place = {
            "master_address": _own_address(url),
            "master_port": _free_port(),
            "world_size": 1 + workers,
        }
        info = {**place, "rank_offset": 1, "packed": False}
        joining = start(partial(_communicator(), place))  # both sides wait for each other
        request("/init_weight_transfer_engine", {"init_info": info})  # a refusal ends the wait
        self.group = joining.result()

    def send(self, folder: Path) -> None:
        """Send the weights of a folder, in the order of their names."""
        files = weight_files(folder)
        opened = {path: open_weights(path) for path in set(files.values())}
        names = sorted(files)
        slices = {name: opened[files[name]].get_slice(name) for name in names}
        info = {
            "names": names,
            "dtype_names": [_dtype_name(slices[name].get_dtype()) for name in names],
            "shapes": [list(slices[name].get_shape()) for name in names],
        }
        self.request("/start_weight_update", {})
        answer = start(partial(self.request, "/update_weights", {"update_info": info}))
        for name in names:
            weight = opened[files[name]].get_tensor(name)
            self.group.broadcast(weight.to(self.group.device), src=0)
        answer.result()  # the workers have all of them
        self.request("/finish_weight_update", {})


def _dtype_name(stored: str) -> str:
    """Return torch's name of a type of safetensors: BF16 -> bfloat16."""
    return {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}[stored]


def _own_address(url: str) -> str:
    """Return the address at which a server can reach this machine: that of the way to it."""
    target = urllib.parse.urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((target.hostname, target.port or 80))  # nothing is sent
        return str(way.getsockname()[0])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
