import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ANSIBLE = ROOT / "ansible"
PLAYBOOKS = sorted((ANSIBLE / "playbooks").glob("*.yml"))
ROLES = sorted(path for path in (ANSIBLE / "roles").iterdir() if path.is_dir())
TASK_FILES = sorted([*ANSIBLE.glob("roles/*/tasks/*.yml"), *ANSIBLE.glob("playbooks/tasks/*.yml")])
BIN = Path(sys.executable).parent


def run(*command: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "ANSIBLE_HOME": str(tmp_path),
        "ANSIBLE_CONFIG": str(ANSIBLE / "ansible.cfg"),
        "NO_COLOR": "1",
    }
    options = {"cwd": ANSIBLE, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, check=False, **options)


def test_all_playbooks_are_there() -> None:
    names = {path.stem for path in PLAYBOOKS}
    changes = {"site", "rollout", "rollback", "rotate_certs", "revoke", "decommission"}
    assert names == changes | {"status", "backup", "restore_log", "controller"}


def test_every_playbook_is_parsed_with_the_example_inventory(tmp_path: Path) -> None:
    done = run(str(BIN / "ansible-playbook"), "--syntax-check", *map(str, PLAYBOOKS), tmp_path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.exhaustive
def test_the_linter_has_nothing_to_say_in_its_strictest_profile(tmp_path: Path) -> None:
    done = run(str(BIN / "ansible-lint"), "--offline", "--format=pep8", "-q", tmp_path=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)
def test_a_role_says_what_it_takes_and_takes_nothing_else(role: Path) -> None:
    specs = yaml.safe_load((role / "meta" / "argument_specs.yml").read_text())["argument_specs"]
    options = set(specs["main"]["options"])
    defaults = set(yaml.safe_load((role / "defaults" / "main.yml").read_text()) or {})
    assert defaults <= options
    required = {name for name, option in specs["main"]["options"].items() if option.get("required")}
    assert required - defaults <= {"common_extra"}


@pytest.mark.parametrize("path", [*TASK_FILES, *PLAYBOOKS], ids=lambda path: str(path.relative_to(ANSIBLE)))
def test_only_built_in_modules_are_used(path: Path) -> None:
    text = path.read_text()
    used = set(re.findall(r"^\s+([a-z_]+\.[a-z_]+\.[a-z_]+):", text, flags=re.MULTILINE))
    assert {name.rpartition(".")[0] for name in used} <= {"ansible.builtin"}


@pytest.mark.parametrize("path", [*TASK_FILES, *PLAYBOOKS], ids=lambda path: str(path.relative_to(ANSIBLE)))
def test_a_task_with_a_key_or_a_passphrase_does_not_show_it(path: Path) -> None:
    text = path.read_text()
    for task in re.split(r"^\s*- name: ", text, flags=re.MULTILINE)[1:]:
        if re.search(r"\.key\b", task) and "ansible.builtin.copy" in task:
            assert "no_log: true" in task, task
        # Pass a passphrase through the environment: every user of a machine can list arguments.
        if "passphrase" in task and "argv:" in task:
            arguments = task[task.index("argv:") : task.find("environment:") if "environment:" in task else None]
            assert "passphrase" not in arguments, task
