import importlib
import importlib.resources
import inspect
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

from schemas.errors import FleetError

DEVICE = [
    "AsyncDevice", "AsyncTextStream", "ChatError", "ChatMessage", "ConnectFailed", "Device", "DeviceClosed",
    "DeviceError", "DeviceSettings", "DrafterError", "EdgeUnavailable", "FleetError", "GeneratedText", "Grammar",
    "InvalidRequest", "Prompt", "PromptTooLong", "ProtocolViolation", "RequestTimeout", "SessionFailed",
    "SessionRefused", "SettingsError", "TextCancelled", "TextOptions", "TextStream", "TokenOrigin", "ToolCall",
]  # fmt: skip
EDGE = [
    "ConnectFailed", "DeviceView", "Edge", "EdgeError", "EdgeSettings", "EventView", "QuarantineView", "FleetError",
    "InvalidQuery", "NotFound", "RoundView", "SegmentView", "SessionLog", "SessionView", "SettingsError",
    "StoreError", "StoreUnavailable", "Tally", "UsageView", "VerifierError",
]  # fmt: skip

# Other packages import their modules; the packages themselves export nothing.
WITHOUT_A_FACE = (
    "broker_config", "sampling", "fleet_admin", "fleet_cli", "fleet_common",
    "schemas",
)  # fmt: skip

# Raised and caught within one module or package.
INTERNAL = {
    "fleet_common.grammar.workers.WorkerEnded",
    "fleet_common.mqtt.connection.ConnectionLost",
    "fleet_common.mqtt.screen.BrokenStream",
}


@pytest.mark.parametrize(("package", "names"), [("fleet_device", DEVICE), ("fleet_edge", EDGE)])
def test_the_public_names_are_these_and_each_is_documented(package: str, names: list[str]) -> None:
    module = importlib.import_module(package)
    assert module.__all__ == dir(module) == sorted(names)
    for name in names:
        found = getattr(module, name)
        assert not inspect.isclass(found) or inspect.getdoc(found), name
    with pytest.raises(AttributeError, match=f"{package}"):
        _ = module.Devise


@pytest.mark.parametrize(
    ("face", "members"),
    [
        ("fleet_device.Device", "close count_tokens drafter from_config generate open stream wait_for_edge"),
        ("fleet_device.AsyncDevice", "close count_tokens drafter from_config generate open stream wait_for_edge"),
        ("fleet_device.TextStream", "cancel close pieces request result"),
        ("fleet_device.AsyncTextStream", "cancel close pieces result"),
        (
            "fleet_device.GeneratedText",
            "acceptance reason seed session tokens tokens_per_s unverified verified without_output",
        ),
        ("fleet_edge.Edge", "check drain from_config run stop target"),
        (
            "fleet_edge.SessionLog",
            (
                "active_devices alerts beginning close device devices edge edge_loads edges ends evaluation "
                "event_counts events export_columns export_rows failures labels latencies latencies_over_time latest "
                "quarantine quarantines record_event rounds segments session sessions spent_times "
                "unquarantine usage"
            ),
        ),
    ],
)
def test_what_the_public_classes_can_do_is_this_and_each_is_documented(face: str, members: str) -> None:
    package, _, name = face.partition(".")
    classes = getattr(importlib.import_module(package), name).__mro__
    own = {each: member for one in reversed(classes) for each, member in vars(one).items()}
    found = {each: member for each, member in own.items() if not each.startswith("_")}
    found = {each: member for each, member in found.items() if not inspect.ismemberdescriptor(member)}
    assert " ".join(sorted(found)) == members
    assert all(inspect.getdoc(member) for member in found.values())


@pytest.mark.parametrize("package", WITHOUT_A_FACE)
def test_the_other_packages_have_no_names_of_their_own(package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {package} as it; print([name for name in vars(it) if name[0] != '_'])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", [*WITHOUT_A_FACE, "fleet_device", "fleet_edge"])
def test_each_package_says_that_it_is_typed(package: str) -> None:
    assert (importlib.resources.files(package) / "py.typed").is_file()


def modules() -> list[ModuleType]:
    packages = [importlib.import_module(name) for name in (*WITHOUT_A_FACE, "fleet_device", "fleet_edge")]
    names = [info.name for each in packages for info in pkgutil.walk_packages(each.__path__, f"{each.__name__}.")]
    return [importlib.import_module(name) for name in names]


@pytest.mark.slow
def test_whoever_catches_the_one_root_catches_all_that_is_raised_to_users() -> None:
    strangers = {
        f"{error.__module__}.{name}"
        for module in modules()
        for name, error in vars(module).items()
        if inspect.isclass(error) and issubclass(error, BaseException) and error.__module__ == module.__name__
        if not issubclass(error, FleetError) and not name.startswith("_")
    }
    assert strangers == INTERNAL
