"""A stand-in for vLLM and SGLang: an HTTP server that samples from a tiny model in this process."""

import base64
import io
import json
import queue
import shutil
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from data.dataset import from_trees
from data.tokenizer import load_tokenizer
from data.trees import make_batch
from sampling.sampler import generate
from weights.folder import load_model
from weights.peft import load_adapter


class StandIn(ThreadingHTTPServer):
    """Server of /v1/models, /v1/completions and /reload?FOLDER on a tiny model.

    form: how samples are reported: "token_ids", "names" or "text"; "vllm" has token ids, and vLLM's
    own calls for new weights.
    """

    def __init__(self, folder: Path, form: str = "token_ids"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.form, self.requests, self.failures, self.loaded = form, [], [], []
        self.calls: list[str] = []  # of vLLM's own, in order
        self.absent: set[str] = set()  # paths that this server does not have
        self.silent = False  # whether it keeps its experts to itself
        self.context, self.version, self.paused, self.stale = 4096, "default", False, False
        self.folder = self.base = folder
        self.joined: dict = {}  # where it met a trainer, for weights over NCCL
        self.sent: queue.Queue = queue.Queue()  # what the trainer has broadcast to it
        self.scratch: Path | None = None  # folder for them
        self.lock = threading.RLock()
        self.load(folder)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def load(self, folder: Path) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.model = load_model(folder, torch.float32)
        self.loaded.append(str(folder))

    def restart(self) -> None:
        """Come back with the weights that it was started with."""
        with self.lock:
            self.load(self.folder)
            self.version, self.joined = "default", {}

    def die(self) -> None:
        """Answer nobody from now on."""
        self.shutdown()
        self.server_close()

    def call(self, path: str, body: dict) -> dict | None:
        """Answer one of vLLM's own calls; None: there is none of this name."""
        name = path.partition("?")[0]
        if self.form != "vllm" or name in self.absent:
            return None
        self.calls.append(name)
        if name == "/pause":
            self.paused = True
        elif name == "/resume":
            self.paused = False
        elif name == "/collective_rpc":
            assert body["method"] == "reload_weights" and self.paused
            folder = Path(body["kwargs"]["weights_path"])
            if not folder.exists():
                return {"code": 500, "error": "Repo id must be in the form 'repo_name'"}
            with self.lock:
                self.load(folder)
                self.base = folder
            self.stale = True
        elif name == "/v1/load_lora_adapter":
            if "lora_path" not in body:
                return {"code": 400}
            with self.lock:
                self.model = load_model(self.base, torch.float32)
                load_adapter(self.model, Path(body["lora_path"]))
            self.loaded.append(body["lora_path"])
            self.stale = True
        elif name == "/init_weight_transfer_engine":
            self.joined = body["init_info"]
        elif name == "/update_weights":
            assert self.paused and self.joined
            self.load(self.receive(body["update_info"]))
            self.stale = True
        elif name in ("/start_weight_update", "/finish_weight_update"):
            assert self.paused
        elif name == "/reset_prefix_cache":
            self.stale = False
        elif name == "/update_weight_version":
            self.version = body["new_version"]
        else:
            return None
        return {}

    def receive(self, info: dict) -> Path:
        """Take the weights that a trainer broadcasts; return a folder with them."""
        weights = {}
        for name, kind, shape in zip(info["names"], info["dtype_names"], info["shapes"]):
            weight = self.sent.get(timeout=5)
            assert weight.dtype == getattr(torch, kind) and list(weight.shape) == shape
            weights[name] = weight
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        shutil.copytree(self.base, folder, dirs_exist_ok=True)
        save_file(weights, folder / "model.safetensors")
        return folder

    def complete(self, body: dict) -> dict:
        assert not self.paused and not self.stale
        if body.get("echo"):
            return self.echo(body["prompt"])
        seeds = [body["seed"] + k for k in range(body["n"])]
        with self.lock:
            samples = generate(
                self.model,
                [body["prompt"]],
                body["max_tokens"],
                body["temperature"],
                stop_ids=body["stop_token_ids"],
                n=body["n"],
                seeds=seeds,
                keep_experts=bool(self.model.c.experts),
            )
        choices = []
        for i, sample in enumerate(samples):
            choice = {
                "index": i,
                "text": self.tokenizer.decode(sample.tokens),
                "finish_reason": "stop" if sample.ended else "length",
            }
            if self.form in ("token_ids", "vllm"):
                choice |= {
                    "token_ids": sample.tokens,
                    "logprobs": {"token_logprobs": sample.policy_logps},
                }
            if self.form == "names":  # some leave the end token out
                own = slice(0, len(sample.tokens) - sample.ended)
                names = [f"token_id:{token}" for token in sample.tokens[own]]
                choice["logprobs"] = {"tokens": names, "token_logprobs": sample.policy_logps[own]}
            if self.model.c.experts and not self.silent:
                choice["routed_experts"] = self.routed(samples[0].prompt_experts, sample.experts)
            choices.append(choice)
        return {"choices": choices[::-1]}

    def routed(self, prompt: np.ndarray, own: np.ndarray) -> str:
        """Return experts as vLLM reports them: of all layers, of all tokens but the last."""
        c = self.model.c
        sparse = [layer for layer in range(c.layers) if c.sparse(layer)]
        chosen = np.concatenate([prompt, own])[:-1]
        table = np.zeros((len(chosen), c.layers, c.active), np.uint8)
        table[:, sparse] = chosen
        file = io.BytesIO()
        np.save(file, table)
        return base64.b64encode(file.getvalue()).decode()

    def echo(self, ids: list[int]) -> dict:
        """Answer with the log-probs of a prompt's tokens and one token more, as vLLM does."""
        data = from_trees([(ids[:1], [(ids[1:], [1] * len(ids[1:]))])])
        with self.lock, torch.no_grad():
            batch = make_batch(data, [0])
            logps = self.model.logps(self.model(batch), batch).tolist()
        return {"choices": [{"logprobs": {"token_logprobs": [None, *logps, -0.1]}}]}


class Handler(BaseHTTPRequestHandler):
    """Answers of a StandIn."""

    def reply(self, code: int, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        server = self.server
        if self.path == "/get_world_size":
            self.reply(200, {"world_size": 1})
            return
        if self.path == "/weight_info":
            known = server.form == "vllm" and self.path not in server.absent
            self.reply(200 if known else 404, {"weight_version": server.version})
            return
        if self.path.startswith("/reload?"):
            server.load(Path(self.path.partition("?")[2]))
        model = {"id": "tiny"}
        if server.form == "vllm":
            model |= {"owned_by": "vllm", "max_model_len": server.context}
        self.reply(200, {"data": [model]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            answer = self.server.call(self.path, body)
            self.reply(404 if answer is None else answer.get("code", 200), answer or {})
            return
        self.server.requests.append((dict(self.headers), body))
        if self.server.failures:
            self.reply(self.server.failures.pop(0), {"error": "no, thanks"})
        else:
            self.reply(200, self.server.complete(body))

    def log_message(self, *args):
        pass
