import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTBED = ROOT / "tests" / "ansible" / "testbed" / "machines"

# Bundles, eight plays and booting the machines take many minutes.
pytestmark = [
    pytest.mark.root,
    pytest.mark.exhaustive,
    pytest.mark.broker,
    pytest.mark.models,
    pytest.mark.timeout(5400),
]


@pytest.fixture(scope="module")
def _machines(tmp_path_factory: pytest.TempPathFactory) -> None:
    environment = {**os.environ, "FLEET_TESTBED": str(tmp_path_factory.mktemp("testbed") / "state")}
    booted = subprocess.run([TESTBED, "up", "broker1"], env=environment, capture_output=True, text=True, check=False)
    subprocess.run([TESTBED, "down"], env=environment, capture_output=True, check=False)
    if booted.returncode:
        pytest.skip(f"no machine can be booted here: {booted.stderr.strip()[-300:]}")


@pytest.mark.usefixtures("_machines")
def test_a_fleet_is_rolled_out_from_nothing_and_its_log_is_restored(tmp_path: Path) -> None:
    bundles = Path(os.environ.get("FLEET_BUNDLES", tmp_path / "bundles"))
    environment = {**os.environ, "FLEET_BUNDLES": str(bundles), "PYTHON": sys.executable}
    # The wheel for this processor, which the set-up has built: for all processors it takes ten minutes of compiling.
    wheels = bundles / f"{platform.machine()}-cp{sys.version_info.major}{sys.version_info.minor}" / "wheels"
    subprocess.run([ROOT / "scripts" / "llama-wheel", wheels, "--native"], env=environment, check=True)
    command = [ROOT / "tests" / "ansible" / "system-test", "small"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert done.stdout.count("ok      ") >= 6
