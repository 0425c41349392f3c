import pytest

from benchmarks.clients import Client, fairness, main


def test_fairness_is_the_most_over_the_least() -> None:
    assert fairness([Client(30), Client(20), Client(24)]) == 1.5
    assert fairness([Client(7)]) == 1.0
    assert fairness([Client(0), Client(3)]) == float("inf")


def test_figures_that_cannot_work_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--clients", "0"])
    assert "must be positive" in capsys.readouterr().err
