"""Permissions of every identity on every topic, both ways, on a real mosquitto with real certificates.

The expectation comes from `tests.support.access_matrix`, like the table in `broker_config/README.md`; the rendered
files are tested against it.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_config.broker import LARGEST_PACKET, Broker
from broker_config.files import Profile, render_files
from broker_config.mosquitto import ACCESS_FILE, CONF_FILE, render_access
from tests.support.access_probe import Prober, SubscriptionForm, topics_to_try
from tests.support.broker_trial import INSPECTOR, BrokerTrial, begin_trial, connect_all
from tests.support.brokers import require_mosquitto

pytestmark = [pytest.mark.broker, pytest.mark.xdist_group("access matrix")]

HOME = Path("/etc/mosquitto/fleet")
DESCRIPTION = Broker.production(edges=("edge-1", "edge-2"), banned=("device-c",), home_assistant="home")
DEVICES = ("device-a", "device-b", "device-c")
IMPOSTORS = ("_edge/edge-1", "_edge/edge-2")
JANITOR = "monitor-janitor"
USERS = (*DEVICES, *DESCRIPTION.edges, *DESCRIPTION.monitors, JANITOR, "home", *IMPOSTORS)

WITHOUT_EFFECT = re.compile(
    r"-> 'topic readwrite (dssd/v1/home/_edge/edge-\d/(state|chat)|\$SYS/#|homeassistant/status)'"
)
"""Wider only in form: all may read what edges retain, and Home Assistant its status; nobody writes below $SYS."""


class Stage:
    def __init__(self, trial: BrokerTrial, description: Broker, users: tuple[str, ...]) -> None:
        self.trial = trial
        self.links = connect_all(trial, users)
        inspector = self.links.pop(INSPECTOR)
        devices = [*DEVICES, "edge-1", "monitor"]
        self.prober = Prober(description, self.links, inspector, topics_to_try(description, devices))


def rendered(description: Broker) -> tuple[str, str]:
    texts = {file.name: file.text for file in render_files(description, Profile.PRODUCTION, home=HOME)}
    return texts[CONF_FILE], texts[ACCESS_FILE]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    require_mosquitto()
    with begin_trial(*rendered(DESCRIPTION), DESCRIPTION, tmp_path_factory.mktemp("matrix")) as trial:
        yield Stage(trial, DESCRIPTION, USERS)


def faults(stage: Stage, form: SubscriptionForm) -> list[str]:
    return [str(deviation) for deviation in stage.prober.deviations([form])]


@pytest.mark.parametrize("form", SubscriptionForm, ids=lambda form: form.name.lower())
def test_everyone_who_is_let_in_can_do_what_the_table_says_and_nothing_else(
    stage: Stage, form: SubscriptionForm
) -> None:
    assert faults(stage, form) == []


def test_nobody_else_is_let_in(stage: Stage) -> None:
    refusals = {what: stage.trial.refusal(files) for what, files in stage.trial.bad_identities().items()}
    reasons = {
        "of an unknown authority": "UNKNOWN_CA",
        "expired": "CERTIFICATE_EXPIRED",
        "not valid yet": "BAD_CERTIFICATE",
        "revoked": "CERTIFICATE_REVOKED",
        "that is missing": "CERTIFICATE_REQUIRED",
    }
    assert set(refusals) == set(reasons)
    for what, reason in reasons.items():
        assert reason in (refusals[what] or ""), what
    assert stage.trial.refusal(stage.trial.identity("device-d")) is None, "or nothing is shown"


def test_a_client_id_that_is_anothers_does_not_end_the_others_session(stage: Stage) -> None:
    stage.trial.connect("thief", client_id="device-b")
    assert stage.trial.broker.await_log("as thief")
    assert stage.links["device-b"].counters.losses == 0
    assert faults(stage, SubscriptionForm.WILDCARD) == []


def test_the_limit_of_packets_is_announced(stage: Stage) -> None:
    link = stage.trial.connect("device-d", packet_bytes=LARGEST_PACKET)
    assert link.max_packet_bytes == DESCRIPTION.max_packet_bytes


def test_a_name_that_is_not_on_the_list_of_devices_has_no_right_at_all(tmp_path: Path) -> None:
    description = Broker.production(devices=DEVICES)
    users = (*DEVICES, "edge-1", "monitor", "device-x", "_edge/edge-1", "_edge/phantom")
    with begin_trial(*rendered(description), description, tmp_path) as trial:
        listed = Stage(trial, description, users)
        assert [str(deviation) for deviation in listed.prober.deviations()] == []


def mutations(text: str) -> Iterator[tuple[str, str]]:
    """Yield every change that removes or widens a line, with its name."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if not line or line.startswith("#"):
            continue
        wider = set()
        if not line.startswith("user "):
            wider = {
                re.sub(r"^(topic|pattern) (read|write) ", r"\1 readwrite ", line),
                re.sub(r"/[^/]+$", "/#", line),
                re.sub(r"/\+$", "/#", line),
                line.replace("/%u/", "/+/"),
                line.replace("/home/", "/+/"),
                re.sub(r"/edge-\d", "/+", line),
            } - {line}
        for changed in (None, *sorted(wider)):
            body = [*lines[:number], *([] if changed is None else [changed]), *lines[number + 1 :]]
            yield f"{line!r} -> {changed!r}", "\n".join(body) + "\n"


@pytest.mark.exhaustive
def test_every_line_of_the_rules_matters(stage: Stage) -> None:
    survived = []
    tried = 0
    for what, text in mutations(render_access(DESCRIPTION)):
        tried += 1
        stage.trial.broker.set_access(text)
        if next(stage.prober.deviations([SubscriptionForm.WILDCARD]), None) is None:
            survived.append(what)
    stage.trial.broker.set_access(render_access(DESCRIPTION))
    assert faults(stage, SubscriptionForm.WILDCARD) == []
    assert survived == [what for what in survived if WITHOUT_EFFECT.search(what)]
    assert len(survived) <= 2 * len(DESCRIPTION.edges) + 2
    assert tried > 100
