import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fleet_edge.verifiers.blocks.scorer import Scorer
from fleet_edge.verifiers.contract import CapacityExceeded, VerifierError
from tests.fleet_edge.verifiers.oracle import VOCABULARY, tiny_target_gguf
from tests.support.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[4]
TEXT = random.Random(5).choices(range(VOCABULARY), k=90)


@pytest.fixture(scope="module", params=["llama", "qwen35"])
def scorer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    path = tiny_target_gguf(tmp_path_factory.mktemp("scorer") / "tiny.gguf", kind=request.param)
    return Scorer(path, max_tokens=1024, threads=2)


def test_a_row_is_the_same_in_every_batch_after_a_fork_and_after_a_cut(scorer: Scorer) -> None:
    alone = scorer.open()
    (whole,) = scorer.score([(alone, TEXT)])
    assert (whole.shape, whole.dtype) == ((90, scorer.vocabulary), np.float32)
    fork = scorer.fork(alone, 70)
    others = [(scorer.open(), TEXT[number:30]) for number in range(8)]
    *_, rest = scorer.score([*others, (fork, TEXT[70:])])
    assert np.array_equal(rest, whole[70:])
    scorer.cut(alone, 40)
    scorer.score([(alone, TEXT[:3])])
    scorer.cut(alone, 40)
    row, _ = scorer.score([(alone, TEXT[40:80]), (others[0][0], [1])], last=True)
    assert np.array_equal(row, whole[79:80])
    assert scorer.length(alone) == 80
    for sequence in (alone, fork, *(name for name, _ in others)):
        scorer.close(sequence)


def test_what_a_call_returned_stays(scorer: Scorer) -> None:
    sequence = scorer.open()
    (first,) = scorer.score([(sequence, TEXT[:9])])
    before = first.copy()
    scorer.score([(sequence, TEXT[9:])])
    assert np.array_equal(first, before)
    scorer.close(sequence)


def test_errors_change_nothing(scorer: Scorer) -> None:
    sequence = scorer.open()
    for batch in ([(sequence, [VOCABULARY + 10_000])], [(sequence, [1]), (sequence, [2])], [(10_000, [1])]):
        with pytest.raises(VerifierError):
            scorer.score(batch)
    many = [(scorer.open(), TEXT) for _ in range(9)]
    with pytest.raises(CapacityExceeded):
        scorer.score(many)
    assert scorer.length(sequence) == 0
    scorer.score(many[:8])


def test_it_needs_nothing_of_a_fleet(tmp_path: Path) -> None:
    code = (
        "import json, sys; from fleet_edge.verifiers.blocks.scorer import Scorer; "
        f"scorer = Scorer({str(tiny_target_gguf(tmp_path / 'tiny.gguf'))!r}, threads=1); "
        "scorer.score([(scorer.open(), [1, 2, 3])]); print(json.dumps(list(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=PATIENCE_S, cwd=ROOT)
    modules = set(json.loads(run.stdout))
    of_fleets = ("broker_config", "fleet_admin", "fleet_cli", "fleet_device", "sampling", "paho", "sqlalchemy", "torch")
    assert not modules & set(of_fleets)
    ours = {name for name in modules if name.startswith(("fleet_edge.", "fleet_common."))}
    assert {name for name in ours if not name.startswith("fleet_edge.verifiers")} == {
        "fleet_common.gguf_files", "fleet_common.host", "fleet_common.lazy",
        "fleet_common.grammar", "fleet_common.grammar.errors", "fleet_common.grammar.tokenizer",
    }  # fmt: skip
    assert not [name for name in ours if name.startswith(("fleet_edge.verifiers.torch", "fleet_edge.verifiers.remote"))]
