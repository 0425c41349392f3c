import shlex
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from fleet_common import extras


def target(command: str) -> str:
    words = shlex.split(command)
    assert words[:4] == [sys.executable, "-m", "pip", "install"]
    return words[4]


def recorded(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    class Recorded(Distribution):
        def read_text(self, filename: str) -> str | None:
            assert filename == "direct_url.json"
            return text

        def locate_file(self, path: object) -> Path:
            raise AssertionError(path)

    monkeypatch.setattr(extras, "distribution", lambda _name: Recorded())


def test_in_a_checkout_the_extra_comes_from_it() -> None:
    root = Path(__file__).resolve().parents[2]
    assert target(extras.install_command("edge")) == f"{root}[edge]"


def test_elsewhere_it_comes_from_where_pip_took_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "a folder" / "dssd_fleet-1-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    recorded(monkeypatch, f'{{"url": "{wheel.as_uri()}", "archive_info": {{}}}}')
    assert target(extras.install_command("edge", checkout=tmp_path)) == f"{wheel}[edge]"


@pytest.mark.parametrize("text", [None, "{}", "no JSON", '{"url": "file:///gone"}', '{"url": "https://host/x.whl"}'])
def test_no_name_is_taken_to_a_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    recorded(monkeypatch, text)
    assert target(extras.install_command("edge", checkout=tmp_path)) == ".[edge]"
