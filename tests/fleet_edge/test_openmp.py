import os
import subprocess
import sys

import pytest

SET = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def _policy_after(statement: str, name: str = "OMP_WAIT_POLICY", **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in SET} | variables
    program = f"import os; {statement}; print(os.environ.get({name!r}))"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    ["fleet_edge.verifiers.registry", "fleet_edge.verifiers.torch_engine.verifier", "fleet_edge.batching.judging"],
)
def test_the_policy_stands_before_torch_is_imported(module: str) -> None:
    at_import = (
        "import sys, importlib.abc\n"
        "class Watch(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        assert name != 'torch' or os.environ.get('OMP_WAIT_POLICY') == 'PASSIVE'\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"import {module}\n"
    )
    assert _policy_after(f"exec({at_import!r})") == "PASSIVE"


@pytest.mark.parametrize("module", ["fleet_edge", "fleet_cli.admin"])
def test_what_only_reads_the_log_sets_nothing(module: str) -> None:
    assert _policy_after(f"import {module}") == "None"


@pytest.mark.slow
def test_a_policy_that_is_set_stays() -> None:
    assert _policy_after("import fleet_edge.verifiers.registry", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"


@pytest.mark.slow
def test_they_wait_awake_for_a_moment_unless_a_policy_is_set() -> None:
    assert _policy_after("import fleet_edge.verifiers.registry", "GOMP_SPINCOUNT") == "10000"
    assert _policy_after("import fleet_edge.verifiers.registry", "GOMP_SPINCOUNT", OMP_WAIT_POLICY="ACTIVE") == "None"
    assert _policy_after("import fleet_edge.verifiers.registry", "GOMP_SPINCOUNT", GOMP_SPINCOUNT="7") == "7"
