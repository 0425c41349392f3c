import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starlette.applications import Starlette

from fleet_device.api.app import create_app
from fleet_device.api.replies import Pause
from tests.support.memory_device import ScriptedAgent, ScriptedBackend, TalkingCodec, TalkingDrafter, settings

Make = Callable[..., tuple[Starlette, ScriptedBackend]]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[ScriptedBackend] = []

    def build(
        agent: ScriptedAgent | None = None,
        *,
        codec: TalkingCodec | None = None,
        waiting: int = 2,
        clock: Callable[[], float] = time.monotonic,
        pause: Pause = asyncio.sleep,
        **given: object,
    ) -> tuple[Starlette, ScriptedBackend]:
        drafter = TalkingDrafter(context=64)
        drafter.codec = codec or drafter.codec
        backend = ScriptedBackend(agent or ScriptedAgent(), drafter, waiting=waiting)
        made.append(backend)
        chosen = settings(**{"state_dir": tmp_path / "state", **given})
        app = create_app(backend, chosen, wall_clock=lambda: 1234.5, clock=clock, pause=pause, schedule=lambda *_: None)
        return app, backend

    yield build
    for backend in made:
        backend.close()


@pytest.fixture
def app(make: Make) -> Starlette:
    return make()[0]
