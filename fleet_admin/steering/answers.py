"""Answers to a command of several devices, put together of their parts."""

from collections.abc import Callable, Mapping

from fleet_admin.steering.views import CommandResult
from schemas.steering import CommandRequest, CommandResponse

__all__ = ["Answers"]


class Answers:
    """What has come so far. Told on the link's thread, taken while that is held up.

    Args:
        requests: The commands, by device.
        clock: Monotonic seconds.
    """

    def __init__(self, requests: Mapping[str, CommandRequest], clock: Callable[[], float]) -> None:
        self._requests = requests
        self._clock = clock
        self._began = clock()
        self._parts: dict[str, dict[int, CommandResponse]] = {}
        self._whole: list[CommandResult] = []
        self._told: set[str] = set()
        self.missing = set(requests)

    def listener(self, device: str) -> Callable[[CommandResponse], None]:
        """Return what takes the parts of a device's answer."""
        return lambda response: self._take(device, response)

    def take(self) -> list[CommandResult]:
        """Return the answers that have become whole since this was asked last."""
        whole, self._whole = self._whole, []
        self.missing -= {each.device for each in whole}
        return whole

    def _take(self, device: str, response: CommandResponse) -> None:
        if device not in self._requests or device in self._told:
            return
        parts = self._parts.setdefault(device, {})
        if parts and next(iter(parts.values())).parts != response.parts:
            return  # of another answer than the first
        parts[response.part] = response
        if len(parts) < response.parts:
            return
        texts = [parts[number].result or "" for number in range(response.parts)]
        self._whole.append(
            CommandResult(
                device=device,
                id=response.id,
                outcome=response.outcome.value,
                sentence=response.sentence,
                result=None if parts[0].result is None else "".join(texts),
                seconds=self._clock() - self._began,
            )
        )
        self._parts.pop(device)
        self._told.add(device)
