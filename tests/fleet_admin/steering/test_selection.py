from dataclasses import replace
from datetime import UTC, datetime

import pytest

from fleet_admin.steering import Selection, SettingsChange, SteeringError, steering
from fleet_admin.steering.planning import (
    KnownDevice,
    SettingState,
    check_change,
    plan_changes,
    read_assignments,
    settings_after,
    settings_view,
)
from fleet_admin.steering.steering import CommandAnswers
from fleet_edge.session_log.event_codes import EVENT_CODES, EventKind
from schemas.control import (
    CommandOutcome,
    CommandRequest,
    CommandResponse,
    DesiredSettings,
    Presence,
    ReportedSettings,
)

NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)
KNOWN = {
    each.device: each
    for each in (
        KnownDevice(device="a", presence=Presence.ONLINE, labels=("hall", "roof"), draft_model="small"),
        KnownDevice(device="b", presence=Presence.ONLINE, labels=("hall",), draft_model="large", software="0.2"),
        KnownDevice(device="c", presence=Presence.OFFLINE, draft_model="small"),
        KnownDevice(device="d", labels=("hall",), retired_at=NOW),
    )
}


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({"devices": ("a",)}, ["a"]),
        ({"devices": ("d",)}, ["d"]),
        ({"labels": ("hall",)}, ["a", "b"]),
        ({"labels": ("roof",), "devices": ("c",)}, ["a", "c"]),
        ({"everything": True}, ["a", "b", "c"]),
        ({"everything": True, "draft_model": "small"}, ["a", "c"]),
        ({"draft_model": "small"}, ["a", "c"]),
        ({"software": "0.2"}, ["b"]),
        ({"labels": ("hall",), "draft_model": "large"}, ["b"]),
    ],
)
def test_whom_a_selection_means(given: dict[str, object], chosen: list[str]) -> None:
    assert Selection(**given).choose(KNOWN) == chosen


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"everything": True, "labels": ("hall",)},
        {"devices": ("a b",)},
        {"devices": ("nobody",)},
        {"labels": ("never",)},
        {"devices": ("a",), "draft_model": "large"},
    ],
)
def test_a_selection_of_nobody_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(SteeringError):
        Selection(**given).choose(KNOWN)


def wanted(number: int, **values: object) -> DesiredSettings:
    return DesiredSettings.model_validate({"id": f"{number:08x}", "values": values})


def said(number: int, **refused: str) -> ReportedSettings:
    return ReportedSettings(id=f"{number:08x}", values={}, refused=refused)


def plan(
    desired: DesiredSettings | None = None,
    reported: ReportedSettings | None = None,
    **changes: object,
) -> SettingsChange:
    [found] = plan_changes(
        [KNOWN["a"]],
        changes,
        unset=(),
        desired={} if desired is None else {"a": desired},
        reported={} if reported is None else {"a": reported},
    )
    return found


def test_a_change_keeps_what_else_is_wanted_and_has_an_id_of_its_own() -> None:
    found = plan(wanted(4, top_k=5, ahead=True), said(4), top_k=7)
    assert (found.wanted, found.before) == ({"top_k": 7, "ahead": True}, {"top_k": 5})
    assert found.id != plan(wanted(4, top_k=5, ahead=True), said(4), top_k=7).id


def test_what_was_refused_is_wanted_no_more_unless_it_is_given_again() -> None:
    refused = said(4, model="There is none.")
    found = plan(wanted(4, model="x", top_k=5), refused, ahead=True)
    assert (found.wanted, found.dropped) == ({"top_k": 5, "ahead": True}, ("model",))
    again = plan(wanted(4, model="x", top_k=5), refused, model="y")
    assert (again.wanted, again.dropped) == ({"model": "y", "top_k": 5}, ())
    newer = plan(wanted(5, model="x"), refused, ahead=True)
    assert newer.dropped == (), "it has not said anything of the newer one yet"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("top_k=5", 5),
        ("temperature=0.5", 0.5),
        ("ahead=true", True),
        ("draft_length=auto", "auto"),
        ("model= small:Q4_0 ", "small:Q4_0"),
        ('model="5"', "5"),
        ("model=a=b", "a=b"),
        ("model=[1]", "[1]"),
        ("model=null", "null"),
    ],
)
def test_how_a_value_is_read(text: str, value: object) -> None:
    [found] = read_assignments([text]).values()
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("texts", [["top_k"], ["=5"], ["top_k=5", "top_k=6"], ["model=" + "a" * 400]])
def test_what_is_no_assignment_is_refused(texts: list[str]) -> None:
    with pytest.raises(SteeringError):
        read_assignments(texts)


