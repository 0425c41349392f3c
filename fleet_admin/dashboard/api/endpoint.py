"""Endpoint of the API: its path, what it takes, what it answers, who may."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from fleet_admin.dashboard.accounts.roles import Role
from fleet_admin.dashboard.api.parameters import NoParameters
from fleet_admin.dashboard.visit import Visit


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint.

    Attributes:
        path: Below `/api/v1`, as Starlette has it.
        summary: One sentence.
        answer: Gets the visit and the parameters; called on a thread, may block.
        result: The type of what it returns.
        parameters: In the query of a GET, in the JSON body of all else.
        method: `GET`, `POST` or `DELETE`.
        role: Who may.
    """

    path: str
    summary: str
    answer: Callable[[Visit, Any], object]
    result: Any
    parameters: type[BaseModel] = NoParameters
    method: str = "GET"
    role: Role = Role.VIEWER

    @property
    def path_parameters(self) -> list[str]:
        return [part[1:-1] for part in self.path.split("/") if part.startswith("{")]
