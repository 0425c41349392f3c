import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_gguf import tiny_gguf
from tests.support.waiting import PATIENCE_S


@pytest.mark.broker
def test_a_conversation_goes_through_broker_and_edge_and_remembers_what_was_said(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    done = subprocess.run(
        [
            sys.executable, "-m", "fleet_cli.main", "demo", "--chat",
            "--draft", str(path), "--target", str(path), "--engine", "llama.cpp", "--devices", "1",
            "--max-new-tokens", "24", "--db", f"sqlite:///{tmp_path / 'fleet.sqlite3'}",
        ],
        input="the teeth\nthe teeth\n/stats\n",
        capture_output=True,
        text=True,
        errors="replace",
        timeout=2 * PATIENCE_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"tokens +\d+ (drafted and accepted|edge-only)", done.stderr), done.stderr
