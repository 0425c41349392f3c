"""`fleet admin user …`: who may use the dashboard."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fleet_admin.dashboard.settings import AccountRole
from fleet_admin.report import Report
from fleet_cli.admin.listing import Listing, with_listing
from fleet_cli.commands import CommandError
from fleet_cli.options import DEFAULT_DB, Acting, Database, actor_of, needs_extra
from fleet_cli.tables import Column

if TYPE_CHECKING:
    from fleet_admin.dashboard.accounts import Account, Accounts

_PasswordFile = Annotated[
    Path | None, typer.Option(help="File whose first line is the password; by default it is asked for on the terminal.")
]
_Name = Annotated[str, typer.Argument(metavar="NAME")]

_users = typer.Typer(no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(_users, name="user", help="Accounts of the dashboard.")


@_users.command("add")
def add_user(
    name: _Name,
    role: Annotated[AccountRole, typer.Option(help="viewer can read, operator can also act.")] = AccountRole.VIEWER,
    password_file: _PasswordFile = None,
    no_password: Annotated[
        bool, typer.Option("--no-password", help="Create no password: the account uses a proxy's header.")
    ] = False,
    acting: Acting = None,
    db: Database = DEFAULT_DB,
) -> None:
    """Add an account."""
    accounts = _accounts(db)
    accounts.add(name, role=role, password=None if no_password else _password(password_file), actor=actor_of(acting))
    typer.echo(f"The account {name} may {'look and act' if role is AccountRole.OPERATOR else 'look'}.")


@_users.command("list")
@with_listing()
def list_users(listing: Listing, db: Database = DEFAULT_DB) -> None:
    """List the accounts."""
    found = _accounts(db).list()
    columns: list[Column[Account]] = [
        Column("account", "name"),
        Column("role", "role.value"),
        Column("password", "has_password"),
        Column("made", "created_at", "moment"),
        Column("changed", "changed_at", "moment"),
    ]
    empty = "Nobody can log in: fleet admin user add NAME --role operator adds an account."
    listing.show(Report("accounts", columns, lambda **_: found, "account", empty=empty))


@_users.command("remove")
def remove_user(name: _Name, acting: Acting = None, db: Database = DEFAULT_DB) -> None:
    """Remove an account and its logins."""
    _accounts(db).remove(name, actor=actor_of(acting))
    typer.echo(f"The account {name} is removed; its logins are invalid.")


@_users.command("password")
def change_password(
    name: _Name, password_file: _PasswordFile = None, acting: Acting = None, db: Database = DEFAULT_DB
) -> None:
    """Change the password of an account; its browsers have to log in again."""
    _accounts(db).set_password(name, _password(password_file), actor=actor_of(acting))
    typer.echo(f"The password of the account {name} is changed.")


@_users.command("role")
def change_role(
    name: _Name, role: Annotated[AccountRole, typer.Argument()], acting: Acting = None, db: Database = DEFAULT_DB
) -> None:
    """Change the role of an account; its browsers have to log in again."""
    _accounts(db).set_role(name, role, actor=actor_of(acting))
    typer.echo(f"The account {name} may {'look and act' if role is AccountRole.OPERATOR else 'look'}.")


def _accounts(db: str) -> "Accounts":
    with needs_extra("dashboard"):
        from fleet_admin.dashboard.accounts import AccountDatabase, Accounts

    return Accounts(AccountDatabase(db))


def _password(file: Path | None) -> str:
    if file is None:
        if not sys.stdin.isatty():
            raise CommandError("There is no terminal to ask for the password on; give a file with --password-file.")
        return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True))
    try:
        return file.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeError) as error:
        raise CommandError(f"The password cannot be read from {file}: {error}.") from error
