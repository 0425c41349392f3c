import logging
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.fuzz.harness import SurvivedErrors, Watch
from tests.fuzz.mutation import mutate_bytes
from tests.fuzz.targets.registry import TARGETS, Target

CORPUS = Path(__file__).parent / "corpus"
MAX_BYTES = 300 << 10


@pytest.fixture(autouse=True)
def log() -> Iterator[SurvivedErrors]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    log = SurvivedErrors()
    log.install()
    yield log
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    target = TARGETS[request.param]()
    yield target
    target.close()


each_target = pytest.mark.parametrize(("name", "target"), [(name, name) for name in TARGETS], indirect=["target"])


def inputs(name: str) -> list[Path]:
    return sorted((CORPUS / name).glob("*.bin"))


@each_target
def test_the_corpus_is_replayed(name: str, target: Target, log: SurvivedErrors) -> None:
    paths = inputs(name)
    assert len(paths) >= 3
    for path in paths:
        try:
            target(path.read_bytes())
            log.check()
        except Exception as error:
            raise AssertionError(f"{path.relative_to(CORPUS)}: see it with python -m tests.fuzz --replay") from error


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for name in TARGETS for path in inputs(name)) <= MAX_BYTES


@pytest.mark.parametrize("target", TARGETS, indirect=True)
def test_seeds_and_their_mutations_are_inputs(target: Target, log: SurvivedErrors) -> None:
    rng = random.Random(1)
    seeds = list(target.seeds())
    for seed in seeds[:20]:
        target(seed)
        data = target.mutate(seed, rng, lambda part: mutate_bytes(part, rng))
        target(target.cross(data, rng.choice(seeds), rng)[: target.max_bytes])
        log.check()


def broken(*_arguments: Any, **_options: Any) -> Any:
    raise KeyError("planted")


PLANTED: dict[str, tuple[str, Any]] = {
    "codec-up": ("schemas.errors.MalformedMessage.__init__", ValueError.__init__),  # which cleans nothing
    "codec-down": ("schemas.errors.MalformedMessage.__init__", ValueError.__init__),
    "control": ("schemas.control.MalformedMessage.from_validation", broken),
    "edge": ("fleet_edge.handlers.MessageHandlers._on_close", broken),  # survived, and logged
    "device": ("fleet_device.client.messaging.decode_verdict", broken),  # likewise
    "api": ("fleet_device.api.app.read_request", broken),
    "screen": ("fleet_common.mqtt.screen.Screen._owe", lambda _screen, _puback: None),
}


@each_target
def test_a_planted_fault_is_found_by_replaying(
    name: str, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*PLANTED[name])
    monkeypatch.setattr("tests.fuzz.harness.gc", Mock())  # the objects of all tests would be collected
    watch = Watch(target, tmp_path)
    for path in inputs(name):
        watch(path.read_bytes())
    assert watch.stats.crashes
    assert any(path.name.startswith("crash-") for path in tmp_path.iterdir())


GREEDY = """
import sys
from pathlib import Path
from tests.fuzz.harness import Watch

watch = Watch(lambda data: bytes(1) * (len(data) << 27) and None, Path(sys.argv[1]))
for data in (b"", b"\\x01"):
    watch(data)
    print(watch.stats.crashes)
"""


def test_what_takes_memory_out_of_proportion_is_found(tmp_path: Path) -> None:
    # In a process of its own, because the peak of earlier tests must not count.
    program = subprocess.run([sys.executable, "-c", GREEDY, tmp_path], capture_output=True, text=True, check=True)
    before, after = program.stdout.splitlines()
    assert before == "[]"
    assert "MB" in after
