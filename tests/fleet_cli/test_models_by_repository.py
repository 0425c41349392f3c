import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import PATIENCE_S

# Nothing listens at port 1, so a connection is refused at once; the client would retry six times.
NO_HUB = "http://127.0.0.1:1"


def fleet(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {"HF_ENDPOINT": NO_HUB, "HF_HOME": str(folder)}
    environment |= {"FLEET_EDGE_DB": f"sqlite:///{folder / 'log.sqlite3'}", "FLEET_EDGE_SPOOL": str(folder / "spool")}
    command = [sys.executable, "-m", "fleet_cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=environment)


@pytest.mark.parametrize(
    "arguments",
    [
        ["device", "generate", "--model", "owner/small-GGUF:*.gguf", "Why?"],
        pytest.param(["edge", "run", "--target", "owner/large"], marks=pytest.mark.slow),
    ],
    ids=lambda words: " ".join(words[:4]),
)
def test_a_missing_hub_is_one_sentence_without_retries(arguments: list[str], tmp_path: Path) -> None:
    done = fleet(tmp_path, *arguments)
    # The error of the missing broker follows.
    *before, last = [line for line in done.stderr.splitlines() if "No broker listens" not in line]
    assert (done.returncode, done.stdout) == (2, "")
    assert last.startswith("fleet: ")
    assert "owner/" in last
    assert "127.0.0.1" in last
    assert [line for line in before if not line.startswith("Loading the target model")] == []
