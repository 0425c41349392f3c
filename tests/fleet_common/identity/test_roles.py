import pytest

from fleet_common.identity.certificates import IdentityRole, check_identity_name
from fleet_common.identity.files import NameRefused
from schemas.errors import InvalidName


@pytest.mark.parametrize("name", ["edge", "edge-1", "Edge-1", "EDGE.north", "monitor", "monitor_2", "broker"])
def test_a_device_cannot_have_a_name_that_says_another_role(name: str) -> None:
    with pytest.raises(NameRefused):
        check_identity_name(name, IdentityRole.DEVICE)


@pytest.mark.parametrize("name", ["edgeware", "sensor-edge", "brokerage", "a"])
def test_a_name_that_only_contains_a_role_word_is_allowed(name: str) -> None:
    assert check_identity_name(name, IdentityRole.DEVICE) == name


@pytest.mark.parametrize(
    ("name", "role"), [("edge-1", "edge"), ("monitor", "monitor"), ("broker", "broker"), ("n", "edge")]
)
def test_the_role_itself_may_use_its_word(name: str, role: str) -> None:
    assert check_identity_name(name, IdentityRole(role)) == name


@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "$SYS", "_edge", "a b", "x" * 64, "a\n", "ä", "-a", "a\x00b"])
def test_what_is_no_name_at_all_is_refused(name: str) -> None:
    with pytest.raises(InvalidName):
        check_identity_name(name, IdentityRole.DEVICE)
