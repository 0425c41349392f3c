"""Fleet over inference servers: a mosquitto, an edge process, and devices with a real draft model, on loopback."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker_config.broker import Broker
from broker_config.processes.runner import MosquittoProcess
from fleet_device.client.agent import Agent, Generation
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.pacing.contract import FixedPacing
from fleet_link.paho_link import PahoLink
from fleet_link.settings import BrokerSettings
from schemas.policy import SamplingPolicy
from tests.support.edge_process import edge_process

__all__ = ["Job", "Servers", "running_fleet"]

FLEET: Final = "remote"
_START_S: Final = 10.0
_CONTEXT: Final = 1024


@dataclass(frozen=True, slots=True)
class Servers:
    """Inference servers, as the edge's settings have them.

    Attributes:
        endpoints: Addresses, with commas between them.
        api: `vllm` or `sglang`.
        target: Folder or GGUF with the tokenizer.
        top: Log-probabilities asked for.
        key_file: With the key; None without one.
        request_s: Longest wait for an answer.
    """

    endpoints: str
    api: str
    target: Path
    top: int
    key_file: Path | None
    request_s: float


@dataclass(frozen=True, slots=True)
class Job:
    """A text to be written.

    Attributes:
        prompt: Token ids.
        policy: With the seed.
        length: Most tokens.
    """

    prompt: Sequence[int]
    policy: SamplingPolicy
    length: int


class Devices:
    """Devices, connected; each drafts with a context of its own."""

    def __init__(self, port: int, draft: Path, *, number: int, draft_length: int, stack: ExitStack) -> None:
        self._agents: list[Agent] = []
        for name in (f"device-{count}" for count in range(number)):
            drafter = LlamaCppDrafter(LlamaCppSettings(path=draft, threads=1, context=_CONTEXT))
            stack.callback(drafter.close)
            link = PahoLink(BrokerSettings(port=port).link(name, will=None))
            agent = Agent(link, FLEET, name, drafter, FixedPacing(draft_length), time.monotonic)
            agent.attach()
            link.start(timeout_s=_START_S)
            stack.callback(link.stop)
            self._agents.append(agent)

    def write(self, jobs: Sequence[Job]) -> list[Generation]:
        """Write all texts, as many at a time as there are devices."""
        done: dict[int, Generation] = {}
        failures: list[BaseException] = []
        queue = iter(list(enumerate(jobs)))
        taking = threading.Lock()

        def serve(agent: Agent) -> None:
            try:
                while True:
                    with taking:
                        number, job = next(queue, (None, None))
                    if number is None or job is None:
                        return
                    done[number] = agent.generate(job.prompt, policy=job.policy, max_new_tokens=job.length)
            except BaseException as error:  # noqa: BLE001 - raised below
                failures.append(error)

        threads = [threading.Thread(target=serve, args=(agent,)) for agent in self._agents]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return [done[number] for number in range(len(jobs))]


@contextmanager
def running_fleet(servers: Servers, draft: Path, *, devices: int, draft_length: int, folder: Path) -> Iterator[Devices]:
    """Run broker, edge and devices.

    Args:
        servers: What computes the target.
        draft: The draft model, a GGUF.
        devices: How many.
        draft_length: Tokens of a draft.
        folder: For the session log.

    Raises:
        VerifierError: The edge did not start.
    """
    with MosquittoProcess(Broker(fleet=FLEET)) as broker, ExitStack() as stack:
        arguments = [
            "--fleet", FLEET, "--port", str(broker.port),
            "--db", f"sqlite:///{folder}/log.sqlite3", "--spool", f"{folder}/spool",
            "--engine", "remote", "--api", servers.api, "--endpoints", servers.endpoints,
            "--target", str(servers.target), "--top-logprobs", str(servers.top),
            "--request-s", str(servers.request_s), "--step-s", str(2 * servers.request_s),
        ]  # fmt: skip
        if servers.key_file is not None:
            arguments += ["--api-key-file", str(servers.key_file)]
        stack.enter_context(edge_process(arguments))
        yield Devices(broker.port, draft, number=devices, draft_length=draft_length, stack=stack)
