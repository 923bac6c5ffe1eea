"""The servers that sample in place of this process: their new weights, their deaths and restarts.

    server = connect(template, config, prompts)     None without --rollout-url
    dead = server.load(folder)                       new weights for all of them
    samples = server.sample(ids, seeds, n, temperature)

How new weights get there, from OUT/rollout, a folder on a disk that the servers see as well:
  - --rollout-reload COMMAND: any engine
  - else vLLM's own calls: pause, collective_rpc reload_weights, reset_prefix_cache, resume. It has
    them where it was started with VLLM_SERVER_DEV_MODE=1. With --lora and a server started with
    --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True the adapter alone travels.
vLLM is also told a name for the weights, and asked for it after every rollout. A server that has
another one was restarted in the meantime: it gets the weights again, and its samples are drawn
again.

Several servers share the prompts. One that dies is named, and the others take its prompts; every
`load` tries it again.
"""

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from config import RolloutConfig
from data.dataset import Prompts
from data.templates import Template
from sampling.ahead import Ahead, Steps
from sampling.reload import run_command
from sampling.sampler import Sample
from sampling.server import NoAnswer, Refused, Server

AT_ONCE = 64  # requests in flight


class Engine:
    """The servers of --rollout-url as one sampler.

    learns: they get new weights while a run trains; else they keep those they were started with.
    """

    ahead: Ahead | None = None  # what they draw for later steps, with --rollout-ahead

    def __init__(self, template: Template, config: RolloutConfig, learns: bool = True):
        self.config = config
        self.learns = learns
        self.servers = [Server(template, config, url) for url in config.rollout_url]
        self.dead: set[int] = set()  # numbers of servers that no longer answer
        self.folder: Path | None = None  # of the weights that they were sent last
        self.version = ""  # the name of these weights
        self.adapters = False  # they take an adapter alone
        if learns and not config.rollout_reload:
            for server in self.servers:
                server.check_reloads()
            adapted = bool(config.lora or config.adapter)
            self.adapters = adapted and all(server.takes_adapters() for server in self.servers)

    def load(self, folder: Path) -> tuple[set[int], str]:
        """Send a folder's weights to every server; return those that are dead, and a name.

        OSError: none takes them.
        """
        version = f"plumb-{uuid.uuid4().hex[:12]}"
        if self.config.rollout_reload:
            run_command(self.config.rollout_reload, folder, self.config.rollout_timeout)
            return set(), ""

        def send(i: int) -> OSError | None:
            server, once = self.servers[i], i in self.dead
            try:
                if self.adapters and not self.version:  # an earlier run may have left other weights
                    server.load(Path(self.config.model).resolve(), version, False, once)
                server.load(folder, version, self.adapters, once)
            except NoAnswer as error:
                return error
            return None

        with ThreadPoolExecutor(len(self.servers)) as pool:
            errors = dict(enumerate(pool.map(send, range(len(self.servers)))))
        failed = {i: error for i, error in errors.items() if error}
        if len(failed) == len(self.servers):
            raise next(iter(failed.values()))
        for i in failed:
            self._mourn(i, failed[i])
        for i in self.dead - set(failed):
            print(f"{self.servers[i].url} answers again, and gets prompts again")
        return set(failed), version

    def loaded(self, folder: Path, dead: set[int], version: str) -> None:
        """Take over on every rank what rank 0 saw in `load`."""
        self.folder, self.dead, self.version = folder, dead, version

    def sample(
        self, ids: list[list[int]], seeds: list[int], n: int, temperature: float
    ) -> list[Sample]:
        """Draw n samples per prompt, prompt by prompt; requests run in parallel.

        OSError: no server is left, or one refuses a request.
        """
        drawn: dict[int, list[Sample]] = {}  # by prompt
        by_server: dict[int, int] = {}  # prompt -> the server that answered

        def complete(i: int) -> None:
            alive = self._alive()
            first = i % max(1, len(alive))  # two servers may die at the same moment: none is left
            for k in alive[first:] + alive[:first]:
                if k in self.dead:  # since this loop began
                    continue
                try:
                    drawn[i] = self.servers[k].complete(ids[i], seeds[i * n], n, temperature)
                except NoAnswer as error:
                    if len(self._alive()) == 1:
                        raise
                    self._mourn(k, error)
                    continue
                except Refused:  # as a restarted server does that has no adapter yet
                    if not self._restarted(k):
                        raise
                    drawn[i] = self.servers[k].complete(ids[i], seeds[i * n], n, temperature)
                by_server[i] = k
                return
            raise NoAnswer(f"--rollout-url: none of {len(self.servers)} servers answers")

        missing = list(range(len(ids)))
        while missing:
            with ThreadPoolExecutor(max(1, min(AT_ONCE, len(missing)))) as pool:
                list(pool.map(complete, missing))
            restarted = {k for k in set(by_server.values()) if self._restarted(k)}
            missing = [i for i in missing if by_server[i] in restarted]
        return [sample for i in range(len(ids)) for sample in drawn[i]]

    def _alive(self) -> list[int]:
        return [k for k in range(len(self.servers)) if k not in self.dead]

    def _mourn(self, k: int, error: OSError) -> None:
        """Count a server as dead and say so once."""
        if k not in self.dead:
            self.dead.add(k)
            print(f"warning: {error}; the other servers get its prompts")

    def _restarted(self, k: int) -> bool:
        """Return True if a server has other weights than it was sent, after sending them again."""
        if not self.version or self.servers[k].version() in (None, self.version):
            return False
        print(f"{self.servers[k].url} was restarted: it gets the weights again, and samples again")
        assert self.folder is not None
        self.servers[k].load(self.folder, self.version, self.adapters)
        return True


def connect(
    template: Template,
    config: RolloutConfig,
    prompts: Prompts | None,
    steps: Steps | None = None,
    learns: bool = True,
) -> Engine | None:
    """Return the servers of --rollout-url, None if there are none.

    steps: of the run, for --rollout-ahead. OSError: one does not answer. ValueError: one cannot
    take new weights, or a prompt of the data set and its sample would not fit into its context.
    """
    if not config.rollout_url:
        return None
    engine = Engine(template, config, learns)
    if prompts is None:
        return engine
    if steps and config.rollout_ahead:
        engine.ahead = Ahead(engine.sample, prompts, steps, config.rollout_ahead)
    longest = max(len(ids) for ids in prompts.ids) + config.max_new_tokens
    for server in engine.servers:
        if server.context and longest > server.context:
            raise ValueError(
                f"--rollout-url {server.url} takes {server.context} tokens, and a prompt with its "
                f"--max-new-tokens may have {longest}: start it with --max-model-len {longest}, or "
                "lower --max-new-tokens or --max-length"
            )
    return engine
