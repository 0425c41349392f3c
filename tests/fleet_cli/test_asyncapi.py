from pathlib import Path

from typer.testing import CliRunner

from fleet_cli.asyncapi import app, render_yaml
from schemas.asyncapi import document

DOCUMENT = Path(__file__).parents[2] / "docs" / "asyncapi.yaml"


def test_the_document_in_docs_is_current() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == render_yaml(document()), (
        "run: python -m fleet_cli.asyncapi --out docs/asyncapi.yaml"
    )


def test_the_command_writes_it(tmp_path: Path) -> None:
    out = tmp_path / "asyncapi.yaml"
    assert CliRunner().invoke(app, ["--out", str(out)]).exit_code == 0
    assert out.read_text() == CliRunner().invoke(app, []).output
