import os

import pytest

from tests.system.printed_commands import DOCUMENTS, check, commands, machines, run_apart


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_command_line_takes_each_printed_command(document: str) -> None:
    assert [f"{each.where}: {wrong}" for each in commands(document) if (wrong := check(each))] == []


@pytest.mark.root
@pytest.mark.broker
@pytest.mark.models
@pytest.mark.exhaustive
@pytest.mark.timeout(2400)  # several documents
@pytest.mark.xdist_group("printed commands")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for namespaces and mounts")
@pytest.mark.parametrize("documents", machines(), ids=" ".join)
def test_each_printed_command_does_what_it_is_printed_for(documents: tuple[str, ...]) -> None:
    assert run_apart(documents) == []
