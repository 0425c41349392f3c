"""`fleet admin user|key …`: who may use the dashboard, and the keys of programs."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fleet_admin.dashboard.settings import AccountRole
from fleet_cli.errors import CommandError
from fleet_cli.options import DEFAULT_DB, Acting, AsJson, Database, actor_of, needs_extra
from fleet_cli.tables import Column, print_table
from fleet_common.validation import read_duration

if TYPE_CHECKING:
    from fleet_admin.dashboard.accounts import Account, AccountKey, Accounts, ApiKeys

_PasswordFile = Annotated[
    Path | None, typer.Option(help="File whose first line is the password; by default it is asked for on the terminal.")
]
_Name = Annotated[str, typer.Argument(metavar="NAME")]

_users = typer.Typer(no_args_is_help=True)
_keys = typer.Typer(no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(_users, name="user", help="Accounts of the dashboard.")
    app.add_typer(_keys, name="key", help="API keys of the dashboard.")


@_users.command("add")
def add_user(
    name: _Name,
    role: Annotated[AccountRole, typer.Option(help="viewer can read, operator can also act.")] = AccountRole.VIEWER,
    password_file: _PasswordFile = None,
    no_password: Annotated[
        bool, typer.Option("--no-password", help="Create no password: the account uses a proxy's header or API keys.")
    ] = False,
    acting: Acting = None,
    db: Database = DEFAULT_DB,
) -> None:
    """Add an account."""
    accounts = _accounts(db)
    accounts.add(name, role=role, password=None if no_password else _password(password_file), actor=actor_of(acting))
    typer.echo(f"The account {name} may {'look and act' if role is AccountRole.OPERATOR else 'look'}.")


@_users.command("list")
def list_users(db: Database = DEFAULT_DB, as_json: AsJson = False) -> None:
    """List the accounts."""
    found = _accounts(db).list()
    columns: list[Column[Account]] = [
        Column("account", lambda each: each.name),
        Column("role", lambda each: each.role.value),
        Column("password", lambda each: each.has_password),
        Column("made", lambda each: each.created_at, "moment"),
        Column("changed", lambda each: each.changed_at, "moment"),
    ]
    empty = "Nobody can log in: fleet admin user add NAME --role operator adds an account."
    print_table("Accounts", columns, found, as_json=as_json, empty=empty)


@_users.command("remove")
def remove_user(name: _Name, acting: Acting = None, db: Database = DEFAULT_DB) -> None:
    """Remove an account, its keys and its logins."""
    _accounts(db).remove(name, actor=actor_of(acting))
    typer.echo(f"The account {name} is removed; its logins and keys are invalid.")


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


@_keys.command("add")
def add_key(
    name: _Name,
    account: Annotated[str, typer.Option(help="Account of the key.")],
    role: Annotated[
        AccountRole, typer.Option(help="Role of the key; at most the account's role.")
    ] = AccountRole.VIEWER,
    lasts: Annotated[str | None, typer.Option(help="Lifetime: 30d, 365d; by default no limit.")] = None,
    acting: Acting = None,
    db: Database = DEFAULT_DB,
) -> None:
    """Create an API key and print it; it is shown only once."""
    try:
        duration = None if lasts is None else read_duration(lasts)
    except (ValueError, OverflowError) as error:
        raise CommandError(f"--lasts: {error}") from error
    typer.echo(_api_keys(db).add(name, account=account, role=role, actor=actor_of(acting), lasts=duration))


@_keys.command("list")
def list_keys(db: Database = DEFAULT_DB, as_json: AsJson = False) -> None:
    """List the API keys by the beginning of their fingerprint."""
    found = _api_keys(db).list()
    columns: list[Column[AccountKey]] = [
        Column("id", lambda each: each.id),
        Column("name", lambda each: each.name),
        Column("account", lambda each: each.account),
        Column("role", lambda each: each.role.value),
        Column("made", lambda each: each.created_at, "moment"),
        Column("until", lambda each: each.expires_at, "moment"),
        Column("last used", lambda each: each.used_at, "moment"),
    ]
    empty = "There are no keys: fleet admin key add NAME --account ACCOUNT makes one."
    print_table("API keys", columns, found, as_json=as_json, empty=empty)


@_keys.command("remove")
def remove_key(
    key_id: Annotated[str, typer.Argument(metavar="ID")], acting: Acting = None, db: Database = DEFAULT_DB
) -> None:
    """Remove an API key."""
    removed = _api_keys(db).remove(key_id, actor=actor_of(acting))
    typer.echo(f"The key {removed.name} of {removed.account} is removed.")


def _accounts(db: str) -> "Accounts":
    with needs_extra("dashboard"):
        from fleet_admin.dashboard.accounts import AccountDatabase, Accounts

    return Accounts(AccountDatabase(db))


def _api_keys(db: str) -> "ApiKeys":
    with needs_extra("dashboard"):
        from fleet_admin.dashboard.accounts import AccountDatabase, ApiKeys

    return ApiKeys(AccountDatabase(db))


def _password(file: Path | None) -> str:
    if file is None:
        if not sys.stdin.isatty():
            raise CommandError("There is no terminal to ask for the password on; give a file with --password-file.")
        return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True))
    try:
        return file.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeError) as error:
        raise CommandError(f"The password cannot be read from {file}: {error}.") from error
