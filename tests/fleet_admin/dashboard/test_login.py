import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Literal

import pytest
from argon2 import PasswordHasher
from starlette.testclient import TestClient

from fleet_admin.dashboard.accounts import Attempts, Passwords
from fleet_admin.dashboard.app import PAGES, create_app
from fleet_admin.dashboard.errors import AccountError
from fleet_admin.dashboard.pages.account import own_path
from fleet_admin.dashboard.services import Services
from fleet_admin.dashboard.settings import AccountRole
from fleet_edge.session_log.filters import Filter
from tests.fleet_admin.dashboard.conftest import ACTOR, BASE, PASSWORD, Browser, Clock
from tests.support.waiting import PATIENCE_S

SHOWN = [page.path for page in PAGES if page.method == "GET" and "{" not in page.path and page.path != "/login"]


@pytest.mark.parametrize("path", [*SHOWN, "/devices/gateway-1", "/live", "/nothing-here"])
def test_without_a_login_there_is_no_data(stranger: Browser, path: str) -> None:
    answer = stranger.get(path)
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/login?next=%2F")
    assert answer.text == ""


def test_without_a_login_nothing_can_be_sent(stranger: Browser) -> None:
    for page in PAGES:
        if page.method == "POST" and page.path != "/login":
            answer = stranger.client.post(page.path, data={"csrf": "x"}, headers={"origin": BASE})
            assert answer.status_code == 401, page.path


@pytest.mark.parametrize("path", SHOWN)
def test_a_viewer_sees_every_page(viewer: Browser, path: str) -> None:
    assert viewer.get(path).status_code == 200


def test_a_login_leads_to_where_one_wanted_to_go(stranger: Browser) -> None:
    there = stranger.get("/devices?filter=state%3Donline").headers["location"]
    assert stranger.get(there).status_code == 200
    answer = stranger.log_in("victor", next_path="/devices?filter=state%3Donline")
    assert answer.headers["location"] == "/devices?filter=state%3Donline"


@pytest.mark.parametrize(
    "text",
    [
        "//evil.example",
        "/\\evil.example",
        "https://evil.example",
        "javascript:alert(1)",
        "",
        "/a\\b",
        "/x\r\nSet-Cookie: a=b",
    ],
)
def test_a_login_leads_nowhere_else(stranger: Browser, text: str) -> None:
    assert own_path(text) == "/"
    assert stranger.log_in("victor", next_path=text).headers["location"] == "/"


def test_a_wrong_password_and_an_unknown_name_are_told_alike(stranger: Browser) -> None:
    wrong, unknown = stranger.log_in("victor", "not this one, no"), stranger.log_in("nobody", PASSWORD)
    assert wrong.status_code == unknown.status_code == 403
    assert "or the password is wrong" in wrong.text
    assert "or the password is wrong" in unknown.text
    assert stranger.get("/").status_code == 303


def test_the_cookie_is_kept_from_scripts_and_is_new_with_each_login(stranger: Browser) -> None:
    before = stranger.get("/login").headers["set-cookie"]
    answer = stranger.log_in("victor")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert cookie.partition(";")[0] != before.partition(";")[0]


def test_a_cookie_set_by_an_attacker_is_worthless(browsers: Callable[[], Browser], stranger: Browser) -> None:
    fixed = "attackers-own-cookie"
    stranger.client.cookies.set("fleet", fixed, domain="127.0.0.1")
    stranger.log_in("olga")
    attacker = browsers()
    attacker.client.cookies.set("fleet", fixed, domain="127.0.0.1")
    assert attacker.get("/").status_code == 303


def test_a_logout_ends_the_login_in_the_database_too(operator: Browser, browsers: Callable[[], Browser]) -> None:
    stolen = operator.client.cookies["fleet"]
    assert operator.post("/logout").status_code == 303
    thief = browsers()
    thief.client.cookies.set("fleet", stolen, domain="127.0.0.1")
    assert thief.get("/").status_code == 303


def test_a_login_ends_with_silence_and_in_any_case(viewer: Browser, clock: Clock) -> None:
    for _ in range(27):
        clock.now += timedelta(hours=6)
        assert viewer.get("/account").status_code == 200
    clock.now += timedelta(hours=7)
    assert viewer.get("/account").status_code == 303


def browser_at(services: Services, address: str) -> Browser:
    app = create_app(services)
    return Browser(TestClient(app, base_url=BASE, follow_redirects=False, client=(address, 1)))


def test_guesses_at_one_account_from_many_addresses_are_limited_and_its_owner_is_not(
    services: Services, clock: Clock
) -> None:
    home, away = "198.51.100.7", "192.0.2.77"
    assert browser_at(services, home).log_in("olga").status_code == 303
    taken = sum(services.attempts.take(f"2001:db8:{number:x}::1", "olga") == 0.0 for number in range(10_000))
    assert taken == 300
    refused = browser_at(services, away).log_in("olga")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
    assert browser_at(services, home).log_in("olga").status_code == 303
    assert browser_at(services, away).log_in("victor").status_code == 303
    clock.monotonic += 2
    assert browser_at(services, away).log_in("olga").status_code == 303, "it is known from now on"
    restarted = Attempts(lambda: clock.monotonic, usual=services.logins.addresses())
    for number in range(1_000):
        restarted.take(f"2001:db8:{number:x}::1", "olga")
    assert restarted.take("203.0.113.9", "olga") == 2.0
    assert restarted.take(home, "olga") == 0.0


