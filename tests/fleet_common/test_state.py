from pathlib import Path

import pytest

from fleet_common.state import state_folder


def test_the_folder_is_systemds_or_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    assert state_folder({"STATE_DIRECTORY": "/var/lib/a:/b", "XDG_STATE_HOME": "/c"}) == Path("/var/lib/a")
    assert state_folder({"XDG_STATE_HOME": "/c"}) == Path("/c/dssd-fleet")
    for ignored in ("", "relative"):
        assert state_folder({"XDG_STATE_HOME": ignored}) == Path.home() / ".local/state/dssd-fleet"

    def no_home() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", no_home)
    assert state_folder({}) is None
