"""A judge behind an OpenAI-compatible server: --reward judge:http://host:8000.

    judge:http://host:8000                  /v1/chat/completions: the server's own chat template
    judge:http://host:8000/v1/completions   the question as plain text, for a base model

One request a question, for one token and the log-probs of the TOP likeliest ones. A label is a
reply of one token, with or without a space before it; both count. One that is not among these TOP
has no probability here: less than the least of them. Labels of several tokens are never seen, and
count as unparsable.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from config import RolloutConfig
from sampling.judge import Judge, read_template
from sampling.server import BadReply, Server

AT_ONCE = 64  # requests in flight
TOP = 20  # log-probs a reply: the most that chat APIs give
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


class JudgeServer(Server):
    """A server that says how likely each label is as the reply to a question."""

    def __init__(self, url: str):
        plain = url.rstrip("/").endswith(PLAIN)
        self.path = PLAIN if plain else CHAT
        super().__init__(None, RolloutConfig(), url.rstrip("/").removesuffix(self.path))

    def label_logps(self, question: str, labels: list[str]) -> list[float]:
        """Return the log-prob of each label as the reply, -inf where it was not reported.

        BadReply: the server reports no log-probs.
        """
        body = {"model": self.model, "max_tokens": 1, "temperature": 1.0, "seed": 0}
        if self.path == CHAT:
            messages = [{"role": "user", "content": question}]
            body |= {"messages": messages, "logprobs": True, "top_logprobs": TOP}
        else:
            body |= {"prompt": question, "logprobs": TOP}
        reply = self._request(self.path, body)
        try:
            pairs = _likeliest(reply["choices"][0]["logprobs"], self.path)
        except (LookupError, TypeError, AttributeError, ValueError):
            raise BadReply(
                f"{self.url}{self.path} returned no log-probs of the likeliest tokens: "
                f"{str(reply)[:200]}"
            ) from None
        table = dict.fromkeys(labels, 0.0)
        for token, logp in pairs:
            if token.strip() in table:
                table[token.strip()] += math.exp(min(logp, 0.0))
        return [math.log(chance) if chance else -math.inf for chance in table.values()]


def _likeliest(logprobs: Any, path: str) -> list[tuple[str, float]]:
    """Return the likeliest first tokens of a reply, as texts, with their log-probs."""
    if path == PLAIN:
        pairs = list(logprobs["top_logprobs"][0].items())
    else:
        entries = logprobs["content"][0]["top_logprobs"]
        pairs = [(entry["token"], entry["logprob"]) for entry in entries]
    if not pairs or not all(type(token) is str for token, _ in pairs):
        raise ValueError
    return [(token, float(logp)) for token, logp in pairs if not math.isnan(logp)]


def ask_server(url: str, template: str | Path, asks: bool = True) -> Judge:
    """Return a server as judge. asks: False on ranks that leave the asking to another one.

    ValueError: two labels, of which one begins the other. OSError: the server does not answer.
    """
    read = read_template(template)
    labels = [label.strip() for label in read.labels]
    for i, one in enumerate(labels):
        for k, other in enumerate(labels):
            if i != k and other.startswith(one):
                raise ValueError(
                    f"{template}: label {other!r} begins with {one!r}: choose labels of which none "
                    "begins another"
                )
    try:
        server = JudgeServer(url) if asks else None
    except OSError as error:
        raise OSError(_named(error)) from None

    def ask(questions: list[str]) -> np.ndarray | None:
        if server is None:
            return None
        try:
            with ThreadPoolExecutor(max(1, min(AT_ONCE, len(questions)))) as pool:
                rows = list(pool.map(lambda one: server.label_logps(one, labels), questions))
        except OSError as error:
            raise OSError(_named(error)) from None
        return np.array(rows, np.float64).reshape(len(questions), len(labels))

    return Judge(read, ask)


def _named(error: OSError) -> str:
    """Return the message of a server's error under the flag that names this server."""
    return "--reward judge:" + str(error).removeprefix("--rollout-url ")
