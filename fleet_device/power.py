"""Heat of this machine, as files of the Linux kernel show it, and energy of requests, by figures of the settings.

Nothing here needs root, and a file that is missing or makes no sense says nothing.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fleet_device.pacing.plans import MESSAGE_BYTES, RENEWED
from fleet_device.requests.generate import Generation
from fleet_device.settings import Power

SYSFS: Final = Path("/sys")
_LONGEST: Final = 64  # bytes of a number or a word

_ZONES: Final = "class/thermal/thermal_zone*"
_COOLERS: Final = "class/thermal/cooling_device*"
_PROCESSOR: Final = ("thermal-cpufreq", "cpufreq", "processor", "cpu-idle")
"""How the types of cooling devices begin that slow down the processor; others are fans."""

_OF_PROCESSOR: Final = ("cpu", "soc", "pkg", "core")
"""Parts of the types of thermal zones that are in the processor; others are radios and batteries."""

_FIRMWARE: Final = "devices/platform/soc*/*firmware/get_throttled"
_UNDER_VOLTAGE: Final = 1
_LIMITED: Final = 0b1110  # frequency capped, throttled, soft temperature limit; higher bits are of the past
_COUNTS: Final = "devices/system/cpu/cpu*/thermal_throttle/package_throttle_count"
_FREQUENCIES: Final = "devices/system/cpu/cpu*/cpufreq/scaling_cur_freq"
_FULL: Final = 0.9
"""Share of the highest frequency from which a processor is not slowed down."""

_PLAUSIBLE_C: Final = range(1, 150)


def _text(path: Path) -> str:
    """Return the beginning of a file, or "" if it cannot be read; never wait for one that is no plain file."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return file.read(_LONGEST).decode("ascii", "replace").strip().lower()
    except OSError:
        return ""


def _number(path: Path, base: int = 10) -> int | None:
    try:
        return int(_text(path), base)
    except ValueError:
        return None


def _degrees(path: Path) -> float | None:
    value = _number(path)
    return value / 1e3 if value is not None and value // 1000 in _PLAUSIBLE_C else None


def temperature(root: Path = SYSFS) -> float | None:
    """Return the highest temperature of the processor (degrees Celsius); of any part if no zone is the processor's."""
    found = {zone: degrees for zone in root.glob(_ZONES) if (degrees := _degrees(zone / "temp")) is not None}
    ours = [degrees for zone, degrees in found.items() if any(part in _text(zone / "type") for part in _OF_PROCESSOR)]
    return max(ours or found.values(), default=None)


def causes(root: Path = SYSFS) -> Iterator[str]:
    """Yield why the processor is throttled now, as far as the kernel or the firmware says so."""
    for path in root.glob(_FIRMWARE):
        bits = _number(path, 16) or 0
        if bits & _UNDER_VOLTAGE:
            yield "its supply voltage is too low"
        elif bits & _LIMITED:
            yield "the firmware limits its frequency"
    for cooler in root.glob(_COOLERS):
        if _text(cooler / "type").startswith(_PROCESSOR) and (_number(cooler / "cur_state") or 0) > 0:
            yield "the kernel slows it down to cool it"
    for zone in root.glob(_ZONES):
        now = _degrees(zone / "temp")
        for kind in zone.glob("trip_point_*_type"):
            limit = _degrees(kind.with_name(kind.name.replace("_type", "_temp")))
            if _text(kind) == "passive" and now is not None and limit is not None and now >= limit and _slowed(root):
                yield "it is at its limit of temperature"


def _slowed(root: Path) -> bool:
    """A processor is slowed down if no core runs at its full frequency; unknown counts as slow."""
    shares = []
    for path in root.glob(_FREQUENCIES):
        now, full = _number(path), _number(path.with_name("cpuinfo_max_freq"))
        if now and full:
            shares.append(now / full)
    return max(shares, default=0.0) < _FULL


_EVERY_S: Final = 5.0
_COOL: Final = 6
"""Readings without throttling after which a device drafts again, half a minute: it heats up faster than it cools."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class HeatSensor:
    """Reads temperature and throttling every few seconds, on a thread.

    Attributes:
        temperature_c: Of the processor; None if it is not shown.
        throttled: A sentence that says that the processor is throttled, and why; None if it is not.
        on_change: Called on the thread when `throttled` begins or ends.
    """

    root: Path = SYSFS
    on_change: Callable[[], None] = lambda: None
    temperature_c: float | None = None
    throttled: str | None = None
    _counts: int | None = None  # of throttling events, at the last reading
    _cool: int = 0
    _ending: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to read, unless the machine shows nothing."""
        self.read()
        if self._thread is None and any(next(self.root.glob(each), None) for each in (_ZONES, _FIRMWARE, _COUNTS)):
            self._thread = threading.Thread(target=self._run, name="heat", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._ending.set()
        if self._thread is not None:
            self._thread.join()

    def read(self) -> None:
        try:
            self.temperature_c = temperature(self.root)
            cause = next(causes(self.root), None)
            counts = sum(_number(path) or 0 for path in self.root.glob(_COUNTS))
        except OSError:  # a folder has gone in the meantime
            return
        if self._counts is not None and counts > self._counts:
            cause = cause or "it has reached its limit of temperature"
        self._counts = counts
        self._cool = 0 if cause else self._cool + 1
        if cause and self.throttled is None:
            at = "" if self.temperature_c is None else f" at {self.temperature_c:.0f} °C"
            self.throttled = f"The processor is throttled{at}: {cause}."
            _log.warning("%s The draft model rests until it has cooled.", self.throttled)
            self.on_change()
        elif self.throttled is not None and self._cool >= _COOL:
            self.throttled = None
            _log.info("The processor is no longer throttled; the draft model may be used again.")
            self.on_change()

    def _run(self) -> None:
        while not self._ending.wait(_EVERY_S):
            self.read()


def joules_of(generation: Generation, power: Power, idle: float) -> float:
    """Return the energy of a session: `idle` joules, and those of its draft tokens and messages by the figures."""
    counters = generation.counters
    drafting = max(0.0, power.drafting_w - power.idle_w) * counters.draft_ms / 1e3
    messages = generation.drafts + counters.rounds + counters.edge_only / RENEWED
    sent = counters.uplink_bytes + counters.downlink_bytes + messages * MESSAGE_BYTES
    return idle + drafting + power.joules_per_mb * sent / 1e6


@dataclass(slots=True)
class EnergyMeter:
    """Joules of each request, by the figures in `power`.

    The draft model's energy and that of the bytes belong to their request. What the machine uses anyway is shared by
    the requests that run at the time.
    """

    power: Power
    clock: Callable[[], float] = time.monotonic
    _last: float = 0.0
    _shared: float = 0.0  # joules of each request that has run all the time
    _running: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def running(self) -> Iterator[Callable[[Generation], float | None]]:
        """Measure a request; when it has ended, the yielded function returns its joules, or None without figures."""
        with self._lock:
            self._advance()
            self._running += 1
            began = ended = self._shared
        try:
            yield lambda generation: joules_of(generation, self.power, ended - began) if self.power.known else None
        finally:
            with self._lock:
                self._advance()
                self._running -= 1
                ended = self._shared

    def _advance(self) -> None:
        now = self.power.idle_w * self.clock()
        if self._running:
            self._shared += (now - self._last) / self._running
        self._last = now
