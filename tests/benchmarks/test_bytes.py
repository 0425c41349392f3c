import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import bytes as suite
from benchmarks.__main__ import main
from benchmarks.bytes import TCP_IP_HEAD, Traffic
from benchmarks.recordings import RecordedLaw, RecordedLaws
from benchmarks.systems import SYSTEMS
from sampling.distribution import Dist, shape
from schemas.policy import Mode
from tests.support.brokers import require_mosquitto

SIZE = 400


def some_law(number: int, *, tokens: int = 24, support: int = 6) -> RecordedLaw:
    rng = np.random.default_rng(number)

    def dist() -> Dist:
        probs = np.sort(rng.dirichlet(np.ones(support)))[::-1].astype(np.float32).astype(np.float64)
        return Dist(rng.permutation(SIZE)[:support].astype(np.int64), probs)

    target = [dist() for _ in range(tokens)]
    draft = [p if rng.random() < 0.7 else Dist(p.ids, p.probs[::-1].copy()) for p in target]
    return RecordedLaw((number + 1, 2, 3), tuple(target), tuple(draft))


def some_laws() -> RecordedLaws:
    return RecordedLaws([some_law(number) for number in range(3)], SIZE)


def test_a_recorded_law_is_served_as_it_was_recorded() -> None:
    laws = some_laws()
    law = laws.laws[1]
    policy = law.text(0, Mode.RESIDUAL).policy
    for place, p in enumerate(law.target):
        served = shape(laws.logits((*law.prompt, *range(place))), policy)
        order = np.argsort(p.ids)
        assert sorted(served.ids.tolist()) == p.ids[order].tolist()
        assert served.probs[np.argsort(served.ids)] == pytest.approx(p.probs[order], rel=1e-5)


def test_long_packets_are_cut_into_segments_as_on_ethernet() -> None:
    short = Traffic(tokens=1, packets_up=60, packets_down=50, segments_up=3, segments_down=2)
    assert (short.wire_up, short.wire_down) == (60 + 3 * TCP_IP_HEAD, 50 + 2 * TCP_IP_HEAD)
    long = Traffic(tokens=1, packets_up=144_800, packets_down=50, segments_up=3, segments_down=2)
    assert (long.wire_up, long.wire_down) == (144_800 + 100 * TCP_IP_HEAD, 50 + 50 * TCP_IP_HEAD)


@pytest.mark.broker
def test_every_system_is_counted_through_a_real_broker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_mosquitto()
    monkeypatch.setattr(suite, "record_laws", lambda *_args, **_options: some_laws())
    report = tmp_path / "bytes.json"
    arguments = ["bytes", "--drafts", "toy", "--outputs", "1", "--lengths", "4", "--json", str(report)]
    assert main(arguments) == 1  # full distributions over so few tokens are not much
    found = json.loads(report.read_text())
    rows: dict[tuple[str, str, bool], dict[str, Any]] = {
        (each["system"], each["mode"], each["stops"]): each for each in found["rows"]
    }
    assert {system for system, _, _ in rows} == set(SYSTEMS) - {"ours-auto"}
    assert found["machine"]["cpu"]
    assert "draft toy" in capsys.readouterr().out
    for (system, _, _), each in rows.items():
        assert each["tokens"] == 24, system
        # An Open alone has an id of 8 bytes, fingerprint and names; the prompt is of three tokens.
        assert 100 < each["session_bytes_per_request"] < 1000
        for way in ("uplink", "downlink"):
            payload, packets, tls, wire = (
                each[f"{way}_{kind}bytes_per_token"] for kind in ("", "packet_", "tls_", "wire_")
            )
            assert 0 < payload < packets, (system, way)
            assert tls < wire, (system, way)
            # Two runs: how many tokens a message of edge-only decoding has depends on times.
            assert system == "edge-only" or packets < tls, (system, way)
    dense, coupled = rows["dssd-dense", "residual", False], rows["ours-coupled", "coupled", False]
    residual = rows["ours-residual", "residual", False]
    assert residual["acceptance"] == dense["acceptance"]
    drafted = residual["full_uplink_bytes_per_token"] * 24 / (SIZE * 2)
    assert drafted == pytest.approx(round(drafted))
    assert drafted >= 24 * residual["acceptance"] / 2
    assert dense["downlink_bytes_per_token"] > 5 * residual["downlink_bytes_per_token"]
    assert coupled["downlink_bytes_per_token"] < residual["downlink_bytes_per_token"]
