"""scripts/: they parse, refuse missing settings, train, stop on a signal and resume."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runtime

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_parses_it(script: Path):
    """`bash -n` finds no fault, and the file is executable."""
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize(
    ("command", "env", "complaint"),
    [
        (["one_node.sh"], {}, "usage: scripts/one_node.sh"),
        (["nodes.sh"], {}, "usage: NODES=2"),
        (["nodes.sh", "train_dpo.py"], {}, "NODES is missing"),
        (["nodes.sh", "train_dpo.py"], {"NODES": "2"}, "HEAD is missing"),
        (["nodes.sh", "train_dpo.py"], {"NODES": "2", "HEAD": "a:1"}, "RUN is missing"),
        (["slurm.sbatch"], {}, "usage: sbatch"),
        (["slurm.sbatch", "train_dpo.py"], {}, "run this with sbatch"),
        (["vllm_server.sh"], {}, "usage: scripts/vllm_server.sh"),
        (["vllm_server.sh", "--wait", "http://127.0.0.1:1"], {"SERVER_WAIT": "0"}, "not answer"),
        (["with_vllm.sh"], {}, "usage: scripts/with_vllm.sh"),
        (["with_vllm.sh", "train_ppo.py", "--out", "x"], {}, "--model DIR is missing"),
    ],
)
def test_missing_settings_are_named(command: list[str], env: dict[str, str], complaint: str):
    """Nothing starts without the settings it needs."""
    words = ["bash", str(ROOT / "scripts" / command[0]), *command[1:]]
    done = subprocess.run(
        words, env={"PATH": os.environ["PATH"], **env}, capture_output=True, text=True
    )
    assert done.returncode and complaint in done.stderr


def start(script: str, toy: Path, out: Path, steps: int, **env: str) -> subprocess.Popen:
    """Start a script of scripts/ on train_dpo.py, --tp 2, two processes, the toy world."""
    words = [
        f"--model={toy / 'model'}",
        f"--data={toy / 'world' / 'preferences.jsonl'}",
        f"--out={out}",
    ]
    words += [
        "--tp=2",
        f"--max-steps={steps}",
        "--batch-size=4",
        "--epochs=100",
        "--lr=1e-3",
        "--warmup=0",
    ]
    here = {
        **os.environ,
        "PYTHON": sys.executable,
        "PROCESSES": "2",
        "OMP_NUM_THREADS": "1",
        "RESTARTS": "0",
        **env,
    }
    return subprocess.Popen(
        [str(ROOT / "scripts" / script), "train_dpo.py", "--device=cpu", *words],
        cwd=ROOT,
        env=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps_of(out: Path) -> list[int]:
    """Return the optimizer steps in metrics.jsonl."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [step for line in lines if line.endswith("}") if (step := json.loads(line)["step"])]


def test_one_node_stops_and_two_resume(toy: Path, tmp_path: Path):
    """SIGTERM to one_node.sh saves; two nodes.sh, as if on two machines, resume and finish."""
    running = start("one_node.sh", toy, tmp_path, steps=1000)
    until = time.monotonic() + 120
    while time.monotonic() < until and running.poll() is None and len(steps_of(tmp_path)) < 2:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=120)
    saved = [int(path.parent.name[5:]) for path in tmp_path.glob("step_*/manifest.json")]
    assert saved and max(saved) >= 2, output
    assert not (tmp_path / "final").exists()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        head = f"localhost:{free.getsockname()[1]}"
    env = {"NODES": "2", "HEAD": head, "RUN": "test", "PROCESSES": "1", "GLOO_SOCKET_IFNAME": "lo"}
    both = [
        start("nodes.sh", toy, tmp_path, max(saved) + 3, IS_HEAD=is_head, **env) for is_head in "10"
    ]
    outputs = [node.communicate(timeout=120)[0] for node in both]
    assert [node.returncode for node in both] == [0, 0], "\n".join(outputs)
    assert "resumed from" in "".join(outputs)
    assert steps_of(tmp_path) == list(range(1, max(saved) + 4))
    assert (tmp_path / "final" / "model.safetensors").exists()


STUBS = {
    "scontrol": 'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> log; fi',
    "srun": 'trap "sleep 0.5; echo saved >> log; exit 1" TERM; echo "$HEAD $NODES $RUN" > log; '
    "sleep 30 & wait",
}


@pytest.mark.parametrize("signalled", [True, False])
def test_slurm_saves_before_it_requeues(tmp_path: Path, signalled: bool):
    """USR1 to the batch shell reaches the tasks as TERM; the job is requeued after they have saved.

    Slurm's commands are stubs. A run that fails by itself is not requeued; its status is the job's.
    """
    for name, text in STUBS.items():
        (tmp_path / name).write_text(
            f"#!/bin/bash\n{text if signalled or name == 'scontrol' else 'touch log; exit 3'}\n"
        )
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "4711",
    }
    env |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    job = subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "slurm.sbatch"), "train_dpo.py"], env=env
    )
    log = tmp_path / "log"
    until = time.monotonic() + 20
    while time.monotonic() < until and not (log.exists() and (log.read_text() or not signalled)):
        time.sleep(0.05)
    if signalled:
        job.send_signal(signal.SIGUSR1)
    status = job.wait(timeout=30)
    lines = log.read_text().splitlines()
    if signalled:
        assert status == 0 and lines == ["node7:24711 2 4711.0", "saved", "requeue 4711"]
    else:
        assert status == 3 and lines == []


