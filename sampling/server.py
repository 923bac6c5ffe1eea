import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from config import RolloutConfig
from data.templates import Template
from sampling.sampler import Sample

TRIES = 4  # of a request to a server, with pauses of 1, 2 and 4 seconds


class Server:
    """An OpenAI-compatible completion server (vLLM, SGLang) that samples in this process's stead.

    Prompts go as token ids, one request each; the samples come back as token ids (vLLM's return_token_ids), or as
    logprobs.tokens of the form token_id:N, or else as text, which is tokenised again (a warning says so). Its
    generation defaults (top_p and the like, from generation_config.json) are overridden: training needs the plain
    distribution. OPENAI_API_KEY, if set, goes along.
    """

    def __init__(self, template: Template, config: RolloutConfig):
        self.url, self.config, self.template = (
            config.rollout_url.rstrip("/").removesuffix("/v1"),
            config,
            template,
        )
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
        """A Sampler; requests go side by side, so that the server can fill its batches."""
        with ThreadPoolExecutor(min(64, len(ids))) as pool:
            parts = pool.map(
                lambda i: self._complete(ids[i], seeds[i * n], n, temperature), range(len(ids))
            )
            return [sample for part in parts for sample in part]

    def reload(self, folder: Path) -> None:
        """Has the server load the weights in a folder, by the user's command. OSError: what went wrong."""
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
            raise OSError(
                f"--rollout-reload: {command} failed ({done.returncode}): {(done.stderr or done.stdout)[-500:]}"
            )

    def _complete(self, prompt: list[int], seed: int, n: int, temperature: float) -> list[Sample]:
        body = {
            "model": self.model, "prompt": prompt, "n": n, "max_tokens": self.config.max_new_tokens,
            "temperature": temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
            "seed": seed % 2**31, "stop_token_ids": sorted(self.template.stop_ids), "logprobs": 1,
            "return_token_ids": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        choices = self._request("/v1/completions", body).get("choices", [])
        if len(choices) != n:
            raise OSError(f"--rollout-url {self.url}: asked for {n} samples, got {len(choices)}")
        return [
            self._read(choice, temperature)
            for choice in sorted(choices, key=lambda c: c.get("index", 0))
        ]

    def _read(self, choice: dict, temperature: float) -> Sample:
        given = choice.get("logprobs") or {}
        tokens, names = choice.get("token_ids"), given.get("tokens") or []
        if (
            tokens is None
            and names
            and all(re.fullmatch(r"token_id:\d+", str(name)) for name in names)
        ):
            tokens = [int(name[9:]) for name in names]
        if tokens is None:
            tokens = self.template.tokenizer.encode(choice.get("text") or "")
            if not self.warned:
                print(
                    f"warning: {self.url} returns text, not token ids: it is tokenised again",
                    file=sys.stderr,
                )
                self.warned = True
        tokens = [int(token) for token in tokens]
        logps = given.get("token_logprobs") or []
        if choice.get("finish_reason") == "stop" and (
            not tokens or tokens[-1] not in self.template.stop_ids
        ):
            tokens.append(
                self.template.tokenizer.eos
            )  # some engines keep the end token to themselves
        if not tokens:
            raise OSError(f"--rollout-url {self.url} returned an empty sample that did not end")
        # Engines report log-probs at temperature 1, whatever they sampled at: of use where that is the same.
        if len(logps) != len(tokens) or temperature != 1 or None in logps:
            logps = [float("nan")] * len(tokens)
        return Sample(tokens, logps, logps, tokens[-1] in self.template.stop_ids)

    def _request(self, path: str, body: dict | None) -> dict:
        """GET, or POST of a JSON body; tried again where that may help. OSError: no answer, or a refusal."""
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode() if body else None, headers
        )
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
            f"--rollout-url {self.url}{path}: no answer in {TRIES} tries ({reason}): is the server up?"
        )
