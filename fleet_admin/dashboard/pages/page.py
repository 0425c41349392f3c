"""Page: a path, who may see it, and the function that answers."""

from collections.abc import Callable
from dataclasses import dataclass

from starlette.responses import Response

from fleet_admin.dashboard.accounts.roles import Role
from fleet_admin.dashboard.visit import Visit


@dataclass(frozen=True, slots=True)
class Page:
    """A page, or what a form of one is sent to.

    Attributes:
        path: As Starlette has it: `/devices/{name}`.
        title: In the menu and above the page.
        answer: Makes the answer; called on a thread, may block.
        menu: Whether it stands in the menu.
        method: `GET`, or `POST` for a form.
        role: Who may.
    """

    path: str
    title: str
    answer: Callable[[Visit], Response]
    menu: bool = False
    method: str = "GET"
    role: Role = Role.VIEWER


def action(path: str, answer: Callable[[Visit], Response], *, role: Role = Role.OPERATOR) -> Page:
    """Return what a form is sent to; for operators unless said otherwise."""
    return Page(path, "", answer, method="POST", role=role)
