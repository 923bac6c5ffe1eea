"""Servers that lie, drip, break off, redirect or answer something else: one clear line each.

A server of this file answers every request as one case says. What it is asked for: two samples of
at most four tokens.
"""

import json
import math
import os
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from config import RolloutConfig
from data.templates import Template
from data.tokenizer import load_tokenizer
from sampling import server
from sampling.reload import reload_words, run_command
from sampling.server import Server

pause = time.sleep  # which the tests take out of the client
OK = {"token_ids": [40, 41, 42], "finish_reason": "length", "index": 0}


def http(body: bytes, code: str = "200 OK", headers: str = "") -> bytes:
    """Return a whole HTTP reply."""
    length = f"Content-Length: {len(body)}\r\n"
    return f"HTTP/1.1 {code}\r\n{length}{headers}Connection: close\r\n\r\n".encode() + body


def samples(*choices: dict) -> bytes:
    """Return a reply with choices; {} stands for a good one."""
    listed = [{**OK, "index": i, **choice} for i, choice in enumerate(choices)]
    return http(json.dumps({"choices": listed}).encode())


class Liar(socketserver.ThreadingTCPServer):
    """A server whose replies to POST requests are given one after another; the last repeats."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: list = []
        self.requests: list[str] = []
        self.body: dict = {}  # of the last request
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, address):
        pass  # clients that hang up


class _Handler(socketserver.StreamRequestHandler):
    def handle(self):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.rfile.read(1)
        text = head.decode()
        self.server.requests.append(text)
        if text.startswith("GET"):
            self.wfile.write(http(json.dumps({"data": [{"id": "tiny"}]}).encode()))
            return
        length = int(text.lower().partition("content-length: ")[2].partition("\r")[0])
        self.server.body = json.loads(self.rfile.read(length))
        replies = self.server.replies
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if callable(reply):
            reply(self.wfile)
        else:
            self.wfile.write(reply)


@pytest.fixture(scope="module")
def liar():
    stand_in = Liar()
    yield stand_in
    stand_in.shutdown()
    stand_in.server_close()


@pytest.fixture
def client(liar: Liar, toy: Path, monkeypatch) -> Server:
    monkeypatch.setattr(server.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    template = Template("plain", load_tokenizer(toy / "model"))
    config = RolloutConfig(rollout_url=[liar.url], max_new_tokens=4, rollout_timeout=1.0)
    liar.replies, liar.requests = [], []
    return Server(template, config, config.rollout_url[0])


def drip(wfile) -> None:
    """Send a good reply, a byte every tenth of a second: no single wait is long."""
    for byte in samples({}, {}):
        wfile.write(bytes([byte]))
        wfile.flush()
        pause(0.1)


def drip_headers(wfile) -> None:
    wfile.write(b"HTTP/1.1 200 OK\r\n")
    for i in range(100):
        wfile.write(f"X-{i}: y\r\n".encode())
        wfile.flush()
        pause(0.1)


def hang(wfile) -> None:
    pause(3)


def flood(wfile) -> None:
    wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b'{"choices": "')
    for _ in range(200):
        wfile.write(b"x" * 10_000)


HALF = samples({}, {})[:-20]
# reply -> what the error says; all tried once: a second request would not mend them.
REFUSED: dict[str, tuple[bytes | Callable, str]] = {
    "redirect": (
        http(b"", "302 Found", "Location: http://e.example/x\r\n"),
        "redirects to http",
    ),
    "permanent": (
        http(b"", "301 Moved", "Location: http://e.example/\r\n"),
        "redirects to http",
    ),
    "see other": (http(b"", "303 See Other", "Location: https://e.example/\r\n"), "redirects to"),
    "temporary": (http(b"", "307 Temporary", "Location: http://e.example/\r\n"), "redirects to"),
    "lasting": (http(b"", "308 Permanent", "Location: http://e.example/\r\n"), "redirects to"),
    "same host": (http(b"", "302 Found", "Location: /v2/completions\r\n"), "redirects to"),
    "unauthorised": (http(b"who are you", "401 Unauthorized"), "refused: 401: who are you"),
    "not found": (http(b"no such model", "404 Not Found"), "refused: 404: no such model"),
    "too long": (http(b"context 2048", "400 Bad Request"), "refused: 400: context 2048"),
    "list": (http(b"[1, 2]"), r"a reply that is no object: \[1, 2\]"),
    "number": (http(b"7"), "a reply that is no object: 7"),
    "null": (http(b"null"), "a reply that is no object: None"),
    "no choices": (http(b"{}"), "returned 0 samples: asked for 2"),
    "text choices": (http(b'{"choices": "a"}'), "choices that are no list of objects: a"),
    "null choices": (http(b'{"choices": null}'), "choices that are no list of objects: None"),
    "odd choice": (http(b'{"choices": [1, 2]}'), "choices that are no list of objects"),
    "one": (samples({}), "returned 1 samples: asked for 2"),
    "three": (samples({}, {}, {}), "returned 3 samples: asked for 2"),
    "twins": (samples({}, {"index": 0}), r"samples numbered \[0, 0\]"),
    "gap": (samples({}, {"index": 2}), r"samples numbered \[0, 2\], not 0 to 1"),
    "odd index": (samples({}, {"index": "b"}), r"samples numbered \[0, 'b'\]"),
    "float ids": (samples({}, {"token_ids": [1.5]}), r"no list of whole numbers: \[1.5\]"),
    "text ids": (samples({}, {"token_ids": ["40"]}), "no list of whole numbers"),
    "true ids": (samples({}, {"token_ids": [True]}), "no list of whole numbers"),
    "ids in a text": (samples({}, {"token_ids": "40 41"}), "no list of whole numbers: 40 41"),
    "negative": (samples({}, {"token_ids": [40, -1]}), "the token -1, but the tokenizer has"),
    "beyond": (samples({}, {"token_ids": [10**6]}), "the token 1000000, but the tokenizer has"),
    "huge": (samples({}, {"token_ids": [2**70]}), "but the tokenizer has"),
    "more": (samples({}, {"token_ids": [40] * 5}), "returned 5 tokens: asked for at most 4"),
    "named more": (
        samples({}, {"token_ids": None, "logprobs": {"tokens": ["token_id:40"] * 6}}),
        "returned 6 tokens: asked for at most 4",
    ),
    "nothing": (samples({}, {"token_ids": []}), "an empty sample that did not end"),
    "odd logprobs": (samples({}, {"logprobs": [1]}), r"logprobs that are no object: \[1\]"),
    "odd tokens": (samples({}, {"logprobs": {"tokens": 3}}), "tokens that are no list: 3"),
    "odd values": (
        samples({}, {"logprobs": {"token_logprobs": "a"}}),
        "token_logprobs that are no",
    ),
    "odd text": (samples({}, {"token_ids": None, "text": 5}), "a text that is none: 5"),
}
# replies that may be better the next time -> what the error says after all tries
REPEATED: dict[str, tuple[bytes | Callable, str]] = {
    "busy": (http(b"later", "503 Busy"), r"no answer in 4 tries \(503: later\)"),
    "crashed": (http(b"oops", "500 Error"), r"no answer in 4 tries \(500: oops\)"),
    "too many": (http(b"slow down", "429 Too Many"), r"4 tries \(429: slow down\)"),
    "timed out": (http(b"", "408 Timeout"), r"4 tries \(408"),
    "gateway": (http(b"<html>", "502 Bad Gateway"), r"4 tries \(502: <html>"),
    "breaks off": (HALF, "IncompleteRead|no answer in 4 tries"),
    "no json": (http(b"<html>hello</html>"), "no answer in 4 tries .Expecting value"),
    "half a json": (http(b'{"choices": ['), "no answer in 4 tries"),
    "deep json": (http(b"[" * 100_000), "no answer in 4 tries"),
    "not utf-8": (http(b'{"a": "\xff"}'), "no answer in 4 tries"),
    "empty": (http(b""), "no answer in 4 tries"),
    "hangs up": (b"", "no answer in 4 tries"),
    "no http": (b"SSH-2.0-OpenSSH\r\n", "no answer in 4 tries"),
    "odd status": (b"HTTP/1.1 abc\r\n\r\n", "no answer in 4 tries"),
    "half a header": (b"HTTP/1.1 200 OK\r\nContent-Le", "no answer in 4 tries"),
    "long header": (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000, "no answer in 4 tries"),
}
SLOW = {"drips": drip, "drips headers": drip_headers, "hangs": hang}


def ask(client: Server) -> list:
    return client.complete([2, 30], 1, 2, 1.0)


@pytest.mark.parametrize("case", REFUSED)
def test_what_was_not_asked_for_is_refused_at_once(case: str, client: Server, liar: Liar):
    """One request, one OSError that says what was wrong."""
    reply, complaint = REFUSED[case]
    liar.replies = [reply]
    with pytest.raises(OSError, match=complaint):
        ask(client)
    assert len(liar.requests) == 2  # /v1/models, and one completion


@pytest.mark.parametrize("case", REPEATED)
def test_what_may_be_better_is_asked_again(case: str, client: Server, liar: Liar):
    """Four times, then one OSError; a good reply in between is taken."""
    reply, complaint = REPEATED[case]
    liar.replies = [reply]
    with pytest.raises(OSError, match=complaint):
        ask(client)
    assert len(liar.requests) == 1 + server.TRIES
    liar.replies = [reply, samples({}, {})]
    assert [sample.tokens for sample in ask(client)] == [[40, 41, 42]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_a_request_has_one_deadline(case: str, client: Server, liar: Liar, monkeypatch):
    """Whatever the server sends in the meantime."""
    monkeypatch.setattr(server, "TRIES", 1)
    client.config.rollout_timeout = 0.3
    liar.replies = [SLOW[case]]
    started = time.monotonic()
    with pytest.raises(OSError, match=r"no whole reply within 0\.3 s|timed out"):
        ask(client)
    assert time.monotonic() - started < 2


def test_a_reply_has_a_largest_size(client: Server, liar: Liar, monkeypatch):
    monkeypatch.setattr(server, "LARGEST_REPLY", 1 << 20)
    liar.replies = [flood]
    with pytest.raises(OSError, match="a reply of more than 1 MB"):
        ask(client)


def test_the_key_reaches_no_other_host(client: Server, liar: Liar):
    """A redirect to a second server, which would have been told the key."""
    other = Liar()
    other.replies = [samples({}, {})]
    liar.replies = [http(b"", "302 Found", f"Location: {other.url}/v1/completions\r\n")]
    with pytest.raises(OSError, match="redirects to"):
        ask(client)
    assert "Bearer secret" in liar.requests[-1] and not other.requests
    other.shutdown()
    other.server_close()


def test_a_request_says_what_may_be_drawn(client: Server, liar: Liar):
    """top_k, top_p, min_tokens and stop go with it; a text that ended a sample adds no end token.

    Log-probs of a truncated distribution are not reported: those drawn with are unknown.
    """
    liar.replies = [samples({}, {})]
    ask(client)
    body = liar.body
    assert (body["top_k"], body["top_p"]) == (-1, 1.0)
    assert "min_tokens" not in body and "stop" not in body
    config = client.config
    config.top_k, config.top_p, config.min_new_tokens, config.stop = 7, 0.9, 2, ["END"]
    by_text = {"token_ids": [40, 41], "finish_reason": "stop", "stop_reason": "END"}
    liar.replies = [samples(by_text, {"token_ids": [40, 41, 42], "finish_reason": "length"})]
    one, cut = ask(client)
    body = liar.body
    assert (body["top_k"], body["top_p"], body["min_tokens"]) == (7, 0.9, 2)
    assert body["stop"] == ["END"] and body["include_stop_str_in_output"]
    assert one.tokens == [40, 41] and one.ended and not cut.ended
    assert all(math.isnan(x) for x in one.logps)
    config.stop = [client.template.tokenizer.decode([41])]  # an engine that gives no reason
    del by_text["stop_reason"]
    liar.replies = [samples(by_text, by_text)]
    assert ask(client)[0].tokens == [40, 41] and ask(client)[0].ended


def test_tokens_after_the_end_are_refused(client: Server, liar: Liar):
    end = client.template.end
    liar.replies = [samples({}, {"token_ids": [40, end, 41], "finish_reason": "stop"})]
    with pytest.raises(OSError, match=f"returned 1 tokens after the end token {end}"):
        ask(client)


def test_log_probs_that_cannot_be_are_unknown_and_counted(client: Server, liar: Liar, capsys):
    """Above 0, infinite, NaN, no number; rounding above 0 is 0. Said once."""
    bad = [[0.5, -1.0, -2.0], [-math.inf, math.nan, -1.0], ["a", True, None], [1e-7, -1.0, -1.0]]
    liar.replies = [samples(*({"logprobs": {"token_logprobs": logps}} for logps in bad))]
    drawn = client.complete([2, 30], 1, 4, 1.0)
    known = [[not math.isnan(x) for x in sample.policy_logps] for sample in drawn]
    assert known == [[False, True, True], [False, False, True], [False] * 3, [True] * 3]
    assert drawn[3].policy_logps[0] == 0.0
    assert client.bad_logps == 5  # None is unknown, not wrong
    assert capsys.readouterr().out.count("above 0 or not finite") == 1


# ---- reloading -------------------------------------------------------------------------------


def reload(client: Server, folder: Path) -> None:
    run_command(client.config.rollout_reload, folder, client.config.rollout_timeout)


def test_a_reload_may_leave_a_daemon(client: Server, tmp_path: Path):
    """The command ends, its child lives on and holds the output open: nobody waits for it."""
    child = f"import time; open({str(tmp_path / 'began')!r}, 'w'); time.sleep(20)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    script = tmp_path / "start.py"
    script.write_text(parent)
    client.config.rollout_reload = f"{sys.executable} {script} {{folder}}"
    client.config.rollout_timeout = 15.0
    started = time.monotonic()
    reload(client, tmp_path)
    assert time.monotonic() - started < 10


def test_a_folder_is_an_argument_and_never_code(client: Server, tmp_path: Path):
    """Blanks, quotes, $ and ; of a path arrive as they are, in argument and environment."""
    folder = tmp_path / "a b'; touch pwned; echo $HOME \""
    folder.mkdir()
    script = tmp_path / "show.py"
    out = tmp_path / "seen.json"
    script.write_text(
        "import json, os, sys\n"
        f"json.dump([sys.argv[1:], os.environ['PLUMB_FOLDER']], open({str(out)!r}, 'w'))\n"
    )
    client.config.rollout_timeout = 20.0
    client.config.rollout_reload = f"{sys.executable} {script} --path={{folder}} {{folder}}"
    reload(client, folder)
    assert json.loads(out.read_text()) == [[f"--path={folder}", str(folder)], str(folder)]
    for command in (
        "sh -c 'curl x/{folder}'",
        'bash -lc "load {folder}"',
        "python -c 'f({folder})'",
    ):
        with pytest.raises(ValueError, match="stands inside a program: read the environment's"):
            reload_words(command)
    with pytest.raises(ValueError, match="No closing quotation"):
        reload_words("load '{folder}")
    assert reload_words("sh -c 'load $PLUMB_FOLDER' {folder}")[-1] == "{folder}"


def test_a_reload_that_hangs_or_fails_is_named(client: Server, tmp_path: Path):
    """With the end of its output; a process that hangs is killed with its children."""
    client.config.rollout_timeout = 0.5
    client.config.rollout_reload = "sh -c 'sleep 30 & wait'"
    with pytest.raises(OSError, match=r"did not end within 0\.5 s"):
        reload(client, tmp_path)
    client.config.rollout_timeout = 20.0
    client.config.rollout_reload = "sh -c 'echo no such engine >&2; exit 3'"
    with pytest.raises(OSError, match=r"failed \(3\): no such engine"):
        reload(client, tmp_path)
    client.config.rollout_reload = "no-such-program {folder}"
    with pytest.raises(OSError, match="did not run"):
        reload(client, tmp_path)
    assert not os.path.exists("pwned")


def test_a_port_that_nobody_listens_on(toy: Path, monkeypatch):
    monkeypatch.setattr(server.time, "sleep", lambda seconds: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    template = Template("plain", load_tokenizer(toy / "model"))
    with pytest.raises(OSError, match=r"v1/models: no answer in 4 tries .*is the server up\?"):
        Server(template, RolloutConfig(rollout_timeout=1.0), url)
