from pathlib import Path

import pytest

from broker_config.broker import BrokerFailed
from broker_config.mosquitto import MosquittoVersion, installed_version
from broker_config.processes import find_mosquitto
from tests.support.brokers import require_mosquitto


def program(folder: Path, says: str) -> Path:
    path = folder / "mosquitto"
    path.write_text(f"#!/bin/sh\necho '{says}'\nexit 3\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("mosquitto version 2.0.21", MosquittoVersion.V2_0),
        ("mosquitto version 2.1.2", MosquittoVersion.V2_1),
        ("mosquitto version 2.3.0", MosquittoVersion.V2_1),
    ],
)
def test_the_version_is_read_from_the_programs_own_words(says: str, version: MosquittoVersion, tmp_path: Path) -> None:
    assert installed_version(program(tmp_path, says)) is version


@pytest.mark.parametrize(
    ("says", "sentence"),
    [("mosquitto version 1.6.9", "2.0"), ("mosquitto version 3.0.0", "use"), ("hello", "is it")],
)
def test_a_program_that_is_not_mosquitto_is_refused_in_one_sentence(says: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(BrokerFailed, match=sentence):
        installed_version(program(tmp_path, says))


def test_a_program_that_cannot_be_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BrokerFailed, match="run"):
        installed_version(tmp_path / "none")


@pytest.mark.broker
def test_the_installed_mosquitto_has_a_known_version() -> None:
    require_mosquitto()
    assert installed_version(find_mosquitto()) in MosquittoVersion
