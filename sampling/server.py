"""Client of an OpenAI-compatible completion server that draws the samples (vLLM, SGLang)."""

import http.client
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from config import RolloutConfig
from data.templates import Template
from sampling.chosen import decode, padded
from sampling.draw import truncated
from sampling.sampler import Sample
from sampling.together import start
from sampling.transfer import Link

TRIES = 4  # per request, with pauses of 1, 2 and 4 seconds
# Bytes; 64 samples of 4,096 tokens take about 30 MB with log-probs, 10 times that with experts.
LARGEST_REPLY = 1 << 30
ADAPTER = "plumb"  # its name in a server
ABOVE_ZERO = 1e-5  # a log-prob that rounding may reach


class BadReply(OSError):
    """A reply that no second request would mend."""


class NoAnswer(OSError):
    """A server that does not answer."""


class Broken(NoAnswer):
    """A server that answers with an error of its own (5xx)."""


class Refused(OSError):
    """A request that a server refuses (4xx)."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: the next host would get the key, and a POST would become a GET."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        raise BadReply(f"redirects to {newurl}: give that address")


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """Return work()'s result. TimeoutError after some seconds, whatever it is waiting for.

    A socket's own time-out starts again with every byte, so a server that drips would hold it.
    """
    try:
        return start(work).result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no whole reply within {seconds:g} s") from None


def _named_ids(names: list) -> list[int]:
    """Return the ids of names of the form token_id:N, [] if any has another form."""
    if not all(re.fullmatch(r"token_id:\d+", str(name)) for name in names):
        return []
    return [int(name.removeprefix("token_id:")) for name in names]


class Server:
    """A completion server that samples in place of this process.

    Prompts are sent as token ids, one request each. Samples come back as token ids (vLLM's
    return_token_ids), or as logprobs.tokens of the form token_id:N, or as text, which is tokenised
    again with a warning. The server's generation defaults (top_p and others, from
    generation_config.json) are overridden, because training needs the plain distribution.
    OPENAI_API_KEY is sent if it is set, to this address alone: redirects are refused.

    A reply is used only if it holds what was asked for. Log-probs that cannot be (above 0, not
    finite) count as unknown, as training computes them again, and are reported.
    """

    FLAG = "--rollout-url "  # that names it in messages
    bad_logps = 0  # log-probs so far that cannot be
    link: Link | None = None  # with --rollout-transfer nccl, once this server has joined
    sent = ""  # the name of the weights that it was sent last

    def __init__(self, template: Template, config: RolloutConfig, url: str):
        self.config = config
        self.template = template
        self.url = url.rstrip("/").removesuffix("/v1")
        self.name = self.FLAG + self.url
        self.warned = False
        self.opener = urllib.request.build_opener(_NoRedirects)
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"{self.FLAG}{url} must begin with http:// or https://")
        models = self._request("/v1/models")
        try:
            served = models["data"][0]
            self.model = str(served["id"])
            self.engine = str(served.get("owned_by"))  # "vllm", "sglang", ...
            context = served.get("max_model_len")
        except (LookupError, TypeError, AttributeError):
            raise OSError(f"{self.name} serves no model: {str(models)[:200]}") from None
        self.context = context if type(context) is int and context > 0 else 0  # 0: unknown

    def check_reloads(self) -> None:
        """Raise ValueError if this server has no calls of its own that load new weights."""
        if self.engine != "vllm":
            raise ValueError(
                f"{self.name} without --rollout-reload would sample from the initial "
                "weights forever: give the command that loads new weights (only vLLM has calls of "
                "its own for that)"
            )
        if self._call("/reset_prefix_cache", {}) is None:
            raise ValueError(
                f"{self.name} is vLLM without its calls for new weights: start it "
                "with VLLM_SERVER_DEV_MODE=1 in its environment, or give --rollout-reload"
            )

    def takes_adapters(self) -> bool:
        """Return True if this server loads adapters while it runs."""
        # A request without a path: refused where the call exists, unknown where it does not.
        try:
            return self._call("/v1/load_lora_adapter", {"lora_name": ADAPTER}) is not None
        except Refused:
            return True

    def load(self, folder: Path, version: str, adapter: bool, once: bool = False) -> None:
        """Load a folder's weights, or adapter, by vLLM's own calls. NoAnswer; OSError: a refusal.

        version: a name for them. once: a server that was dead, and is asked once.
        """
        self._call("/pause?mode=wait", {}, tries=1 if once else TRIES)
        path: str = "/collective_rpc"
        body: dict = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        if adapter:
            path = "/v1/load_lora_adapter"
            body = {"lora_name": ADAPTER, "lora_path": str(folder), "load_inplace": True}
        over_nccl = self.config.rollout_transfer == "nccl"
        if self.link and self.version() != self.sent:  # restarted: it knows no group any more
            self.link = None
        try:
            if over_nccl:
                self.link = self.link or Link(self.url, partial(self._request, tries=1, plain=True))
                self.link.send(folder)
            else:
                self._request(path, body, plain=True)
        except (Broken, Refused) as error:
            self._call("/resume", {})
            fix = f"does it see {folder}? --out must be on its disk"
            if over_nccl:
                fix = """was it started with --weight-transfer-config '{"backend": "nccl"}'?"""
            raise OSError(f"{error}; {fix}") from None
        if adapter:
            self.model = ADAPTER
        self._call("/reset_prefix_cache", {})
        self._call("/update_weight_version", {"new_version": version})
        self.sent = version
        self._call("/resume", {})

    def version(self) -> str | None:
        """Return the name that the weights of this server were given; None if it knows none."""
        reply = self._call("/weight_info")
        return None if reply is None else str(reply.get("weight_version"))

    def logps(self, ids: list[int]) -> list[float]:
        """Return the log-prob of every token but the first, at temperature 1; NaN: unknown."""
        body = {
            "model": self.model,
            "prompt": ids,
            "echo": True,
            "max_tokens": 1,
            "logprobs": 0,
            "return_tokens_as_token_ids": True,
        }
        (choice,) = self._request("/v1/completions", body)["choices"]
        return self._logps(choice["logprobs"]["token_logprobs"][1 : len(ids)])

    def complete(self, prompt: list[int], seed: int, n: int, temperature: float) -> list[Sample]:
        """Request n samples to one prompt."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "n": n,
            "max_tokens": self.config.max_new_tokens,
            "temperature": temperature,
            "top_p": self.config.top_p,
            "top_k": self.config.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": seed % 2**31,
            "stop_token_ids": sorted(self.template.stop_ids),
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if self.config.min_new_tokens:
            body["min_tokens"] = self.config.min_new_tokens
        if self.config.stop:
            body |= {"stop": self.config.stop, "include_stop_str_in_output": True}
        choices = self._request("/v1/completions", body).get("choices", [])
        if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
            raise self._bad(f"choices that are no list of objects: {str(choices)[:200]}")
        if len(choices) != n:
            raise self._bad(f"{len(choices)} samples: asked for {n}")
        places = [choice.get("index", i) for i, choice in enumerate(choices)]
        if not all(type(place) is int for place in places) or set(places) != set(range(n)):
            raise self._bad(f"samples numbered {places}, not 0 to {n - 1}")
        ordered = [choices[i] for _, i in sorted(zip(places, range(n)))]
        samples = [self._read(choice, temperature) for choice in ordered]
        if self.config.replay_routing:
            samples = [
                self._with_experts(sample, choice, len(prompt), first=k == 0)
                for k, (sample, choice) in enumerate(zip(samples, ordered))
            ]
        return samples

    def _with_experts(self, sample: Sample, choice: dict, prompt: int, first: bool) -> Sample:
        """Return a sample with the experts that every layer chose, and with the first the prompt's.

        The last token was never fed to the model, and some engines leave the end token out.
        """
        reported = choice.get("routed_experts")
        if reported is None:
            raise self._bad(
                "no experts for --replay-routing: start vLLM with --enable-return-routed-experts"
            )
        try:
            table = decode(reported)
        except (TypeError, ValueError, EOFError) as error:
            raise self._bad(f"routed_experts that cannot be read: {error}") from None
        if not prompt <= len(table) <= prompt + len(sample.tokens):
            raise self._bad(
                f"the experts of {len(table)} tokens, for {prompt} of the prompt and "
                f"{len(sample.tokens)} sampled ones"
            )
        own = padded(table[prompt:], len(sample.tokens))
        return sample._replace(experts=own, prompt_experts=table[:prompt] if first else None)

    def _bad(self, what: str) -> BadReply:
        """Return the error of a reply that does not hold what was asked for."""
        return BadReply(f"{self.name} returned {what}")

    def _read(self, choice: dict, temperature: float) -> Sample:
        """Convert one choice of an answer to a sample; its log-probs are NaN if unknown."""
        logprobs = choice.get("logprobs") or {}
        if not isinstance(logprobs, dict):
            raise self._bad(f"logprobs that are no object: {str(logprobs)[:200]}")
        names = logprobs.get("tokens") or []
        if not isinstance(names, list):
            raise self._bad(f"tokens that are no list: {str(names)[:200]}")
        tokens = self._token_ids(choice, names)
        if choice.get("token_ids") is not None or _named_ids(names):
            self._check_tokens(tokens)
        # Engines report log-probs at temperature 1, whatever temperature they sampled at.
        unknown = float("nan")
        logps = self._logps(logprobs.get("token_logprobs") or [])
        if choice.get("token_ids") is None and not self._same_tokens(tokens, names):
            logps = []  # of other tokens than those that the text gave when it was tokenised again
        stopped = choice.get("finish_reason") == "stop"
        at_text = stopped and self._stop_text(choice, tokens)
        if stopped and not at_text and (not tokens or tokens[-1] not in self.template.stop_ids):
            # Some engines leave the end token out; some still report its log-prob.
            if len(logps) == len(tokens):
                logps.append(unknown)
            tokens.append(self._end_id(choice))
        if not tokens:
            raise OSError(f"{self.name} returned an empty sample that did not end")
        if len(logps) != len(tokens):
            logps = [unknown] * len(tokens)
        plain = temperature == 1 and not truncated(self.config)
        drawn = logps if plain else [unknown] * len(tokens)
        return Sample(tokens, drawn, logps, at_text or tokens[-1] in self.template.stop_ids)

    def _stop_text(self, choice: dict, tokens: list[int]) -> bool:
        """Return True if one of the texts of --stop ended a sample, and not an end token."""
        if not tokens or tokens[-1] in self.template.stop_ids:
            return False
        if choice.get("stop_reason") in self.config.stop:
            return True
        text = self.template.tokenizer.decode(tokens)
        return any(stop in text for stop in self.config.stop)

    def _check_tokens(self, tokens: list[int]) -> None:
        """Raise BadReply for tokens that were not asked for."""
        size = self.template.tokenizer.size
        if outside := [token for token in tokens if not 0 <= token < size]:
            raise self._bad(f"the token {outside[0]}, but the tokenizer has {size}: another model?")
        asked = self.config.max_new_tokens
        if len(tokens) > asked:
            raise self._bad(f"{len(tokens)} tokens: asked for at most {asked}")
        ends = [i for i, token in enumerate(tokens) if token in self.template.stop_ids]
        if ends and ends[0] < len(tokens) - 1:
            raise self._bad(
                f"{len(tokens) - 1 - ends[0]} tokens after the end token {tokens[ends[0]]}: does "
                "it ignore stop_token_ids?"
            )

    def _logps(self, reported: Any) -> list[float]:
        """Return log-probs, NaN where they are unknown or cannot be."""
        if not isinstance(reported, list):
            raise self._bad(f"token_logprobs that are no list: {str(reported)[:200]}")
        logps = []
        bad = 0
        for x in reported:
            known = isinstance(x, (int, float)) and not isinstance(x, bool)
            good = known and math.isfinite(x) and x <= ABOVE_ZERO
            bad += x is not None and not good
            logps.append(min(float(x), 0.0) if good else float("nan"))
        if bad and not self.bad_logps:
            print(
                f"warning: {self.url} reports log-probs that are above 0 or not finite; they are "
                "computed again, and left out of sampler_gap",
            )
        self.bad_logps += bad
        return logps

    def _end_id(self, choice: dict) -> int:
        """Return the id of an end token that the server left out.

        The reported one where it is an end (vLLM's stop_reason or SGLang's matched_stop, an id or
        its text), else the template's end of turn, else eos.
        """
        for key in ("stop_reason", "matched_stop"):
            reported = choice.get(key)
            if isinstance(reported, str):
                reported = self.template.tokenizer.special.get(reported)
            known = isinstance(reported, int) and not isinstance(reported, bool)
            if known and reported in self.template.stop_ids:
                return reported
        return self.template.end

    def _same_tokens(self, tokens: list[int], names: list) -> bool:
        """Return True if the reported names, texts or token_id:N, are those of the tokens."""
        if _named_ids(names):
            return True
        decode = self.template.tokenizer.decode
        texts = [decode([token], False).strip() for token in tokens]
        return texts == [str(name).strip() for name in names]

    def _token_ids(self, choice: dict, names: list) -> list[int]:
        """Return the token ids of a choice, by the best of the three forms that it has."""
        ids = choice.get("token_ids")
        if ids is not None:
            whole = isinstance(ids, list) and all(type(token) is int for token in ids)
            if not whole:
                raise self._bad(f"token_ids that are no list of whole numbers: {str(ids)[:200]}")
            return list(ids)
        if ids := _named_ids(names):
            return ids
        if not self.warned:
            print(
                f"warning: {self.url} returns text instead of token ids: it is tokenised again",
            )
            self.warned = True
        text = choice.get("text") or ""
        if not isinstance(text, str):
            raise self._bad(f"a text that is none: {str(text)[:200]}")
        return list(self.template.tokenizer.encode(text))

    def _call(self, path: str, body: dict | None = None, tries: int = TRIES) -> dict | None:
        """Return the reply of `_request`, {} if it is no object; None if there is no such path."""
        try:
            return self._request(path, body, tries, plain=True)
        except Refused as error:
            if error.code != 404:
                raise
            return None

    def _request(
        self, path: str, body: dict | None = None, tries: int = TRIES, plain: bool = False
    ) -> dict:
        """GET a path, or POST a JSON body to it, retrying where that may help.

        plain: a reply that is no JSON, as vLLM has some, will do. NoAnswer: none in some tries;
        Broken: they were errors of the server's own. Refused.
        """
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, headers)
        limit, reason, code = self.config.rollout_timeout, "", 0
        for attempt in range(tries):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            code = 0
            try:
                code, reply = _within(limit, lambda: self._exchange(request, plain))
            except BadReply as error:
                raise OSError(f"{self.name}{path}: {error}") from None
            # No connection, a time-out, half a reply, no JSON.
            except (OSError, ValueError, http.client.HTTPException, RecursionError) as error:
                reason = str(error) or type(error).__name__
                continue
            if code < 400:
                return reply
            reason = f"{code}: {reply}"
            if code < 500 and code not in (408, 429):
                raise Refused(f"{self.name}{path} refused: {reason}", code)
        kind = Broken if code >= 500 else NoAnswer
        raise kind(f"{self.name}{path}: no answer in {tries} tries ({reason}): is the server up?")

    def _exchange(self, request: urllib.request.Request, plain: bool) -> tuple[int, Any]:
        """Send a request; return status and JSON object, or the begin of the text of an error."""
        try:
            with self.opener.open(request, timeout=self.config.rollout_timeout) as answer:
                content = answer.read(LARGEST_REPLY + 1)
        except urllib.error.HTTPError as error:
            return error.code, error.read(300).decode(errors="replace")
        if len(content) > LARGEST_REPLY:
            raise BadReply(f"a reply of more than {LARGEST_REPLY >> 20} MB")
        if plain and not content.startswith(b"{"):
            return 200, {}
        reply = json.loads(content)
        if not isinstance(reply, dict):
            raise BadReply(f"a reply that is no object: {str(reply)[:200]}")
        return 200, reply
