"""Names of the hub: a server on this machine speaks its protocol, and scripts train from it."""

import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

import hub

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers for the repositories in a folder: models/org/name and datasets/org/name."""

    protocol_version = "HTTP/1.1"

    def __init__(self, root: Path, *args):
        self.root = root
        super().__init__(*args)

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:  # noqa: N802 - named by the class above
        self.answer(body=False)

    def do_GET(self) -> None:  # noqa: N802
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        words = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/").split("/")
        if words[0] == "api":
            self.send(*self.about(words[1:]), body=body)
            return
        kind = words.pop(0) if words[0] == "datasets" else "models"
        file = self.root / kind / "/".join(words[:2]) / "/".join(words[4:])
        if words[2:3] != ["resolve"] or not file.is_file():
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body=body)
            return
        content = file.read_bytes()
        headers = {"X-Repo-Commit": SHA, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        self.send(200, content, headers, body=body)

    def about(self, words: list[str]) -> tuple[int, bytes, dict]:
        """Return status, body and headers of what the interface says about a repository."""
        folder = self.root / words[0] / "/".join(words[1:3])
        if not folder.is_dir():
            return 404, b'{"error": "not found"}', {"X-Error-Code": "RepoNotFound"}
        names = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
        about = {
            "id": "/".join(words[1:3]),
            "sha": SHA,
            "private": False,
            "siblings": [{"rfilename": name} for name in names],
        }
        if "tree" in words:
            sizes = {name: (folder / name).stat().st_size for name in names}
            listed = [
                {"type": "file", "path": name, "size": sizes[name], "oid": SHA} for name in names
            ]
            return 200, json.dumps(listed).encode(), {}
        return 200, json.dumps(about).encode(), {}

    def send(self, status: int, content: bytes, headers: dict, body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture(scope="module")
def environment(toy: Path, tmp_path_factory):
    """Return the environment of a process whose hub is a server here, with a model and rows."""
    root = tmp_path_factory.mktemp("hub")
    model = root / "models" / "ada" / "tiny-llama"
    model.mkdir(parents=True)
    for file in (toy / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "weights.bin").write_bytes(b"never fetched")
    rows = root / "datasets" / "ada" / "pairs" / "data"
    rows.mkdir(parents=True)
    lines = (toy / "world" / "preferences.jsonl").read_text().splitlines(keepends=True)
    (rows / "train-00000-of-00002.jsonl").write_text("".join(lines[:20]))
    (rows / "train-00001-of-00002.jsonl").write_text("".join(lines[20:30]))
    (rows / "test-00000-of-00001.jsonl").write_text("".join(lines[30:]))
    (rows.parent / "README.md").write_text("rows")
    handler = functools.partial(Handler, root)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path_factory.mktemp("cache")),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    server.shutdown()


def train(environment: dict, out: Path, *words: str) -> subprocess.CompletedProcess:
    """Run two steps of DPO in a process of its own."""
    command = [sys.executable, "train_dpo.py", "--device", "cpu", "--max-steps", "2"]
    return subprocess.run(
        [*command, "--batch-size", "4", "--out", str(out), *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_models_and_data_by_their_names(environment: dict, tmp_path: Path):
    """Weights and rows come through the package's cache; then without a network, from it."""
    words = ["--model", "ada/tiny-llama", "--data", "ada/pairs", "--eval-data", "ada/pairs:test"]
    done = train(environment, tmp_path / "out", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "train-00000-of-00002.jsonl, train-00001-of-00002.jsonl: 30 rows" in done.stdout
    assert "test-00000-of-00001.jsonl: 18 rows" in done.stdout
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()
    cached = [path.name for path in Path(environment["HF_HOME"]).rglob("*")]
    assert "model.safetensors" in cached and "weights.bin" not in cached
    model = ["--model", "ada/tiny-llama", "--data", "nowhere.jsonl"]
    offline = train({**environment, "HF_HUB_OFFLINE": "1"}, tmp_path / "off", *model)
    assert offline.stderr.startswith("error: nowhere.jsonl: no such file"), offline.stderr


def test_what_the_hub_does_not_have_is_one_line(environment: dict, tmp_path: Path):
    """A model, a split, a network and the package: each is named with what helps."""
    done = train(environment, tmp_path / "a", "--model", "ada/none", "--data", "x.jsonl")
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "error: ada/none is nothing on this disk, and the hub does not give" in done.stderr
    assert "hf auth login" in done.stderr and "hf download ada/none --local-dir" in done.stderr
    words = ["--model", "ada/tiny-llama", "--data", "ada/pairs:validation"]
    done = train(environment, tmp_path / "b", *words)
    assert "no split 'validation' among its files (data/test-00000-of-00001" in done.stderr
    away = {**environment, "HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path)}
    done = train(away, tmp_path / "c", *words)
    assert len(done.stderr.strip().splitlines()) == 1 and "hf download" in done.stderr


def test_without_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub, or .* hf download a/b"):
        hub.model_folder("a/b")
    with pytest.raises(ImportError, match="--repo-type dataset"):
        hub.row_files("a/b:test")


def test_what_is_on_this_disk_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Paths, rules and functions stay as they are; a run's folder names its model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sft" / "final").mkdir(parents=True)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text("{}\n")
    for name in ("runs/sft", "rows/my.py", "exact:####", "rows/my.py:good", "/nowhere", "folder"):
        assert hub.model_folder(name) == name
    for name in ("rows/a.jsonl", "rows/*.jsonl", "rows/missing.jsonl", "/x/y/z"):
        assert hub.row_files(name) == [name]
    (tmp_path / "runs" / "sft" / "final" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="runs/sft is the folder of a run: its model is runs/sft/"):
        hub.model_folder("runs/sft")
