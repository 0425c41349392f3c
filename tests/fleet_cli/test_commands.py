import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fleet_cli.commands import COMMANDS, program
from fleet_cli.main import command_line
from fleet_common.extras import install_command
from tests.support.command import Run, refused
from tests.support.family_models import FAMILIES, family_folder, family_gguf
from tests.support.without import Without

ROOT = Path(__file__).resolve().parents[2]


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in {package, "fleet_edge", "fleet_cli.demo"}]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Without(package), *sys.meta_path])
    command_line.cache_clear()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "smollm2-135m").mkdir(parents=True)
    for name in ("Q4_0", "target-Q8_0", "target-Q8_0-cost8"):
        (tmp_path / "smollm2-135m" / f"{name}.gguf").write_bytes(b"GGUF")
    return tmp_path


@pytest.mark.parametrize("command", ["edge", "demo"])
def test_a_missing_extra_is_named(command: str, models: Path, monkeypatch: pytest.MonkeyPatch, fleet: Run) -> None:
    hide(monkeypatch, "sqlalchemy")
    arguments = {"edge": ["run"], "demo": ["--models-dir", str(models)]}[command]
    sentence = refused(fleet(command, *arguments))
    assert "'sqlalchemy'" in sentence
    assert install_command(COMMANDS[command].extra) in sentence


def test_a_program_off_the_path_is_called_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("python", "fleet"):
        (binaries / name).touch(0o755)
    monkeypatch.setattr(sys, "executable", str(binaries / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert program() == ".venv/bin/fleet"
    monkeypatch.chdir(binaries.parent)
    assert program() == "bin/fleet"
    monkeypatch.chdir("/")
    assert program() == str(binaries / "fleet").lstrip("/")
    monkeypatch.setenv("PATH", str(binaries))
    assert program() == "fleet"


PACKAGES = {"llama-cpp-python": "llama_cpp", "psycopg[binary]": "psycopg", "argon2-cffi": "argon2"}
WITHOUT = """
import importlib, sys
from tests.support.without import Without
sys.meta_path.insert(0, Without(*sys.argv.pop(1).split(",")))
"""
IMPORTED = f"{WITHOUT}importlib.import_module(sys.argv[1])"
CALLED = f"{WITHOUT}from fleet_cli.main import main; main()"


def packages_of(extra: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: set[str] = set()
    for requirement in (*project["optional-dependencies"][extra], *project["dependencies"]):
        if inner := re.fullmatch(r"dssd-fleet\[(.+)\]", requirement):
            found |= set().union(*(packages_of(each) for each in inner[1].split(",")))
        else:
            name = re.split(r"[<>=; ]", requirement)[0]
            found.add(PACKAGES.get(name, name.replace("-", "_")))
    return found


@pytest.mark.parametrize(
    ("extra", "module"),
    [
        ("device", "fleet_cli.device"),
        pytest.param("device", "fleet_device.device", marks=pytest.mark.slow),
        ("edge-llama", "fleet_cli.edge"),
        pytest.param("edge-llama", "fleet_cli.demo", marks=pytest.mark.slow),
        pytest.param("edge-remote", "fleet_cli.edge", marks=pytest.mark.slow),
        ("admin", "fleet_cli.admin"),
    ],
)
def test_an_extra_brings_what_its_commands_import(extra: str, module: str) -> None:
    run_with(extra, IMPORTED, module)


def run_with(extra: str, program: str, *arguments: object) -> None:
    """Run a program that takes the names of the packages that are absent with an extra alone."""
    absent = ",".join(packages_of("dev") - packages_of(extra))
    done = subprocess.run(
        [sys.executable, "-c", program, absent, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("extra", ["device", "edge", "admin", "edge-llama", "edge-remote"])
def test_models_are_checked_with_any_extra(extra: str, tmp_path: Path) -> None:
    small, large = FAMILIES["Llama 3.2 1B"], FAMILIES["Llama 3.1 8B"]
    draft, file = family_gguf(tmp_path / "draft.gguf", small), family_gguf(tmp_path / "target.gguf", large)
    run_with(extra, CALLED, "models", "check", draft, file)
    run_with(extra, CALLED, "models", "check", draft, family_folder(tmp_path / "target", large))
