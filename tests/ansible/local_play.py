"""Plays that Ansible really runs, on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def play(
    folder: Path, *tasks: dict[str, Any], check: bool = False, inventory: dict[str, Any] | None = None, **given: Any
) -> tuple[bool, str]:
    """Run tasks with variables; return whether they passed, and what Ansible said, in one line.

    With `check` they change nothing. An `inventory` has several hosts by name, all of them this machine.
    """
    hosts = "localhost,"
    if inventory is not None:
        hosts = str(folder / "inventory.json")
        (folder / "inventory.json").write_text(json.dumps(inventory))
    book = [{"hosts": "all", "connection": "local", "gather_facts": False, "tasks": tasks}]
    (folder / "play.yml").write_text(json.dumps(book))
    program = Path(sys.executable).parent / "ansible-playbook"
    variables = json.dumps({"ansible_python_interpreter": sys.executable, **given})
    environment = {
        "ANSIBLE_ROLES_PATH": str(ROOT / "ansible" / "roles"),
        "ANSIBLE_HOME": str(folder / "home"),
        "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
        "ANSIBLE_NOCOLOR": "1",
    }
    done = subprocess.run(
        [program, "-i", hosts, folder / "play.yml", "-e", variables, *(["--check"] if check else [])],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode == 0, " ".join((done.stdout + done.stderr).split())


def of_common(tasks: str) -> dict[str, Any]:
    return {"ansible.builtin.include_role": {"name": "common", "tasks_from": tasks}}
