"""The servers that sample in place of this process: their new weights, their deaths and restarts.

    server = connect(template, config, prompts)     None without --rollout-url
    dead = server.load(folder)                       new weights for all of them
    samples = server.sample(ids, seeds, n, temperature)

How new weights get there, from OUT/rollout, a folder on a disk that the servers see as well:
  - --rollout-reload COMMAND: any engine
  - else vLLM's own calls: pause, collective_rpc reload_weights, reset_prefix_cache, resume. It has
    them where it was started with VLLM_SERVER_DEV_MODE=1. With --lora and a server started with
    --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True the adapter alone travels.
  - or over NCCL, without a disk in common: --rollout-transfer nccl (sampling/transfer.py)
vLLM is also told a name for the weights, and asked for it after every rollout. A server that has
another one was restarted in the meantime: it gets the weights again, and its samples are drawn
again.

Several servers share the prompts. One that dies is named, and the others take its prompts; every
`load` tries it again.
"""

import uuid
from pathlib import Path

from config import RolloutConfig
from data.dataset import Prompts
from data.templates import Template
from sampling import transfer
from sampling.ahead import Ahead, Steps
from sampling.reload import run_command
from sampling.sampler import Sample
from sampling.server import NoAnswer, Refused, Server
from sampling.servers import Servers
from sampling.together import together


class Engine(Servers[Server]):
    """The servers of --rollout-url as one sampler.

    learns: they get new weights while a run trains; else they keep those they were started with.
    """

    ahead: Ahead | None = None  # what they draw for later steps, with --rollout-ahead

    def __init__(self, template: Template, config: RolloutConfig, learns: bool = True):
        self.config = config
        self.learns = learns
        super().__init__([Server(template, config, url) for url in config.rollout_url])
        self.folder: Path | None = None  # of the weights that they were sent last
        self.version = ""  # the name of these weights
        self.adapters = False  # they take an adapter alone
        if learns and config.rollout_transfer == "nccl":
            transfer.check()
        if learns and not config.rollout_reload:
            for server in self.servers:
                server.check_reloads()
            adapted = bool(config.lora or config.adapter)
            by_folder = config.rollout_transfer == "folder"
            self.adapters = (
                by_folder and adapted and all(server.takes_adapters() for server in self.servers)
            )

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

        errors = dict(enumerate(together(send, range(len(self.servers)))))
        failed = {i: error for i, error in errors.items() if error}
        if len(failed) == len(self.servers):
            raise next(iter(failed.values()))
        for i in failed:
            self.mourn(i, failed[i])
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
            def request(server: Server) -> list[Sample]:
                return server.complete(ids[i], seeds[i * n], n, temperature)

            def ask(server: Server) -> list[Sample]:
                try:
                    return request(server)
                except Refused:  # as a restarted server does that has no adapter yet
                    if not self._restarted(self.servers.index(server)):
                        raise
                    return request(server)

            by_server[i], drawn[i] = self.ask(i, ask)

        missing = list(range(len(ids)))
        while missing:
            together(complete, missing)
            restarted = {k for k in set(by_server.values()) if self._restarted(k)}
            missing = [i for i in missing if by_server[i] in restarted]
        return [sample for i in range(len(ids)) for sample in drawn[i]]

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
