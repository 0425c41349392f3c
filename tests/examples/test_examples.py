import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fleet_device
from broker_config.processes import MosquittoProcess
from fleet_device import FleetError, TextOptions
from tests.support.prepared_models import prepared
from tests.support.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
NAMES = ("query_the_log.py", "run_an_edge.py", "score_alone.py", "stream_a_chat.py", "write_a_text.py")
MAX_LINES = 40


def run(name: str, *arguments: object, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        input=typed,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
        env=environment(),
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_examples_are_short_and_a_page_names_each() -> None:
    page = "".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("applications", "scoring"))
    found = tuple(sorted(path.name for path in EXAMPLES.glob("*.py") if not path.name.startswith("reference_")))
    assert found == NAMES
    for name in NAMES:
        assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= MAX_LINES, name
        assert f"examples/{name}" in page, name


def test_the_page_for_applications_tells_of_every_option_and_every_error() -> None:
    page = (ROOT / "docs" / "applications.md").read_text(encoding="utf-8")
    public = {name: getattr(fleet_device, name) for name in fleet_device.__all__}
    errors = [name for name, found in public.items() if inspect.isclass(found) and issubclass(found, FleetError)]
    missing = [name for name in (*TextOptions.__annotations__, *errors) if f"`{name}`" not in page]
    assert missing == ["DeviceError"]  # the common root, meaningless alone


@pytest.mark.broker
@pytest.mark.models
def test_an_edge_serves_a_text_and_a_chat_and_logs_both(own_mosquitto: MosquittoProcess, tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'fleet.sqlite3'}"
    edge, device = tmp_path / "edge.toml", tmp_path / "device.toml"
    common = [f"broker.port = {own_mosquitto.port}", 'fleet = "home"']
    of_edge = [f'target = "{prepared("target")}"', f'db = "{database}"', f'spool = "{tmp_path / "spool"}"']
    of_device = ['device = "gateway-7"', f'model = "{prepared("Q4_0.gguf")}"', f"answer_s = {PATIENCE_S}"]
    edge.write_text("\n".join([*common, *of_edge]))
    device.write_text("\n".join([*common, *of_device]))
    serving = subprocess.Popen(
        [sys.executable, EXAMPLES / "run_an_edge.py", edge], stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert "verifies with" in serving.stdout.readline()
        written = run("write_a_text.py", "Why is the sky blue?", device)
        assert written.returncode == 0, written.stderr
        assert written.stdout.strip()
        chatted = run("stream_a_chat.py", device, typed="Name three colours.\nAnd one more?\n")
        assert chatted.returncode == 0, chatted.stderr
        assert len(chatted.stdout.strip().splitlines()) >= 2
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(PATIENCE_S) == 0
    finally:
        serving.kill()
        serving.communicate()
    told = run("query_the_log.py", database)
    assert told.returncode == 0, told.stderr
    *sessions, totals = told.stdout.splitlines()
    assert len(sessions) == 3
    assert all("gateway-7" in line for line in sessions)
    assert totals.startswith("gateway-7: 3 sessions, ")


@pytest.mark.parametrize("name", ["write_a_text.py", "run_an_edge.py", "query_the_log.py"])
def test_what_cannot_work_is_one_sentence(name: str, tmp_path: Path) -> None:
    missing = f"sqlite:///{tmp_path / 'none'}" if name == "query_the_log.py" else tmp_path / "none.toml"
    failed = run(name, *(["Hello"] if name == "write_a_text.py" else []), missing)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.count("\n") == 1
    assert failed.stderr.endswith(".\n")
