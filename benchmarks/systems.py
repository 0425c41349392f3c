"""Systems: the ways to give a device a large model's output, with one name each in all suites."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from benchmarks.harness import streaming
from dssd.downlink import FormName
from fleet_common.mqtt.paho_link import PahoLink
from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import FixedPacing, Pacing
from schemas.policy import Mode
from schemas.topics import Topic

DRAFT: Final = 4
"""Tokens of a fixed draft: the shortest of the published system."""

HALF: Final = 2
"""Bytes of a probability in full distributions: half precision, the least in any publication."""


@dataclass(frozen=True, slots=True)
class System:
    pacing: Callable[[], Pacing]
    mode: Mode
    form: FormName = FormName.AUTO
    full_up: bool = False
    learns: bool = False
    edge_drafts: bool = False


SYSTEMS: Final[Mapping[str, System]] = MappingProxyType(
    {
        "edge-streaming": System(streaming, Mode.RESIDUAL),
        "dsd": System(lambda: FixedPacing(DRAFT), Mode.RESIDUAL, full_up=True),
        "dssd-dense": System(lambda: FixedPacing(DRAFT), Mode.RESIDUAL, FormName.DENSE),
        "ours-residual": System(lambda: FixedPacing(DRAFT), Mode.RESIDUAL),
        "ours-coupled": System(lambda: FixedPacing(DRAFT), Mode.COUPLED),
        "ours-ahead": System(lambda: FixedPacing(DRAFT, ahead=True), Mode.COUPLED),
        "ours-auto": System(lambda: AdaptivePacing(stream=None), Mode.RESIDUAL, learns=True),
    }
)
"""By name. `dsd` sends full distributions up and the edge corrects; `dssd-dense` is as published: one probability a
token up, all of p down at a rejection; `ours-residual` sends the smallest form of p; `ours-coupled` tokens alone;
`ours-ahead` drafts on before the verdict; `ours-auto` chooses."""


class FillingLink:
    """A link that sends as many bytes before each draft as its tokens' full distributions would take.

    Nobody reads them: the cost of decoding and using them is left out.
    """

    def __init__(self, link: PahoLink, size: int) -> None:
        self._link = link
        self._filling = bytes(size)
        self.filled = 0

    def publish(self, topic: str, payload: bytes, **options: Any) -> None:  # noqa: ANN401 - passed on
        if self._filling and f"/{Topic.DRAFT.value}" in topic:
            self.filled += len(self._filling)
            self._link.publish(f"{topic.rsplit('/', 2)[0]}/filling", self._filling, qos=0)
        self._link.publish(topic, payload, **options)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - all else is the link's
        return getattr(self._link, name)