SERVER = """#!/bin/bash
echo "$@" > {folder}/asked
[ -e {folder}/broken ] && { echo "no kernel for this machine"; exit 1; }
exec {python} -c "
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header('Content-Length', '2')
        self.end_headers()
        self.wfile.write(b'{}')
http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()" {port}
"""
TRAINER = """#!/bin/bash
if [ "$1" = -c ]; then exec {python} "$@"; fi
trap 'echo saved >> {folder}/log; exit 0' TERM
echo "$@" >> {folder}/log
[ -e {folder}/long ] && { sleep 60 & wait; }
exit 3
"""


@pytest.mark.parametrize("way", ["ends", "is stopped", "never starts", "port is taken"])
def test_a_server_ends_with_the_training(way: str, tmp_path: Path):
    """with_vllm.sh: the training gets the URL, its status is kept, and no server is left behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, text in {"server": SERVER, "trainer": TRAINER}.items():
        for word, value in {"folder": tmp_path, "python": sys.executable, "port": port}.items():
            text = text.replace("{" + word + "}", str(value))
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    if way == "is stopped":
        (tmp_path / "long").touch()
    if way == "never starts":
        (tmp_path / "broken").touch()
    env = {**os.environ, "SERVER_PYTHON": str(tmp_path / "server"), "SERVER_PORT": port}
    env |= {
        "PYTHON": str(tmp_path / "trainer"),
        "PROCESSES": "1",
        "SERVER_ARGS": "--max-model-len 9",
    }
    env |= {"SERVER_LOG": str(tmp_path / "vllm.log"), "SERVER_WAIT": "60"}
    if way == "port is taken":
        other = subprocess.Popen([str(tmp_path / "server")])
        until = time.monotonic() + 20
        while time.monotonic() < until and not answers(int(port)):
            time.sleep(0.05)
    words = ["scripts/with_vllm.sh", "train_reinforce.py", "--model", "sft", "--out", "x"]
    running = subprocess.Popen(
        words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    log = tmp_path / "log"
    if way == "is stopped":
        until = time.monotonic() + 60
        while time.monotonic() < until and not log.exists():
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=90)
    if way in ("ends", "is stopped"):
        lines = log.read_text().splitlines()
        assert running.returncode == (3 if way == "ends" else 0), output
        assert lines[0].endswith(f"--model sft --out x --rollout-url http://127.0.0.1:{port}")
        assert lines[1:] == ([] if way == "ends" else ["saved"])
        asked = (tmp_path / "asked").read_text()
        assert "--model sft" in asked and "--max-model-len 9" in asked
    else:
        complaint = {"never starts": "vLLM ended before it answered", "port is taken": "already"}
        assert running.returncode == 1 and complaint[way] in output and not log.exists()
    assert answers(int(port)) == (way == "port is taken")
    if way == "port is taken":
        other.kill()
        other.wait()


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_slurm_gives_its_last_nodes_to_servers(tmp_path: Path):
    """The others train with the servers' addresses. Slurm's commands are stubs."""
    stubs = {
        "scontrol": "echo node1; echo node2; echo node3",
        "srun": 'echo "$HEAD $NODES $@" >> log',
        "scripts/vllm_server.sh": 'echo "$@" >> log',
    }
    (tmp_path / "scripts").mkdir()
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
    env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-3]", "SLURM_JOB_NUM_NODES": "3"}
    words = ["bash", str(ROOT / "scripts" / "slurm.sbatch"), "train_ppo.py", "--model", "sft"]
    subprocess.run(words, env={**env, "SERVER_NODES": "2"}, check=True, timeout=30)
    lines = "\n".join(sorted((tmp_path / "log").read_text().splitlines()))
    urls = "http://node2:40007 http://node3:40007"
    assert f"--wait {urls}" in lines
    assert "node1:20007 1 --overlap --nodes 2 --nodelist node2,node3" in lines
    assert "node1:20007 1 --overlap --nodes 1 --nodelist node1 " in lines
    assert f"train_ppo.py --model sft --rollout-url {urls}" in lines
    done = subprocess.run(words, env={**env, "SERVER_NODES": "3"}, capture_output=True, text=True)
    assert done.returncode == 1 and "leaves no node to train on" in done.stderr


def test_an_echo_of_a_signal_is_not_a_second_signal(monkeypatch):
    """Slurm signals every process and torchrun its own again: one request. A later one ends it."""
    fork = multiprocessing.get_context("fork")

    def process(echo: float) -> None:
        monkeypatch.setattr(runtime, "ECHO_SECONDS", echo)
        stop = runtime.Stop(0.0)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        os._exit(0 if stop.reason == "SIGTERM" else 1)

    codes = []
    for echo in (3.0, 0.01):
        running = fork.Process(target=process, args=(echo,))
        running.start()
        running.join(10)
        codes.append(running.exitcode)
    assert codes == [0, -signal.SIGTERM]
