"""Description as a TOML file: what an operator writes, and what lies beside the rendered files."""

import json
import tomllib
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from broker_config.broker import Broker, HeadOffice, Tls
from broker_config.errors import BrokerFilesError
from fleet_common.validation import field_at, plain_sentence

_NOTHING: Final = frozenset({"host", "janitor"})
_SECTIONS: Final[dict[str, type[BaseModel]]] = {"tls": Tls, "head_office": HeadOffice}


def render_description(broker: Broker) -> str:
    """Return a TOML file from which the same description is read again."""
    values = broker.model_dump(mode="json", exclude_none=True)
    lines = ["# The description of the broker that the files beside it were rendered from. Generated."]
    if broker.host is None:
        lines.append('host = ""')  # TOML knows no nothing: all addresses
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines += [f"{key} = {json.dumps(value)}" for key, value in values.items() if key not in tables]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def read_description(path: Path, *, production: bool = True) -> Broker:
    """Read a description.

    Args:
        path: The TOML file.
        production: Whether what it leaves out has production's defaults rather than loopback's.

    Raises:
        BrokerFilesError: It cannot be read, or describes no broker.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BrokerFilesError(f"The description {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BrokerFilesError(f"The description {path} is not valid TOML: {error}.") from error
    return describe(values, production=production, origin=f" in {path}")


def describe(values: dict[str, Any], *, production: bool, origin: str = "") -> Broker:
    """Make a description of values.

    Args:
        values: As in the TOML file; an empty `host` stands for all addresses, an empty `janitor` for none.
        production: Whether what is left out has production's defaults.
        origin: Where they come from, for a sentence.

    Raises:
        BrokerFilesError: They describe no broker; a line for each that is wrong.
    """
    # TOML knows no nothing.
    values = {key: None if value == "" and key in _NOTHING else value for key, value in values.items()}
    try:
        return Broker.production(**values) if production else Broker.model_validate(values)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)
        raise BrokerFilesError("\n".join(dict.fromkeys(_line(each, origin) for each in wrong))) from error


def _line(error: ErrorDetails, origin: str) -> str:
    where = field_at(Broker, error)
    what = plain_sentence(error)
    if error["type"] == "extra_forbidden":
        beside = _SECTIONS.get(str(where[0]), Broker) if len(where) > 1 else Broker
        what = f"there is no setting of that name; known are {', '.join(sorted(beside.model_fields))}"
    subject = f"The setting {'.'.join(map(str, where))!r}{origin}" if where else f"The description{origin}"
    return f"{subject} cannot be used: {what}."
