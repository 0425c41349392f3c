import errno
import itertools
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fleet_device.drafters.model_file import locate_model
from fleet_device.updates import layout
from fleet_device.updates.handoff import STATE, UpdateFolder, UpdateState
from fleet_device.updates.layout import UpdatePaths
from fleet_device.updates.repository import CHUNK_BYTES, ReleaseFile, Repository
from fleet_device.updates.updater import service_restarts
from schemas.control import UpdateStage
from tests.fleet_device.updates.conftest import (
    FIRST,
    TRIAL_S,
    Gateway,
    content,
    crashes,
    fails,
    passes,
    this_kind,
    wheel,
)

MODEL = content(CHUNK_BYTES + 5)
OTHER = content(50_000, seed=2)


class PowerCut(BaseException):
    """The machine loses its power."""


def test_a_new_model_is_fetched_tested_and_kept(gateway: Gateway) -> None:
    gateway.want(gateway.site.publish(model=MODEL))
    gateway.serve = passes
    state = gateway.update()
    assert (state.stage, state.release, state.running, state.fetched) == (UpdateStage.DONE, 1, "update-1", len(MODEL))
    assert gateway.model() == MODEL
    programs = gateway.folder / "programs"
    assert [(programs / link).readlink().name for link in ("previous", "updater")] == [FIRST, "update-1"]
    assert (programs / "current" / "venv").resolve() == (programs / "venvs" / "0.1.0").resolve()
    assert (programs / "current" / "proven").exists()
    asked = len(gateway.site.server.requests)
    assert gateway.update() == state
    assert len(gateway.site.server.requests) == asked, "what is done costs nothing"


@pytest.mark.parametrize(
    ("file", "name"), [("smollm2-135m/Q4_0.gguf", "smollm2-135m"), ("any/smollm2-135m-Q4_0.gguf", "smollm2-135m-Q4_0")]
)
def test_a_pulled_model_has_the_name_that_it_has_where_it_was_published(gateway: Gateway, file: str, name: str) -> None:
    gateway.serve = passes
    gateway.want(gateway.site.publish(model=MODEL, name=file))
    assert gateway.update().stage is UpdateStage.DONE
    located = locate_model(gateway.configured_model(), folder=gateway.folder)
    assert located.name == name
    assert located.path.read_bytes() == MODEL


@pytest.mark.parametrize("serve", [fails, crashes, lambda _: None])
def test_a_release_whose_test_fails_or_does_not_end_is_rolled_back(
    gateway: Gateway, serve: Callable[[Gateway], None]
) -> None:
    gateway.want(gateway.site.publish(model=MODEL))
    gateway.serve = serve
    state = gateway.update()
    assert (state.stage, state.running, gateway.running) == (UpdateStage.FAILED, FIRST, FIRST)
    assert "rolled back" in state.sentence
    programs = gateway.folder / "programs"
    assert (programs / "updater").readlink().name == FIRST
    assert not (programs / "previous").is_symlink(), "what was there before is still there"
    gateway.serve = passes
    assert gateway.update().stage is UpdateStage.FAILED, "it is not tried again by itself"
    gateway.want(None)
    gateway.update()
    gateway.want(1)
    assert gateway.update().stage is UpdateStage.DONE


def crashes_twice(gateway: Gateway) -> None:
    (crashes if gateway.crashes in {0, 1} else lambda _: None)(gateway)


@pytest.mark.parametrize(
    ("serve", "counted", "whole"), [(crashes, 99, False), (crashes, None, True), (crashes_twice, 99, True)]
)
def test_a_trial_ends_early_only_if_systemd_has_counted_three_crashes_in_it(
    gateway: Gateway, serve: Callable[[Gateway], None], counted: int | None, whole: bool
) -> None:
    gateway.want(gateway.site.publish(model=MODEL))
    gateway.serve, gateway.crashes = serve, counted
    state = gateway.update()
    assert (state.stage, gateway.running) == (UpdateStage.FAILED, FIRST)
    assert (gateway.slept_s >= TRIAL_S) is whole


