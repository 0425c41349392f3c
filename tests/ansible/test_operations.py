"""What `docs/operations.md` tells an operator to type exists: each command with its options, each playbook, each script."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer.main

from fleet_cli.commands import COMMANDS, add_commands
from fleet_cli.main import app

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "operations.md"


def commands() -> list[str]:
    """Return the commands of all indented or fenced blocks, with continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*$", "", line).strip() for line in lines) if line]


FLEET = [line for line in commands() if re.match(r"(sudo (-u fleet )?)?(\S*/)?fleet ", line)]
PLAYS = [line for line in commands() if line.startswith("ansible-playbook")]


def test_the_page_has_commands_of_both_kinds() -> None:
    assert len(FLEET) > 5
    assert len(PLAYS) > 8


@pytest.mark.parametrize("line", commands())
def test_a_command_is_one_that_we_know(line: str) -> None:
    known = {"ansible-playbook", "ansible-vault", "cp", "export", "journalctl", "systemctl", "sudo", "fleet", "pip", "cd"}
    word = shlex.split(line)[0]
    assert word in known or (ROOT / word).exists() or word.endswith("/fleet"), word


@pytest.mark.parametrize("line", FLEET)
def test_a_fleet_command_has_its_options(line: str) -> None:
    words = shlex.split(line)
    words = words[next(i for i, word in enumerate(words) if word.endswith("fleet") and word != "fleet" or word == "fleet") :]
    if words[1] == "fleet":  # sudo -u fleet fleet …
        words = words[1:]
    arguments = [word for word in words[1:] if word != "|"]
    if arguments[0] not in COMMANDS:
        assert arguments == ["--version"]
        return
    fresh = typer.Typer()
    fresh.callback()(lambda: None)
    add_commands(fresh, arguments)
    group = typer.main.get_command(fresh)
    context = click.Context(group)
    command: click.Command = group
    while isinstance(command, click.Group):
        name, *arguments = arguments
        found = command.get_command(context, name)
        assert found is not None, f"{name} in {line}"
        command = found
    # Values are not looked at, only that each option exists and that the arguments are as many as they may be.
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.partition("=")[0] for word in arguments if word.startswith("--")} <= options, line


@pytest.mark.parametrize("line", PLAYS)
def test_a_playbook_is_there_and_knows_its_variables(line: str) -> None:
    words = shlex.split(line)
    playbook = next(word for word in words if word.endswith(".yml") and "inventor" not in word)
    path = ROOT / "ansible" / playbook
    assert path.exists()
    text = "".join(file.read_text() for file in (ROOT / "ansible").rglob("*.yml"))
    for word, following in zip(words, words[1:], strict=False):
        if word == "-e":
            assert following.partition("=")[0] in text, following


def test_the_app_is_the_one_that_is_installed() -> None:
    assert isinstance(typer.main.get_command(app), click.Group)
