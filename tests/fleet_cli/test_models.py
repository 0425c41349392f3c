import subprocess
import sys

import pytest

from fleet_cli.models import rule_sentence


def test_the_commands_import_neither_llama_cpp_nor_torch() -> None:
    code = "import sys, fleet_cli.models; sys.exit(bool({'torch', 'llama_cpp', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("theirs", "said"), [(20.0, "auto is right with blocks"), (5.0, 'engine = "llama.cpp"')])
def test_a_try_says_whether_the_rule_of_auto_is_right(theirs: float, said: str) -> None:
    ours = {"1x1_ms": 10.0, "1x5_ms": 12.0}
    assert said in rule_sentence(ours, {"1x1_ms": theirs, "1x5_ms": theirs}, chosen="blocks", other="llama.cpp")