@pytest.mark.parametrize(
    ("said", "restarts"), [("echo 4", 4), ("echo", None), ("echo Failed to connect to bus >&2; exit 1", None)]
)
def test_systemd_is_asked_how_often_it_restarted_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, restarts: int | None
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert service_restarts() is None, "without systemd"
    (tmp_path / "systemctl").write_text(f"#!/bin/sh\n{said}\n")
    (tmp_path / "systemctl").chmod(0o755)
    assert service_restarts() == restarts


def test_a_release_that_restarts_the_machine_is_rolled_back(gateway: Gateway) -> None:
    def crash(gateway: Gateway) -> None:
        if gateway.exchange.trial() is not None:
            raise PowerCut

    gateway.want(gateway.site.publish(model=MODEL))
    gateway.serve = crash
    cuts = 0
    for _ in range(9):
        try:
            state = gateway.update()
        except PowerCut:
            cuts += 1
        else:
            break
    assert cuts == 3
    assert (state.stage, gateway.running) == (UpdateStage.FAILED, FIRST)


@dataclass
class Power:
    """Cut the power before the write with a number."""

    cut_at: int
    writes: int = 0

    def write(self) -> None:
        self.writes += 1
        if self.writes == self.cut_at:
            raise PowerCut


@pytest.mark.slow
@pytest.mark.parametrize("serve", [passes, fails, crashes])
def test_wherever_the_power_is_cut_the_update_ends_as_it_would_have(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, serve: Callable[[Gateway], None]
) -> None:
    power, passing = Power(0), serve is passes

    def cut(call: Callable[..., object]) -> Callable[..., object]:
        def run(*given: object, **named: object) -> object:
            power.write()
            result = call(*given, **named)
            power.write()
            return result

        return run

    for owner, name in (
        (UpdateFolder, "write"),
        (UpdatePaths, "_link"),
        (UpdatePaths, "prepare"),
        (Repository, "fetch"),
    ):
        monkeypatch.setattr(owner, name, cut(getattr(owner, name)))
    gateway.serve = serve
    previous, number, cut_at, uncut = FIRST, 0, 0, False
    while not uncut:
        cut_at += 1
        power.cut_at = 0
        number = gateway.site.publish(model=content(20_000, seed=cut_at))
        gateway.want(number)
        power.writes, power.cut_at, uncut = 0, cut_at, True
        while True:
            try:
                state = gateway.update()
            except PowerCut:
                uncut = False
                assert gateway.running in {previous, f"update-{number}"}
            else:
                break
        expected = f"update-{number}" if passing else previous
        assert state.stage is (UpdateStage.DONE if passing else UpdateStage.FAILED), (cut_at, state)
        assert gateway.running == expected
        if passing:
            assert gateway.model() == content(20_000, seed=cut_at), (cut_at, state)
            previous = expected
    assert cut_at > 10, "places"


def test_an_older_release_than_one_that_has_run_is_refused(gateway: Gateway) -> None:
    gateway.serve = passes
    for model in (MODEL, OTHER):
        number = gateway.site.publish(model=model)
    gateway.want(number)
    assert gateway.update().stage is UpdateStage.DONE
    gateway.want(1)
    state = gateway.update()
    assert (state.stage, gateway.running) == (UpdateStage.FAILED, "update-2")
    assert "older" in state.sentence


def test_outside_its_window_nothing_is_fetched(gateway: Gateway) -> None:
    gateway.serve = passes
    gateway.want(gateway.site.publish(model=MODEL), window="22:00-05:00")
    assert gateway.update().stage is UpdateStage.WAITING
    assert gateway.site.server.requests == []
    gateway.hour = 23
    assert gateway.update().stage is UpdateStage.DONE


def test_a_window_that_ends_interrupts_the_download(gateway: Gateway) -> None:
    def at_five(gateway: Gateway) -> None:
        passes(gateway)
        gateway.hour = 5 if gateway.slept_s > 20 else 3

    gateway.serve, gateway.hour = at_five, 3
    gateway.want(gateway.site.publish(model=MODEL), window="22:00-05:00", kbyte_per_s=10)
    state = gateway.update()
    assert state.stage is UpdateStage.WAITING
    assert 0 < state.fetched < len(MODEL)
    gateway.serve, gateway.hour = passes, 23
    assert gateway.update().stage is UpdateStage.DONE
    assert gateway.site.server.begins("models") == [0, state.fetched], "it has gone on where it was"


