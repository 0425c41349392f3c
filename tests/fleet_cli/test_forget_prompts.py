from pathlib import Path

import pytest

from tests.support.command import Run


def test_what_an_edge_keeps_for_its_next_start_is_deleted(
    fleet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    kept = tmp_path / "pages" / "fleet.edge-1"
    kept.parent.mkdir(mode=0o700)
    kept.write_bytes(b"prompts")
    for _ in range(2):  # the second time there is nothing
        assert fleet("edge", "forget-prompts", "--kv-kept", "disk")[0] == 0
        assert not kept.exists()
