"""Devices that begin with one system prompt at the same moment, and draft nothing: their edge writes by itself."""

import threading
import time
from collections.abc import Callable, Sequence
from itertools import takewhile

from fleet_device.client.agent import Agent
from fleet_device.drafters.gguf import GgufModel
from fleet_device.errors import DeviceError
from fleet_device.pacing.contract import STREAMED, FixedPacing
from fleet_link.link import Link
from schemas.policy import SamplingPolicy
from tests.support.replay_drafter import ReplayDrafter

__all__ = ["common_tokens", "write_together"]

_START_S = 10.0


def common_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Return with how many tokens all prompts begin."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False)))


def write_together(
    prompts: Sequence[Sequence[int]], *, make_link: Callable[[str], Link], fleet: str, codec: GgufModel, tokens: int
) -> list[str]:
    """Write a text for each prompt, each on a device of its own, all asked for at once.

    Args:
        prompts: Token ids.
        make_link: Makes a device's link to the broker, given its name.
        fleet: Topic level.
        codec: Text side of the target's vocabulary.
        tokens: Of each text, at most.

    Returns:
        The sessions' ids in the session log.

    Raises:
        DeviceError: A text could not be written.
    """
    sessions: dict[int, str] = {}
    failures: list[DeviceError] = []
    start = threading.Barrier(len(prompts))

    def write(number: int) -> None:
        name = f"sharing-{number}"
        link = make_link(name)
        drafter = ReplayDrafter(codec, codec.vocabulary, ())
        pacing = FixedPacing(STREAMED, stream=True)
        agent = Agent(link, fleet, name, drafter, pacing, time.monotonic)
        agent.attach()
        link.start(timeout_s=_START_S)
        try:
            start.wait()
            policy = SamplingPolicy(seed=number)
            done = agent.generate(prompts[number], policy=policy, max_new_tokens=tokens)
            sessions[number] = done.session.hex()
        except DeviceError as error:
            failures.append(error)
        finally:
            link.stop()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [sessions[number] for number in sorted(sessions)]