@pytest.mark.parametrize(
    ("changes", "unset", "why"),
    [
        ({}, (), "setting"),
        ({"top_k": 5}, ("top_k",), "top_k"),
        ({"top_k": -5}, (), "top_k"),
        ({"temprature": 1}, (), "temperature"),
        ({"broker.host": "x"}, (), "broker.host"),
        ({"temperature": float("nan")}, (), "temperature"),
        ({}, ("api_listen",), "api_listen"),
        ({}, ("nothing",), "nothing"),
    ],
)
def test_impossible_settings_are_refused_at_once(changes: dict[str, object], unset: tuple[str, ...], why: str) -> None:
    with pytest.raises(SteeringError, match=why):
        check_change(changes, unset)


def change(device: str = "a", unset: tuple[str, ...] = (), **changes: object) -> SettingsChange:
    before = {device: wanted(3, ahead=True)}
    [found] = plan_changes([KNOWN[device]], changes, unset=unset, desired=before, reported={})
    return replace(found, id=wanted(4).id)


@pytest.mark.parametrize(
    ("device", "reported", "state"),
    [
        ("a", None, SettingState.SILENT),
        ("a", said(3), SettingState.SILENT),
        ("a", said(4), SettingState.IN_FORCE),
        ("a", said(4, top_k="No."), SettingState.REFUSED),
        ("a", said(3, top_k="No."), SettingState.SILENT),
        ("a", said(4).model_copy(update={"needs_restart": ("model",)}), SettingState.NEEDS_RESTART),
        ("c", None, SettingState.WAITING),
        ("c", said(3), SettingState.WAITING),
        ("d", None, SettingState.WAITING),
    ],
)
def test_what_has_become_of_a_change(device: str, reported: ReportedSettings | None, state: SettingState) -> None:
    made = change(device, top_k=5)
    desired = wanted(4, top_k=5, ahead=True)
    assert settings_after(made, desired, reported, rejected=False).state is state
    assert settings_after(made, None, reported, rejected=True).state is SettingState.REFUSED


@pytest.mark.parametrize(
    ("unset", "latest", "state"),
    [
        ((), {"top_k": 5, "ahead": True, "top_p": 0.5}, SettingState.IN_FORCE),
        ((), {"top_k": 5}, SettingState.IN_FORCE),
        ((), {"top_k": 6, "ahead": True}, SettingState.REFUSED),
        ((), {}, SettingState.REFUSED),
        (("ahead",), {"top_k": 5}, SettingState.IN_FORCE),
        (("ahead",), {"top_k": 5, "ahead": False}, SettingState.REFUSED),
    ],
)
def test_settings_of_another_monitor_since_include_the_change_or_replace_it(
    unset: tuple[str, ...], latest: dict[str, object], state: SettingState
) -> None:
    found = settings_after(change("a", unset, top_k=5), wanted(6, **latest), said(6), rejected=False)
    assert found.state is state


@pytest.mark.parametrize(
    ("desired", "reported", "state"),
    [
        (None, None, SettingState.NONE),
        (None, said(1), SettingState.NONE),
        (wanted(1, top_k=5), None, SettingState.SILENT),
        (wanted(1, top_k=5), said(1), SettingState.IN_FORCE),
        (wanted(2), said(1), SettingState.SILENT),
    ],
)
def test_desired_is_compared_with_reported(
    desired: DesiredSettings | None, reported: ReportedSettings | None, state: SettingState
) -> None:
    found = settings_view(KNOWN["a"], desired, reported)
    assert (found.device, found.state, found.reports) == ("a", state, reported is not None)


def response(result: str | None = None) -> CommandResponse:
    return CommandResponse(id="0" * 16, outcome=CommandOutcome.OK, sentence="Done.", result=result)


def test_an_answer_is_returned_once() -> None:
    request = CommandRequest(id="0" * 16, command="log-tail", deadline=NOW)
    answers = CommandAnswers({"a": request, "b": request})
    for _ in range(2):  # delivered again
        answers.listener("a")(response("abc"))
    [found] = answers.take()
    assert (found.device, found.result, found.ok) == ("a", "abc", True)
    assert answers.take() == []
    assert answers.missing == {"b"}
    answers.listener("never-asked")(response())
    answers.listener("b")(response())
    assert [each.result for each in answers.take()] == [None]


def test_what_is_logged_as_an_event_is_in_the_table_of_events() -> None:
    known = {(each.kind, each.code) for each in EVENT_CODES}
    assert {(EventKind.CONFIG, code) for code in steering._CODES.values()} <= known
    assert {(EventKind.COMMAND, code) for code in steering._ENDS.values()} <= known
    assert set(steering._CODES) == set(SettingState)
    assert set(steering._ENDS) == {*CommandOutcome, "silent"}
