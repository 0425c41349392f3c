import itertools
import re
import shlex
from pathlib import Path

import pytest
import yaml

from broker_config.broker import Broker
from fleet_edge.settings import EdgeSettings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / name for name in ("operations.md", "example-fleet.md")]


def commands() -> list[str]:
    text = "".join(page.read_text() for page in PAGES)
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [line for line in (re.sub(r"(^|\s)#.*$", "", line).strip() for line in lines) if line]
    return list(dict.fromkeys(found))


PLAYS = [line for line in commands() if line.startswith("ansible-playbook")]


def test_the_pages_have_playbook_commands() -> None:
    assert len(PLAYS) > 8


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


EXAMPLE = yaml.safe_load((ROOT / "ansible/inventories/example/group_vars/all/fleet.yml").read_text())


def test_the_examples_variables_are_those_that_the_roles_take() -> None:
    folder = ROOT / "ansible"
    roles = "".join(path.read_text() for path in folder.rglob("*.yml") if "inventories" not in path.parts)
    assert [name for name in EXAMPLE if not re.search(rf"\b{name}\b", roles)] == []


def test_the_examples_settings_are_the_programs() -> None:
    assert EdgeSettings(**EXAMPLE["edge_settings"], kv_bytes=EXAMPLE["edge_kv_bytes"]).metrics.listen
    assert set(EXAMPLE["broker_settings"]) <= set(Broker.model_fields)
