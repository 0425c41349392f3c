"""Viewer: somebody who has logged in to a dashboard and looks at its pages, as a browser does."""

import re
import secrets
import urllib.parse
import urllib.request
from http.cookiejar import CookieJar
from typing import Final

from fleet_admin.dashboard.accounts.roles import Role
from fleet_admin.dashboard.services import Services
from fleet_admin.steering import Actor
from schemas.errors import FleetError

__all__ = ["Viewer"]

_CSRF: Final = re.compile(r'name="csrf" value="([0-9a-f]+)"')
_PASSWORD: Final = "of a benchmark alone"  # noqa: S105 - of a database that ends with it


class Viewer:
    """A browser that is logged in.

    Args:
        address: Where the dashboard is, as a URL.
        services: Of its database, for an account.
    """

    def __init__(self, address: str, services: Services) -> None:
        self._address = address.rstrip("/")
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        account = f"viewer-{secrets.token_hex(4)}"  # a database that is kept may have that of an earlier run
        services.accounts.add(account, role=Role.VIEWER, password=_PASSWORD, actor=Actor("bench"))
        found = _CSRF.search(self.look("/login"))
        if found is None:
            raise FleetError("The dashboard has no form to log in.")
        form = {"csrf": found[1], "account": account, "password": _PASSWORD, "next": ""}
        request = urllib.request.Request(  # noqa: S310 - the dashboard's own address
            f"{self._address}/login", urllib.parse.urlencode(form).encode(), {"Origin": self._address}
        )
        with self._opener.open(request) as response:
            response.read()

    def look(self, path: str) -> str:
        """Load a page.

        Raises:
            URLError: The dashboard does not answer, or with an error.
        """
        with self._opener.open(f"{self._address}{path}") as response:
            text: str = response.read().decode()
        return text
