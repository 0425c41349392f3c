import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fleet_common.checks import Check, CheckStatus
from fleet_device.api.listening import listen
from fleet_device.checks.doctor import Doctor, RunningDevice, refuse_beside_running, running_device
from fleet_device.drafters.contract import DrafterError
from fleet_device.errors import ConfigurationError
from schemas.control import Presence
from schemas.vocabulary import Vocabulary
from tests.support.memory_device import TalkingDrafter, announce_edge, settings
from tests.support.memory_fleet import DRAFT, FLEET, MemoryFleet
from tests.support.memory_link import MemoryLink
from tests.support.tls_fleet import enrol, new_authority

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)
NAMES = [
    "threads", "certificate", "memory", "model", "api", "broker", "clock", "edge", "vocabulary", "generation"
]  # fmt: skip
NOT_APPLICABLE = {("certificate", "skipped"), ("api", "skipped")}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "draft.gguf"
    path.write_bytes(b"GGUF" + bytes(3_000_000 - 4))
    return path


def doctor(fleet: MemoryFleet, model: Path, drafter: TalkingDrafter | None = None, **given: object) -> Doctor:
    return Doctor(
        settings(model=str(model), **given),
        load=lambda _settings: drafter or TalkingDrafter(),
        make_link=lambda link: MemoryLink(fleet.broker, link.client_id, will=link.will),
        running=lambda _settings: None,
        now=lambda: NOW,
        available=lambda: 1_000_000_000,
    )


def status(checks: list[Check]) -> dict[str, str]:
    """Return the state of checks that are not ok; without TLS and API, nothing of these two can be checked."""
    found = {check.name: check.status.value for check in checks if check.status is not CheckStatus.OK}
    assert "certificate" in found
    return {name: state for name, state in found.items() if (name, state) not in NOT_APPLICABLE}


def sentence(checks: list[Check], name: str) -> str:
    return next(check.sentence for check in checks if check.name == name)


def test_a_fit_device_passes_every_check_and_leaves_nothing(fleet: MemoryFleet, model: Path) -> None:
    drafter, seen = TalkingDrafter(), list[Check]()
    announce_edge(fleet)
    patient = doctor(fleet, model, drafter)
    patient.on_check = seen.append
    checks = patient.run()
    assert [check.name for check in checks] == NAMES
    assert status(checks) == {}
    assert seen == checks
    assert sentence(checks, "threads").startswith("1 thread for drafting on ")
    assert "TLS is off" in sentence(checks, "certificate")
    assert "1,000 MB are free; the draft model takes 103 MB (3 MB its file)" in sentence(checks, "memory")
    assert "drafts a token in" in sentence(checks, "model")
    assert "Connected to 127.0.0.1:1883 as device-1 in" in sentence(checks, "broker")
    assert sentence(checks, "clock").endswith("edge edge-1 connected 151 days ago.")
    assert "software 9.9" in sentence(checks, "edge")
    assert sentence(checks, "vocabulary") == f"{Vocabulary.of(list(DRAFT.words))}, at edge-1 too."
    assert "tokens by edge-1 at " in sentence(checks, "generation")
    assert "acceptance" in sentence(checks, "generation")
    assert fleet.broker.retained(f"dssd/v1/{FLEET}/device-1/state") is None
    assert len(fleet.edge.sessions) == 0
    assert drafter.closed


def test_a_model_that_does_not_fit_into_memory_is_not_loaded(fleet: MemoryFleet, model: Path) -> None:
    drafter = TalkingDrafter()
    announce_edge(fleet)
    patient = doctor(fleet, model, drafter)
    patient.available = lambda: 50_000_000
    checks = patient.run()
    assert status(checks) == {
        "memory": "failed", "model": "skipped", "vocabulary": "skipped", "generation": "skipped"
    }  # fmt: skip
    assert "takes 103 MB (3 MB its file), and 50 MB are free" in sentence(checks, "memory")
    assert sentence(checks, "model") == "Skipped, because memory failed."
    assert not drafter.closed


def test_a_broken_model_is_quoted_and_the_rest_is_checked(fleet: MemoryFleet, model: Path) -> None:
    def fail(_settings: object) -> TalkingDrafter:
        raise DrafterError("It is not a GGUF file.")

    announce_edge(fleet)
    patient = doctor(fleet, model)
    patient.load = fail
    checks = patient.run()
    assert status(checks) == {"model": "failed", "vocabulary": "skipped", "generation": "skipped"}
    assert sentence(checks, "model") == "It is not a GGUF file."
    assert sentence(checks, "edge").startswith("Online: edge-1 with toy-target")


def test_a_broker_that_is_away_keeps_the_edge_from_being_tried(fleet: MemoryFleet, model: Path) -> None:
    drafter = TalkingDrafter()
    fleet.broker.up = False
    checks = doctor(fleet, model, drafter).run()
    assert status(checks) == {
        "broker": "failed", "clock": "skipped", "edge": "skipped", "vocabulary": "skipped", "generation": "skipped"
    }  # fmt: skip
    assert "there is neither a certificate nor an edge to compare with" in sentence(checks, "clock")
    assert drafter.closed


@pytest.mark.parametrize(
    ("presence", "words"),
    [(None, "none has sent a message"), (Presence.OFFLINE, "is offline"), (Presence.DRAINING, "is draining")],
)
def test_an_edge_that_is_away_is_told(fleet: MemoryFleet, presence: Presence | None, words: str, model: Path) -> None:
    if presence is not None:
        announce_edge(fleet, presence)
    checks = doctor(fleet, model).run()
    assert status(checks) == {
        "clock": "skipped", "edge": "failed", "vocabulary": "skipped", "generation": "skipped"
    }  # fmt: skip
    assert words in sentence(checks, "edge")
    assert "fleet edge run" in sentence(checks, "edge")


