"""Client of an OpenAI-compatible completion server that draws the samples (vLLM, SGLang)."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from config import RolloutConfig
from data.templates import Template
from sampling.sampler import Sample

TRIES = 4  # per request, with pauses of 1, 2 and 4 seconds


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
    OPENAI_API_KEY is sent if it is set.
    """

    def __init__(self, template: Template, config: RolloutConfig):
        self.config = config
        self.template = template
        self.url = config.rollout_url.rstrip("/").removesuffix("/v1")
        self.warned = False
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"--rollout-url {config.rollout_url} must begin with http:// or https://"
            )
        models = self._request("/v1/models", None)
        try:
            self.model = models["data"][0]["id"]
        except (LookupError, TypeError):
            raise OSError(
                f"--rollout-url {self.url} serves no model: {str(models)[:200]}"
            ) from None

    def sample(
        self, ids: list[list[int]], seeds: list[int], n: int, temperature: float
    ) -> list[Sample]:
        """Draw n samples per prompt, prompt by prompt; requests run in parallel."""

        def complete(i: int) -> list[Sample]:
            return self._complete(ids[i], seeds[i * n], n, temperature)

        with ThreadPoolExecutor(min(64, len(ids))) as pool:
            return [sample for part in pool.map(complete, range(len(ids))) for sample in part]

    def reload(self, folder: Path) -> None:
        """Load a folder's weights into the server with --rollout-reload. OSError if it fails."""
        command = self.config.rollout_reload.replace("{folder}", shlex.quote(str(folder)))
        try:
            done = subprocess.run(
                shlex.split(command),
                capture_output=True,
                text=True,
                timeout=self.config.rollout_timeout,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise OSError(f"--rollout-reload: {command} did not run: {error}") from None
        if done.returncode:
            reason = (done.stderr or done.stdout)[-500:]
            raise OSError(f"--rollout-reload: {command} failed ({done.returncode}): {reason}")

    def _complete(self, prompt: list[int], seed: int, n: int, temperature: float) -> list[Sample]:
        """Request n samples to one prompt."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "n": n,
            "max_tokens": self.config.max_new_tokens,
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": seed % 2**31,
            "stop_token_ids": sorted(self.template.stop_ids),
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        choices = self._request("/v1/completions", body).get("choices", [])
        if len(choices) != n:
            raise OSError(f"--rollout-url {self.url}: asked for {n} samples, got {len(choices)}")
        choices = sorted(choices, key=lambda choice: choice.get("index", 0))
        return [self._read(choice, temperature) for choice in choices]

    def _read(self, choice: dict, temperature: float) -> Sample:
        """Convert one choice of an answer to a sample; its log-probs are NaN if unknown."""
        logprobs = choice.get("logprobs") or {}
        names = logprobs.get("tokens") or []
        tokens = self._token_ids(choice, names)
        # Engines report log-probs at temperature 1, whatever temperature they sampled at.
        unknown = float("nan")
        logps = [unknown if x is None else x for x in logprobs.get("token_logprobs") or []]
        if choice.get("token_ids") is None and not self._same_tokens(tokens, names):
            logps = []  # of other tokens than those that the text gave when it was tokenised again
        stopped = choice.get("finish_reason") == "stop"
        if stopped and (not tokens or tokens[-1] not in self.template.stop_ids):
            # Some engines leave the end token out; some still report its log-prob.
            if len(logps) == len(tokens):
                logps.append(unknown)
            tokens.append(self._end_id(choice))
        if not tokens:
            raise OSError(f"--rollout-url {self.url} returned an empty sample that did not end")
        if len(logps) != len(tokens):
            logps = [unknown] * len(tokens)
        drawn = logps if temperature == 1 else [unknown] * len(tokens)
        return Sample(tokens, drawn, logps, tokens[-1] in self.template.stop_ids)

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
        if choice.get("token_ids") is not None:
            return [int(token) for token in choice["token_ids"]]
        if ids := _named_ids(names):
            return ids
        if not self.warned:
            print(
                f"warning: {self.url} returns text instead of token ids: it is tokenised again",
                file=sys.stderr,
            )
            self.warned = True
        return list(self.template.tokenizer.encode(choice.get("text") or ""))

    def _request(self, path: str, body: dict | None) -> dict:
        """GET a path, or POST a JSON body to it, retrying where that may help.

        OSError: no answer, or a refusal.
        """
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        content = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self.url + path, content, headers)
        reason = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.config.rollout_timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                reason = f"{error.code}: {error.read().decode(errors='replace')[:300]}"
                if error.code < 500 and error.code not in (408, 429):
                    raise OSError(f"--rollout-url {self.url}{path} refused: {reason}") from None
            except (OSError, ValueError) as error:  # no connection, a time-out, half an answer
                reason = str(error)
        raise OSError(
            f"--rollout-url {self.url}{path}: no answer in {TRIES} tries ({reason}): "
            "is the server up?"
        )
