"""Views of what an administrator has decided, for people and for JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from schemas.control import SettingValue


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditView:
    """One action: who did what to whom, what was before and after, and what came of it."""

    at: datetime
    who: str
    action: str
    subject: str
    before: str | None
    after: str | None
    outcome: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedView:
    """The latest settings that a device is wanted to have."""

    device: str
    version: int
    values: Mapping[str, SettingValue]
    who: str
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedView:
    """What a device has last said of its settings; see `schemas.control.ReportedSettings`."""

    device: str
    version: int
    applied: int
    values: Mapping[str, SettingValue]
    refused: Mapping[str, str]
    needs_restart: tuple[str, ...]
    fixed: tuple[str, ...]
    at: datetime | None
    heard_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandView:
    """A command to one device. `outcome` is `ok`, `failed`, `refused`, `silent`, or None while it is under way."""

    id: str
    batch: str
    device: str
    command: str
    arguments: Mapping[str, SettingValue]
    who: str
    at: datetime
    deadline_at: datetime
    outcome: str | None
    sentence: str | None
    ended_at: datetime | None