def test_a_clock_that_is_behind_what_has_happened_is_told_by_how_much(fleet: MemoryFleet, model: Path) -> None:
    announce_edge(fleet, since=NOW + timedelta(hours=3))
    checks = doctor(fleet, model).run()
    assert status(checks) == {"clock": "failed"}
    assert "behind by 3 hours at least; set it" in sentence(checks, "clock")


def test_an_unlike_vocabulary_is_found_by_state_or_refusal(fleet: MemoryFleet, model: Path) -> None:
    other = [f"other{token}" for token in range(6)]
    announce_edge(fleet)
    checks = doctor(fleet, model, TalkingDrafter(words=other)).run()
    assert status(checks) == {"vocabulary": "failed", "generation": "skipped"}
    assert "use a draft model of the" in sentence(checks, "vocabulary")
    announce_edge(fleet, vocabulary=str(Vocabulary.of(other)))
    checks = doctor(fleet, model, TalkingDrafter(words=other)).run()
    assert status(checks) == {"generation": "failed"}
    assert "vocabulary" in sentence(checks, "generation")


def test_what_uses_the_address_of_the_api_is_not_disconnected(fleet: MemoryFleet, model: Path) -> None:
    announce_edge(fleet)
    with listen() as taken:
        checks = doctor(fleet, model, api_listen=f"127.0.0.1:{taken.getsockname()[1]}").run()
    assert status(checks) == {
        "api": "failed", "broker": "skipped", "clock": "skipped", "edge": "skipped", "vocabulary": "skipped",
        "generation": "skipped",
    }  # fmt: skip
    assert "stop what listens there" in sentence(checks, "api")


RUNNING = {
    "device": "device-1",
    "fleet": FLEET,
    "reason": None,
    "drafter": {"name": "toy", "quantization": "Q4_0", "vocabulary": "6 tokens, aa"},
    "broker": {"host": "127.0.0.1", "port": 1883},
    "edges": [{"edge": "edge-1", "presence": "online", "target": "toy-target", "vocabulary": "6 tokens, aa"}],
}


@pytest.mark.parametrize("other", [{"fleet": "plant"}, {"broker": {"host": "b", "port": 8883}}])
def test_a_device_of_this_name_with_another_configuration_is_not_taken_for_this_one(
    fleet: MemoryFleet, model: Path, other: dict[str, object]
) -> None:
    seen = list[Check]()
    patient = doctor(fleet, model)
    patient.running = lambda _settings: RunningDevice.model_validate(RUNNING | other)
    patient.on_check = seen.append
    with pytest.raises(ConfigurationError, match="--config"):
        patient.run()
    assert not seen
    assert patient._link is None


def test_a_running_device_is_asked_instead_of_the_broker(fleet: MemoryFleet, model: Path) -> None:
    patient = doctor(fleet, model)
    patient.running = lambda _settings: RunningDevice.model_validate(RUNNING)
    checks = patient.run()
    assert [check.name for check in checks] == ["threads", "certificate", "service", "clock", "vocabulary"]
    assert status(checks) == {"clock": "skipped"}
    assert "edge-1 with toy-target" in sentence(checks, "service")
    assert patient._link is None
    patient.running = lambda _settings: RunningDevice.model_validate(RUNNING | {"reason": "The broker is away."})
    checks = patient.run()
    assert status(checks) == {"service": "failed", "clock": "skipped", "vocabulary": "skipped"}
    assert sentence(checks, "service") == "The broker is away."


def test_a_certificate_of_another_device_is_not_used(fleet: MemoryFleet, model: Path, tmp_path: Path) -> None:
    files = enrol(new_authority(tmp_path / "ca"), "device-7", tmp_path / "files")
    announce_edge(fleet)
    broker = {"ca": files.ca, "certificate": files.certificate, "key": files.key}
    patient = doctor(fleet, model, broker=broker)
    patient.now = lambda: datetime.now(UTC)
    checks = patient.run()
    assert status(checks) == {
        "certificate": "failed", "broker": "failed", "edge": "skipped", "vocabulary": "skipped", "generation": "skipped"
    }  # fmt: skip
    assert "would take this device for 'device-7'" in sentence(checks, "broker")
    assert patient._link is None


@contextmanager
def answering(body: bytes) -> Iterator[int]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


HEALTH = (
    b'{"device": "device-1", "fleet": "test", "reason": "No edge.", "edges": [],'
    b' "broker": {"connected": true, "host": "h", "port": 1883},'
    b' "drafter": {"name": "toy", "quantization": "Q4_0", "context": 9, "vocabulary": "v"}, "status": "waiting"}'
)


def test_a_device_is_known_to_run_by_its_name_and_none_takes_its_place() -> None:
    with answering(HEALTH) as port:
        own = settings(api_listen=f"127.0.0.1:{port}")
        found = running_device(own)
        assert (found.reason, found.online) == ("No edge.", ())
        other = own.model_copy(update={"device": "device-2"})
        assert running_device(other) is None
        refuse_beside_running(other)
        with pytest.raises(ConfigurationError):
            refuse_beside_running(own)
    assert running_device(settings(api_listen="")) is None
    assert running_device(own) is None


@pytest.mark.parametrize("body", [b"", b"[]", b'{"device": "device-1"}', b"\xff"])
def test_what_is_no_device_is_not_taken_for_one(body: bytes) -> None:
    with answering(body) as port:
        assert running_device(settings(api_listen=f"127.0.0.1:{port}")) is None