def test_guesses_are_limited_by_address_and_lock_out_nobody_elsewhere(services: Services, clock: Clock) -> None:
    def browser(address: str) -> Browser:
        return browser_at(services, address)

    guesser = browser("203.0.113.9")
    outcomes = [guesser.log_in("olga", f"guess number {number}").status_code for number in range(32)]
    assert outcomes == [403] * 30 + [429] * 2
    refused = guesser.log_in("olga")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
    assert browser("198.51.100.7").log_in("olga").status_code == 303
    clock.monotonic += 2
    assert guesser.log_in("olga").status_code == 303


def test_wrong_guesses_do_not_keep_out_the_right_password_of_the_same_address(browsers: Callable[[], Browser]) -> None:
    browser = browsers()
    for number in range(20):
        assert browser.log_in("olga" if number % 2 else f"name-{number}", "a wrong password").status_code == 403
    assert browser.log_in("olga").status_code == 303


@pytest.mark.parametrize(("address", "most"), [("10.0.0.1", 30), ("2001:db8::{}", 30)])
def test_invented_addresses_neither_renew_a_bucket_nor_fill_the_memory(
    services: Services, address: str, most: int
) -> None:
    attempts = services.attempts
    assert sum(attempts.take(address.format(each % 250)) == 0.0 for each in range(1000)) == most
    for number in range(10_001):
        attempts.take(f"2001:db8:{number % 65_521:x}:{number // 7:x}::1", f"name-{number}")
    assert attempts.take(address.format(0)) > 0.0
    assert len(attempts._buckets) <= 2 * 4096


def test_what_has_succeeded_is_not_counted(services: Services) -> None:
    for _ in range(500):
        assert services.attempts.take("10.0.0.1") == 0.0
        services.attempts.succeeded("10.0.0.1")


def test_few_passwords_are_checked_at_once() -> None:
    """Each check takes 64 MiB."""
    most = 0
    running = 0
    counting = threading.Lock()

    class Slow(PasswordHasher):
        def verify(self, _hash: str | bytes, _password: str | bytes) -> Literal[True]:
            nonlocal most, running
            with counting:
                running += 1
                most = max(most, running)
            together.wait(PATIENCE_S)
            with counting:
                running -= 1
            return True

    together = threading.Barrier(2)
    passwords = Passwords(Slow(time_cost=1, memory_cost=8, parallelism=1))
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: passwords.check("x", "y"), range(16)))
    assert most == 2


def test_a_new_password_ends_logins(operator: Browser, browsers: Callable[[], Browser], services: Services) -> None:
    elsewhere = browsers()
    elsewhere.log_in("olga")
    other = "another good password"
    answer = operator.post("/account/password", old=PASSWORD, new=other, again=other)
    assert answer.status_code == 303
    assert operator.get("/account").status_code == 200
    assert elsewhere.get("/account").status_code == 303
    assert services.accounts.check("olga", other)


def test_a_removed_account_and_a_lesser_role_hold_at_once(operator: Browser, services: Services) -> None:
    services.accounts.set_role("olga", AccountRole.VIEWER, actor=ACTOR)
    assert operator.get("/").status_code == 303
    operator.log_in("olga")
    assert operator.post("/devices/act", act="resume", device="gateway-1").status_code == 403
    services.accounts.remove("olga", actor=ACTOR)
    assert operator.get("/").status_code == 303


@pytest.mark.parametrize("password", ["short", "x" * 40, "vera-is-my-name", "p" * 300])
def test_a_password_that_anybody_guesses_is_refused(services: Services, password: str) -> None:
    with pytest.raises(AccountError):
        services.accounts.add("vera-is-my-name", role=AccountRole.VIEWER, password=password, actor=ACTOR)


def test_what_is_done_with_accounts_is_in_the_audit_log(operator: Browser, services: Services) -> None:
    other = "another good password"
    operator.post("/account/password", old=PASSWORD, new=other, again=other)
    entries = [
        (each.who, each.action, each.subject)
        for each in services.steering.log.audit(where=[Filter("who", "=", "olga")])
    ]
    assert entries == [("olga", "account password", "olga")]
    assert "account add" in {each.action for each in services.steering.log.audit(where=[Filter("who", "=", "tests")])}


def test_neither_a_password_nor_a_cookie_is_ever_written_down(operator: Browser, url: str) -> None:
    content = b"".join(each.read_bytes() for each in Path(url.removeprefix("sqlite:///")).parent.iterdir())
    assert PASSWORD.encode() not in content
    assert operator.client.cookies["fleet"].encode() not in content
