import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from fleet_device.power import EnergyMeter, HeatSensor, causes, temperature
from fleet_device.requests.generate import Generation
from fleet_device.session.states import SessionCounters
from fleet_device.settings import Power
from schemas.reasons import EndReason

ZONE, COOLER, CPU = "class/thermal/thermal_zone0", "class/thermal/cooling_device0", "devices/system/cpu/cpu0"
FIRMWARE = "devices/platform/soc/soc:firmware/get_throttled"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def put(files: dict[str, object]) -> Path:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        return tmp_path

    return put


def zone(degrees: float, *, kind: str = "cpu-thermal", number: int = 0) -> dict[str, object]:
    folder = f"class/thermal/thermal_zone{number}"
    return {f"{folder}/temp": round(1000 * degrees), f"{folder}/type": kind}


def test_the_temperature_is_that_of_the_hottest_part_of_the_processor(write: Callable[..., Path]) -> None:
    root = write(zone(40, kind="iwlwifi_1") | zone(140.0, kind="battery", number=1))
    assert temperature(root) == 140.0, "nothing else is shown"
    assert temperature(write(zone(55, number=2) | zone(61.5, kind="x86_pkg_temp", number=3))) == 61.5
    assert temperature(write(zone(-40, number=3))) == 55.0, "a sensor that does not work"


@pytest.mark.parametrize(
    ("files", "throttled"),
    [
        ({FIRMWARE: "0"}, False),
        ({FIRMWARE: "50000"}, False),  # in the past
        ({FIRMWARE: "50005"}, True),
        ({FIRMWARE: "0xe0008"}, True),
        ({"devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled": "4"}, True),
        ({f"{COOLER}/type": "pwm-fan", f"{COOLER}/cur_state": 3}, False),
        ({f"{COOLER}/type": "thermal-cpufreq-0", f"{COOLER}/cur_state": 0}, False),
        ({f"{COOLER}/type": "thermal-cpufreq-0", f"{COOLER}/cur_state": 2}, True),
        ({f"{COOLER}/type": "Processor", f"{COOLER}/cur_state": 1}, True),
        ({f"{COOLER}/type": "intel_powerclamp", f"{COOLER}/cur_state": -1}, False),
        ({**zone(80), f"{ZONE}/trip_point_0_type": "passive", f"{ZONE}/trip_point_0_temp": 85000}, False),
        ({**zone(86), f"{ZONE}/trip_point_0_type": "passive", f"{ZONE}/trip_point_0_temp": 85000}, True),
        ({**zone(86), f"{ZONE}/trip_point_0_type": "critical", f"{ZONE}/trip_point_0_temp": 85000}, False),
        ({**zone(86), f"{ZONE}/trip_point_0_type": "passive", f"{ZONE}/trip_point_0_temp": 0}, False),
    ],
)
def test_what_kernel_and_firmware_show_is_read(
    files: dict[str, object], throttled: bool, write: Callable[..., Path]
) -> None:
    assert bool(list(causes(write(files)))) is throttled


@pytest.mark.parametrize(("now", "throttled"), [(1_200_000, True), (2_390_000, False)])
def test_a_hot_processor_at_full_frequency_is_not_throttled(
    now: int, throttled: bool, write: Callable[..., Path]
) -> None:
    hot = {**zone(90), f"{ZONE}/trip_point_0_type": "passive", f"{ZONE}/trip_point_0_temp": 85000}
    frequency = {f"{CPU}/cpufreq/scaling_cur_freq": now, f"{CPU}/cpufreq/cpuinfo_max_freq": 2_400_000}
    assert bool(list(causes(write(hot | frequency)))) is throttled


NAMES = [
    f"{ZONE}/temp", f"{ZONE}/type", f"{ZONE}/trip_point_0_type", f"{ZONE}/trip_point_0_temp", f"{COOLER}/type",
    f"{COOLER}/cur_state", FIRMWARE, f"{CPU}/cpufreq/scaling_cur_freq", f"{CPU}/cpufreq/cpuinfo_max_freq",
    f"{CPU}/thermal_throttle/package_throttle_count",
]  # fmt: skip
CONTENTS = st.binary(max_size=100) | st.integers().map(lambda n: b"%d" % n) | st.just(b"9" * 5000) | st.none()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(CONTENTS, min_size=len(NAMES), max_size=len(NAMES)))
def test_no_content_of_a_file_raises(contents: list[bytes | None], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("sys")
    for name, content in zip(NAMES, contents, strict=True):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)
    sensor = HeatSensor(root)
    sensor.read()
    sensor.read()


def test_files_that_block_or_lead_nowhere_say_nothing(tmp_path: Path) -> None:
    folder = tmp_path / ZONE
    folder.mkdir(parents=True)
    os.mkfifo(folder / "temp")
    (folder / "type").symlink_to("type")
    sensor = HeatSensor(tmp_path)
    sensor.read()
    assert (sensor.temperature_c, sensor.throttled) == (None, None)
    HeatSensor(tmp_path / "nowhere").read()


def test_throttling_ends_only_after_a_while_and_each_change_is_told_once(write: Callable[..., Path]) -> None:
    told: list[str | None] = []
    hot, cool = zone(85) | {FIRMWARE: "4"}, zone(60) | {FIRMWARE: "40000"}
    sensor = HeatSensor(write(hot))
    sensor.on_change = lambda: told.append(sensor.throttled)
    for _ in range(3):
        sensor.read()
    assert len(told) == 1
    assert "85 °C" in (told[0] or "")
    write(cool)
    for _ in range(3):
        sensor.read()
    write(hot)
    sensor.read()
    write(cool)
    for _ in range(5):
        sensor.read()
    assert len(told) == 1
    sensor.read()
    assert told[1:] == [None]
    assert sensor.temperature_c == 60.0


def test_a_count_of_throttling_that_rises_is_throttling(write: Callable[..., Path]) -> None:
    count = f"{CPU}/thermal_throttle/package_throttle_count"
    sensor = HeatSensor(write({count: 41}))
    sensor.read()
    assert sensor.throttled is None, "it happened before"
    write({count: 42})
    sensor.read()
    assert sensor.throttled is not None


def generation(*, draft_ms: float = 0.0, uplink: int = 0) -> Generation:
    return Generation(
        session=bytes(8), tokens=(1,) * 10, reason=EndReason.LENGTH, closed=None, wall_ms=1.0, first_ms=None,
        counters=SessionCounters(draft_ms=draft_ms, uplink_bytes=uplink), resumes=0, drafts=0,
    )  # fmt: skip


def test_by_figures_a_request_costs_its_drafts_its_bytes_and_its_share_of_the_idle_power() -> None:
    time_s = 0.0
    power = Power(drafting_w=7.0, idle_w=3.0, joules_per_mb=20.0)
    meter = EnergyMeter(power, lambda: time_s)
    time_s = 100.0
    with meter.running() as first:
        time_s = 110.0
        with meter.running() as second:
            time_s = 114.0
    time_s = 200.0
    assert first(generation(draft_ms=2000.0)) == pytest.approx(3 * 10 + 3 * 4 / 2 + 4 * 2)
    assert second(generation(uplink=1_000_000)) == pytest.approx(3 * 4 / 2 + 20)


def test_without_figures_energy_is_unknown() -> None:
    with EnergyMeter(Power(), lambda: 0.0).running() as joules:
        pass
    assert joules(generation()) is None
