"""Selection of devices: by name, by label, all, or by what they are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from fleet_admin.steering.errors import SteeringError
from fleet_edge.store.states import MachineState
from schemas.control import Presence
from schemas.errors import InvalidName
from schemas.names import check_name


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownDevice:
    """What a selection is made by.

    Attributes:
        device: Its name.
        presence: Its last word; None if it was never heard.
        software: Its release.
        draft_model: Its draft model.
        state: As `fleet_edge.store.states` defines it.
        retired_at: Since when it is out of service.
        labels: Those that it has.
        edges: That have served it lately.
    """

    device: str
    presence: Presence | None = None
    software: str | None = None
    draft_model: str | None = None
    state: MachineState = MachineState.UNKNOWN
    retired_at: datetime | None = None
    labels: tuple[str, ...] = ()
    edges: tuple[str, ...] = ()

    @property
    def silent(self) -> bool:
        """Whether it is silent or offline."""
        return self.state in (MachineState.SILENT, MachineState.OFFLINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which devices are meant. Names and labels add up; all else narrows down.

    Attributes:
        devices: By name.
        labels: Those with at least one of these labels.
        everything: All that are not retired.
        edge: Of those, the ones that this edge has served within a day.
        draft_model: Of those, the ones with this draft model.
        software: Of those, the ones of this release.
        silent: Of those, the ones that are silent or offline, or with False the others.
    """

    devices: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    everything: bool = False
    edge: str | None = None
    draft_model: str | None = None
    software: str | None = None
    silent: bool | None = None
    _narrow: bool = field(init=False, default=False, repr=False)

    def __post_init__(self) -> None:
        """Check it.

        Raises:
            SteeringError: It names nobody, or names what cannot be a device.
        """
        try:
            for name in self.devices:
                check_name(name)
        except InvalidName as error:
            raise SteeringError(str(error)) from None
        narrow = any(each is not None for each in (self.edge, self.draft_model, self.software, self.silent))
        object.__setattr__(self, "_narrow", narrow)
        if not (self.devices or self.labels or self.everything or narrow):
            raise SteeringError("Nobody is chosen: give --device, --label, --all, or what the devices have in common.")
        if self.everything and (self.devices or self.labels):
            raise SteeringError("All devices are chosen and some of them beside: leave out --all, or the others.")

    def choose(self, known: Mapping[str, KnownDevice]) -> list[str]:
        """Return the names of the chosen devices, sorted.

        Raises:
            SteeringError: A name is of no device that is known, or nobody is left.
        """
        if unknown := sorted(set(self.devices) - known.keys()):
            raise SteeringError(
                f"No device {unknown[0]!r} is known to the broker or the session log; check the name, or see them with "
                "`fleet admin devices`."
            )
        by_name = bool(self.devices or self.labels)
        chosen = [each.device for each in known.values() if self._named(each, by_name=by_name) and self._fits(each)]
        if not chosen:
            raise SteeringError("No device is chosen by that; see their labels with `fleet admin labels`.")
        return sorted(chosen)

    def __str__(self) -> str:
        said = [*self.devices, *(f"label {label}" for label in self.labels), *(["all"] if self.everything else [])]
        said += [f"{name} {value}" for name, value in self._filters() if value is not None]
        return ", ".join(said)

    def _filters(self) -> list[tuple[str, object]]:
        silent = None if self.silent is None else "silent" if self.silent else "not silent"
        return [("edge", self.edge), ("model", self.draft_model), ("release", self.software), ("that are", silent)]

    def _named(self, each: KnownDevice, *, by_name: bool) -> bool:
        if each.device in self.devices:
            return True
        if each.retired_at is not None:  # only by its name
            return False
        return not by_name or not set(self.labels).isdisjoint(each.labels)

    def _fits(self, each: KnownDevice) -> bool:
        return (
            (self.edge is None or self.edge in each.edges)
            and (self.draft_model is None or self.draft_model == each.draft_model)
            and (self.software is None or self.software == each.software)
            and (self.silent is None or self.silent == each.silent)
        )
