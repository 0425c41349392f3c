import sys

import pytest

from fleet_cli.bench import _BENCHMARKS
from fleet_cli.main import main


@pytest.mark.parametrize("name", sorted(_BENCHMARKS))
def test_a_benchmark_s_help_names_the_command_that_was_typed(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fleet", "bench", name, "--help"])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: fleet bench {name} ")
