import subprocess
import sys

import pytest

from fleet_cli.demo.processes import Child


@pytest.mark.parametrize(
    ("errors", "complaint"),
    [
        (["Loading …", "fleet: The one.", "fleet: The other."], "The one. The other."),
        (["fleet: Long ago.", "Loading …", "fleet: The one."], "The one."),
        (["Traceback", "ValueError: x"], "ValueError: x"),
        ([], "ended with exit code 0 and said nothing"),
    ],
)
def test_all_that_a_child_complains_of_is_passed_on(errors: list[str], complaint: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""], text=True)
    process.wait()
    assert Child("edge", process, errors).complaint == complaint