def test_a_window_that_ends_interrupts_slow_metadata(gateway: Gateway) -> None:
    gateway.hour, gateway.tick_s = 4, 10.0
    gateway.site.server.faults.drip = True
    gateway.want(gateway.site.publish(model=MODEL), window="22:00-05:00")
    assert gateway.update().stage is UpdateStage.WAITING
    assert gateway.now().hour == 5
    assert not gateway.site.server.begins("models")


def test_a_download_keeps_to_its_rate_and_ends_when_it_is_not_desired_any_more(gateway: Gateway) -> None:
    def change(gateway: Gateway) -> None:
        if gateway.slept_s > 30:
            gateway.want(None)

    gateway.serve = change
    gateway.want(gateway.site.publish(model=MODEL), kbyte_per_s=20)
    state = gateway.update()
    assert state.stage is UpdateStage.WAITING
    assert "not desired" in state.sentence
    assert state.fetched / gateway.slept_s == pytest.approx(20_000, rel=0.1)


def test_no_space_is_reported_before_anything_is_fetched(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Usage:
        free: int

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(1000))
    gateway.want(gateway.site.publish(model=MODEL))
    state = gateway.update()
    assert state.stage is UpdateStage.WAITING
    assert "make room" in state.sentence
    assert not gateway.site.server.begins("models")
    monkeypatch.undo()
    gateway.serve = passes
    gateway.slept_s += 300.0
    assert gateway.update().stage is UpdateStage.DONE


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize(("owner", "name"), [(Repository, "release"), (Repository, "fetch"), (UpdatePaths, "prepare")])
def test_a_release_that_cannot_be_stored_now_is_tried_again(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, number: int
) -> None:
    def broken(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    gateway.serve = passes
    gateway.want(gateway.site.publish(model=MODEL))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        state = gateway.update()
    assert state.stage is UpdateStage.WAITING
    assert os.strerror(number) in state.sentence
    gateway.slept_s += 300.0
    assert gateway.update().stage is UpdateStage.DONE


def test_a_machine_that_cannot_store_is_tried_less_and_less_often(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []

    def full(*_: object) -> None:
        tried.append(gateway.slept_s)
        raise OSError(errno.ENOSPC, "No space")

    gateway.serve = passes
    gateway.want(gateway.site.publish(model=MODEL))
    with monkeypatch.context() as patch:
        patch.setattr(Repository, "fetch", full)
        while gateway.slept_s < 4 * 3600:
            assert gateway.update().stage is UpdateStage.WAITING
            gateway.slept_s += 100.0
        pauses = [after - before for before, after in itertools.pairwise(tried)]
        assert pauses == sorted(pauses)
        assert (pauses[0], pauses[-1]) == (300.0, 3600.0)
        before = len(tried)
        gateway.slept_s = 0.0
        gateway.update()
        assert len(tried) == before + 1, "a clock that was set back does not delay it"
    gateway.want(None)
    gateway.update()
    gateway.want(1)
    assert gateway.update().stage is UpdateStage.DONE, "whoever desires it again need not wait"


@pytest.mark.parametrize("serve", [fails, crashes, lambda _: None])
def test_a_test_that_fails_on_a_full_disk_is_repeated(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, serve: Callable[[Gateway], None]
) -> None:
    @dataclass
    class Usage:
        free: int

    def fills(gateway: Gateway) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(5000))
        serve(gateway)

    gateway.want(gateway.site.publish(model=MODEL))
    gateway.serve = fills
    state = gateway.update()
    assert (state.stage, gateway.running) == (UpdateStage.WAITING, FIRST)
    monkeypatch.undo()
    gateway.serve = passes
    gateway.slept_s += 300.0
    assert gateway.update().stage is UpdateStage.DONE


def test_on_a_full_disk_a_part_makes_room_for_the_report(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[Path] = []

    def fills(_: Repository, _file: ReleaseFile, part: Path, *_rest: object) -> None:
        part.write_bytes(MODEL)
        parts.append(part)
        raise OSError(errno.ENOSPC, "No space")

    gateway.serve = passes
    gateway.want(gateway.site.publish(model=MODEL))
    with monkeypatch.context() as patch:
        patch.setattr(Repository, "fetch", fills)
        assert gateway.update().stage is UpdateStage.WAITING
    assert parts[0].stat().st_size == len(MODEL) - CHUNK_BYTES
    gateway.slept_s += 300.0
    assert gateway.update().stage is UpdateStage.DONE


def test_without_network_it_waits_and_says_why(gateway: Gateway) -> None:
    gateway.want(gateway.site.publish(model=MODEL))
    gateway.site.server.faults.status = 503
    state = gateway.update()
    assert state.stage is UpdateStage.WAITING
    assert "cannot be read now" in state.sentence
    assert gateway.exchange.read(UpdateState, STATE) == state


def test_what_nobody_needs_any_more_is_removed(gateway: Gateway) -> None:
    gateway.serve = passes
    for seed in range(4):
        gateway.want(gateway.site.publish(model=content(30_000, seed=seed)))
        assert gateway.update().stage is UpdateStage.DONE
    assert {each.name for each in (gateway.folder / "programs" / "releases").iterdir()} == {
        FIRST,
        "update-3",
        "update-4",
    }
    assert len(list((gateway.folder / "models").iterdir())) == 2
    assert (gateway.folder / "programs" / "venvs" / "0.1.0").exists()


def bundle(folder: Path, version: str) -> Path:
    kind = folder / this_kind()
    file = wheel(kind, version)
    archive = kind / f"dssd-fleet-{version}-device.tar"
    with tarfile.open(archive, "w") as made:
        made.add(file, f"./{file.name}")
    return archive


@pytest.mark.slow
def test_a_new_program_is_installed_offline_next_to_the_old_one(gateway: Gateway, tmp_path: Path) -> None:
    gateway.serve = passes
    bundles = [bundle(tmp_path, "0.2.0")]
    gateway.want(gateway.site.publish(bundles=bundles))
    state = gateway.update()
    assert state.stage is UpdateStage.DONE, state.sentence
    program = (gateway.folder / "programs" / "current" / "venv").resolve()
    assert program.name.startswith("0.2.0-")
    assert (program / "complete").read_text() == "0.2.0\n"
    assert 'model = "/old.gguf"' in (gateway.folder / "programs" / "current" / "device.toml").read_text()
    # A release with the same wheels and a model fetches the model alone.
    fetched = gateway.site.server.begins("wheels")
    gateway.want(gateway.site.publish(model=OTHER, bundles=bundles))
    assert gateway.update().stage is UpdateStage.DONE
    assert (gateway.folder / "programs" / "current" / "venv").resolve() == program
    assert gateway.site.server.begins("wheels") == fetched


@pytest.mark.parametrize(
    ("step", "stderr", "stage"),
    [
        ("venv", "Error: Command '[...]' returned non-zero exit status 1.", UpdateStage.WAITING),
        ("pip", f"ERROR: [Errno {errno.ENOSPC}] No space left on device", UpdateStage.WAITING),
        ("pip", "ERROR: toy.whl is not a supported wheel on this platform.", UpdateStage.FAILED),
    ],
)
def test_only_wheels_that_cannot_be_installed_anywhere_fail(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, stderr: str, stage: UpdateStage
) -> None:
    def run(command: list[str | Path]) -> str:
        if step in command:
            raise subprocess.CalledProcessError(1, command, stderr=stderr)
        return ""

    monkeypatch.setattr(layout, "_run", run)
    gateway.want(gateway.site.publish(bundles=[bundle(tmp_path, "0.2.0")]))
    state = gateway.update()
    assert (state.stage, gateway.running) == (stage, FIRST)
    assert stderr in state.sentence


@pytest.mark.parametrize("program", ["print('0.1.9')", "raise SystemExit('broken')"])
def test_a_program_that_is_not_what_it_says_never_runs(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    run = layout._run

    def install_or_run(command: list[str | Path]) -> str:
        if "venv" in command:
            file = Path(command[-1]) / "bin" / "fleet"
            file.parent.mkdir(parents=True)
            file.write_text(f"#!{sys.executable}\n{program}\n")
            file.chmod(0o755)
        return run(command) if command[0].name == "fleet" else ""

    monkeypatch.setattr(layout, "_run", install_or_run)
    gateway.serve = passes
    gateway.want(gateway.site.publish(bundles=[bundle(tmp_path, "0.2.0")]))
    state = gateway.update()
    assert (state.stage, gateway.running) == (UpdateStage.FAILED, FIRST)
