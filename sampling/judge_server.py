"""A judge behind an OpenAI-compatible server: --reward judge:http://host:8000.

    judge:http://host:8000                  /v1/chat/completions: the server's own chat template
    judge:http://host:8000/v1/completions   the question as plain text, for a base model
    judge:http://a:8000,http://b:8000       several servers share the questions

One request a question, for one token and the log-probs of the TOP likeliest ones. A label is a
reply of one token, with or without a space before it; both count. One that is not among these TOP
has no probability here: less than the least of them. Labels of several tokens are never seen, and
count as unparsable.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from config import RolloutConfig
from sampling.judge import Judge, read_template
from sampling.server import BadReply, Server
from sampling.servers import Servers
from sampling.together import together

TOP = 20  # log-probs a reply: the most that chat APIs give
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


class JudgeServer(Server):
    """A server that says how likely each label is as the reply to a question."""

    FLAG = "judge:"

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
                f"{self.name}{self.path} returned no log-probs of the likeliest tokens: "
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


def ask_server(urls: str, template: str | Path, asks: bool = True) -> Judge:
    """Return servers as judge. asks: False on ranks that leave the asking to another one.

    urls: their addresses, with commas between.

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
    servers = Servers([JudgeServer(url) for url in urls.split(",")]) if asks else None

    def ask(questions: list[str]) -> np.ndarray | None:
        if servers is None:
            return None

        def logps(numbered: tuple[int, str]) -> list[float]:
            place, question = numbered
            return servers.ask(place, lambda server: server.label_logps(question, labels))[1]

        rows = together(logps, enumerate(questions))
        return np.array(rows, np.float64).reshape(len(questions), len(labels))

    return Judge(read, ask)
