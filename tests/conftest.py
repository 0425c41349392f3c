"""Options, markers and fixtures of all tests, and their distribution over parallel workers."""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

# Set before any test imports torch: spinning threads starve other programs on the same cores, and parallel workers
# divide the cores among themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = str(max(1, (os.cpu_count() or 1) // int(workers)))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    os.environ.setdefault("FLEET_EDGE_THREADS", threads)

# Edges of different tests have one name: what one of them keeps for its next start must not reach another.
os.environ.setdefault("FLEET_EDGE_KV_KEPT", "off")

# Devices' state and an operator's profile are stored here, not in the user's home.
os.environ["XDG_STATE_HOME"] = os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="fleet-tests-")

import pytest
from hypothesis import HealthCheck, settings

from tests.support.brokers import free_port, mosquitto, own_mosquitto, start_mosquitto
from tests.support.chromium import chromium, running_chromium
from tests.support.command import fleet
from tests.support.databases import database_server, database_url, empty_databases, postgres, tables
from tests.support.needs import note_markers

__all__ = [
    "chromium",
    "database_server",
    "database_url",
    "empty_databases",
    "fleet",
    "free_port",
    "mosquitto",
    "own_mosquitto",
    "postgres",
    "running_chromium",
    "start_mosquitto",
    "tables",
]

# Where nothing keeps compiled files, each worker would rewrite all tests again, and each process compile its modules.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# The same examples in each run: a new one is looked for by fuzzing and by `--hypothesis-profile=search`, not by chance.
# The speed of drawing them depends on the machine's load, not on the tested code.
settings.register_profile("search", derandomize=False, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fleet", settings.get_profile("search"), derandomize=True, database=None)
settings.load_profile("fleet")

# Fixtures that load real models, and the group of the tests that have them: two, so that neither takes longest.
_REAL_MODELS = {"verifier": "models", "oracle": "models", "drafters": "draft models"}
_LONG = ("exhaustive", "root", "broker", "models", "postgres", "slow")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="number format of every real target model (default: float32 where texts are compared, else the machine's)",
    )


class FailuresAtOnce:
    """Reports a failed test at once, so that an interrupted run has reported its failures."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and reporter is not None:
            reason = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
            reporter.write_line(f"\nFAILED {report.nodeid}: {(reason.splitlines() or [''])[0][:200]}")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailuresAtOnce(config))


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_STATE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def forced_dtype(pytestconfig: pytest.Config) -> str | None:
    dtype: str | None = pytestconfig.getoption("--dtype")
    return dtype


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[Any]) -> Iterator[None]:
    """Group what is costly to load, and begin with what takes long, so that no worker has it left at the end."""
    for item in items:
        if "/verifiers/blocks/" in item.nodeid or "[blocks" in item.nodeid:
            item.add_marker(pytest.mark.xdist_group("blocks"))
        names = getattr(item, "fixturenames", ())
        groups = [group for fixture, group in _REAL_MODELS.items() if fixture in names]
        if groups and item.get_closest_marker("models"):
            item.add_marker(pytest.mark.xdist_group(groups[0]))
    if os.environ.get("PYTEST_XDIST_WORKER"):
        items.sort(key=_place)
    yield
    for item in items:
        # xdist 3.8 gives the groups of tests to an attribute that pytest 9.2 no longer reads.
        if getattr(item, "_nodeid", item.nodeid) != item.nodeid:
            item._id = type(item._id).parse(item._nodeid)


def _place(item: Any) -> tuple[float, bool, bool]:
    """Sort by own time limit, then groups, then what waits for processes: fast tests fill the gaps at the end."""
    limit = item.get_closest_marker("timeout")
    return (
        -max(600, limit.args[0] if limit else 0),
        item.get_closest_marker("xdist_group") is None,
        not any(item.get_closest_marker(name) for name in _LONG),
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Look for no garbage while modules are imported, and never among what is imported and collected."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    note_markers(item)
