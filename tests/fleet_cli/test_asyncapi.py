from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fleet_cli.asyncapi import app, render_yaml
from schemas.asyncapi import document


@pytest.mark.parametrize(
    "value",
    [{"a": {"b": [1, {"c": None}, [], {}, "x: y #"]}, "d-e_f": True, "$ref": "#/a", "é": "ü\n", "g": 0.5}, document()],
)
def test_the_yaml_is_read_as_what_was_written(value: dict[str, object]) -> None:
    assert yaml.safe_load(render_yaml(value)) == value


def test_the_command_writes_it(tmp_path: Path) -> None:
    out = tmp_path / "asyncapi.yaml"
    assert CliRunner().invoke(app, ["--out", str(out)]).exit_code == 0
    assert out.read_text() == CliRunner().invoke(app, []).output
