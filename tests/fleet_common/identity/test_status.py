from fleet_common.identity.authority import Authority
from fleet_common.identity.certificates import IdentityRole
from fleet_common.identity.index import CertificateState, standing
from tests.fleet_common.identity.conftest import FrozenClock, request_for


def states(authority: Authority, *, history: bool = False) -> list[tuple[str, CertificateState | None, int | None]]:
    found = standing(authority.entries(), now=authority.clock(), history=history)
    return [(line.name, line.state, line.days_left) for line in found]


def test_a_certificate_goes_from_valid_to_due_to_ended(authority: Authority, clock: FrozenClock) -> None:
    authority.sign(request_for("sensor-1"), name="sensor-1", role=IdentityRole.DEVICE)
    assert states(authority) == [("sensor-1", CertificateState.VALID, 90)]
    clock.forward(days=60)
    assert states(authority) == [("sensor-1", CertificateState.DUE, 30)]
    clock.forward(days=30)
    assert states(authority) == [("sensor-1", CertificateState.ENDED, 0)]
    clock.forward(hours=1)
    assert states(authority) == [("sensor-1", CertificateState.ENDED, -1)]


def test_what_the_register_calls_due_can_be_renewed(authority: Authority, clock: FrozenClock) -> None:
    authority.sign(request_for("sensor-1"), name="sensor-1", role=IdentityRole.DEVICE)
    for _ in range(100):
        clock.forward(days=1, seconds=7)
        (line,) = standing(authority.entries(), now=clock.now)
        assert (line.state in {CertificateState.DUE, CertificateState.ENDED}) == (authority.due() == ("sensor-1",))


def test_the_newest_certificate_represents_its_name(authority: Authority) -> None:
    authority.sign(request_for("sensor-1"), name="sensor-1", role=IdentityRole.DEVICE)
    authority.clock.forward(days=70)  # type: ignore[attr-defined]
    authority.renew("sensor-1")
    assert states(authority) == [("sensor-1", CertificateState.VALID, 90)]
    assert states(authority, history=True) == [
        ("sensor-1", CertificateState.REPLACED, 20),
        ("sensor-1", CertificateState.VALID, 90),
    ]


def test_a_revoked_one_stays_revoked(authority: Authority, clock: FrozenClock) -> None:
    authority.sign(request_for("sensor-1"), name="sensor-1", role=IdentityRole.DEVICE)
    authority.revoke(["sensor-1"])
    clock.forward(days=100)
    assert [state for _, state, _ in states(authority)] == [CertificateState.REVOKED]
