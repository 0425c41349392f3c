"""Markers of what a test needs: using a broker, models or a server without its marker fails."""

import os
from typing import NoReturn

import pytest

_markers: set[str] = set()


def note_markers(item: pytest.Item) -> None:
    """Remember the markers of the test that begins; fixtures of any scope are set up for it."""
    _markers.clear()
    _markers.update(marker.name for marker in item.iter_markers())


def require_marker(name: str) -> None:
    """Fail a test that uses what only tests with this marker may use.

    `make check` selects by marker, and would otherwise run it on a machine that lacks what it needs.
    """
    if name not in _markers:
        pytest.fail(f"Mark this test with pytest.mark.{name}: it needs what that marker stands for.")


def missing(reason: str) -> NoReturn:
    """Skip a test for what is not on this machine; fail it in CI, which must have everything."""
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason)
    pytest.skip(reason)
