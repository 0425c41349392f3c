"""What the pages for operators tell them to type exists: commands with their options, playbooks, scripts, variables."""

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from broker_config.broker import Broker
from fleet_cli.commands import COMMANDS, add_commands
from fleet_edge.settings import EdgeSettings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / name for name in ("operations.md", "example-fleet.md")]


def commands() -> list[str]:
    """Return the commands of all indented or fenced blocks, with continued lines joined."""
    text = "".join(page.read_text() for page in PAGES)
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [line for line in (re.sub(r"(^|\s)#.*$", "", line).strip() for line in lines) if line]
    return list(dict.fromkeys(found))


FLEET = [line for line in commands() if re.match(r"(sudo (-u fleet )?)?(\S*/)?fleet ", line)]
PLAYS = [line for line in commands() if line.startswith("ansible-playbook")]


def test_the_page_has_commands_of_both_kinds() -> None:
    assert len(FLEET) > 5
    assert len(PLAYS) > 8


@pytest.mark.parametrize("line", commands())
def test_a_command_is_one_that_we_know(line: str) -> None:
    known = {
        "ansible-playbook",
        "ansible-vault",
        "apt",
        "createdb",
        "createuser",
        "git",
        "pg_restore",
        "python3",
        "sha256sum",
        "cp",
        "export",
        "journalctl",
        "systemctl",
        "sudo",
        "fleet",
        "pip",
        "cd",
    }
    word = shlex.split(line)[0]
    assert word in known or (ROOT / word).exists() or word.endswith(("/fleet", "/pip")), word


@pytest.mark.parametrize("line", FLEET)
def test_a_fleet_command_has_its_options(line: str) -> None:
    words = shlex.split(line)
    words = words[max(i for i, word in enumerate(words) if word.rpartition("/")[2] == "fleet") :]
    arguments = [word for word in words[1:] if word != "|"]
    if arguments[0] not in COMMANDS:
        assert arguments == ["--version"]
        return
    fresh = typer.Typer(add_completion=False)
    fresh.callback()(lambda: None)
    add_commands(fresh, arguments)
    command: Any = typer.main.get_command(fresh)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        assert name in command.commands, f"{name} in {line}"
        command = command.commands[name]
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
    for word, following in itertools.pairwise(words):
        if word == "-e":
            assert following.partition("=")[0] in text, following


def test_the_examples_variables_are_those_that_the_roles_take() -> None:
    [text] = re.findall(r"^```yaml\n(.*?)^```", PAGES[1].read_text(), flags=re.MULTILINE | re.DOTALL)
    given = set(yaml.safe_load(text))
    roles = "".join(path.read_text() for path in (ROOT / "ansible").rglob("*.yml"))
    assert given
    assert [name for name in given if not re.search(rf"\b{name}\b", roles)] == []


def test_the_examples_settings_are_the_programs() -> None:
    [text] = re.findall(r"^```yaml\n(.*?)^```", PAGES[1].read_text(), flags=re.MULTILINE | re.DOTALL)
    given = yaml.safe_load(text)
    assert EdgeSettings(**given["edge_settings"], kv_bytes=given["edge_kv_bytes"]).metrics.listen
    assert set(given["broker_settings"]) <= set(Broker.model_fields)
