from pathlib import Path

import pytest

from fleet_cli.broker import watch_command
from fleet_cli.errors import CommandError


def test_half_of_tls_is_one_sentence() -> None:
    with pytest.raises(CommandError, match="--ca"):
        watch_command(certificate=Path("monitor.pem"))
