"""`fleet edge run` whose steps take at least as long as those of a measured curve, in `PLAYED_CURVE`."""

from unittest.mock import patch

from fleet_cli.main import main as fleet
from fleet_edge import edge
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import OnProgress, Verifier
from fleet_edge.verifiers.registry import load_verifier
from tests.support.played_steps import curve_of_environment, play


def _load_played(settings: EdgeSettings, on_progress: OnProgress) -> Verifier:
    return play(load_verifier(settings, on_progress), curve_of_environment())


if __name__ == "__main__":
    with patch.object(edge, "load_verifier", _load_played):
        fleet()
