import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_structure_page_is_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/structure", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_settings_page_is_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/settings-page", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_events_page_is_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/events-page", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
