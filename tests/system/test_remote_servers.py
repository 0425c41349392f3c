import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from broker_config.processes import MosquittoProcess
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.requests.generate import GenerateRequest, Generation, RequestContext
from fleet_device.service import DeviceService
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import EndReason
from tests.support.inference_process import ServerProcess, inference_process, write_tokenizer
from tests.support.processes import edge_process
from tests.support.scripted_language import draft_language, reference_text
from tests.support.waiting import PATIENCE_S, until
from tests.support.whole import FLEET, Whole

pytestmark = pytest.mark.broker

DEVICES = 8
LENGTH = 100
DISTURB_AT = 15  # tokens of every output
NEVER_S = 600.0


def prompt(number: int) -> list[int]:
    return [2, 3, 4 + number]


def coupled(number: int) -> SamplingPolicy:
    return SamplingPolicy(mode=Mode.COUPLED, temperature=0.8, top_k=20, top_p=0.95, seed=100 + number)


class Texts:
    def __init__(
        self, devices: Sequence[DeviceService], policy: Callable[[int], SamplingPolicy], length: int = LENGTH
    ) -> None:
        self._done: dict[int, Generation] = {}
        self._written = [0] * len(devices)
        self._failures: list[BaseException] = []
        self._disturbed = threading.Event()

        def write(number: int, device: DeviceService) -> None:
            def count(tokens: Sequence[int]) -> None:
                self._written[number] += len(tokens)
                if self._written[number] >= length - DISTURB_AT:
                    self._disturbed.wait(PATIENCE_S)

            try:
                self._done[number] = device.agent.generate(
                    GenerateRequest(prompt(number), policy=policy(number), max_new_tokens=length),
                    RequestContext(on_tokens=count),
                )
            except BaseException as error:
                self._failures.append(error)
                raise

        self._threads = [threading.Thread(target=write, args=(number, device)) for number, device in enumerate(devices)]
        for thread in self._threads:
            thread.start()

    def disturb(self, how: Callable[[], None]) -> None:
        """Call `how` once all outputs are under way; none ends before."""
        until(lambda: min(self._written) >= DISTURB_AT)
        how()
        self._disturbed.set()

    def finish(self) -> list[Generation]:
        for thread in self._threads:
            thread.join(PATIENCE_S)
        assert not self._failures
        return [self._done[number] for number in range(len(self._threads))]


@pytest.fixture
def whole(own_mosquitto: MosquittoProcess, tmp_path: Path) -> Whole:
    return Whole(own_mosquitto.port, tmp_path)


@contextmanager
def fleet(whole: Whole, server: ServerProcess, **options: float) -> Iterator[list[DeviceService]]:
    arguments = [
        "--fleet", FLEET, "--port", str(whole.port), "--db", whole.db, "--spool", str(whole.folder / "spool"),
        "--engine", "remote", "--endpoint", server.url,
        "--target", str(write_tokenizer(whole.folder / "tokenizer")),
    ]  # fmt: skip
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    with ExitStack() as stack:
        stack.enter_context(edge_process(arguments))
        script = draft_language()
        yield [
            stack.enter_context(
                whole.device(ScriptedDrafter(script, script.words), f"device-{number}", draft_length=4, answer_s=60.0)
            )
            for number in range(DEVICES)
        ]


def wanted() -> list[tuple[int, ...]]:
    """Return the outputs that the seeds and the target alone determine."""
    return [tuple(reference_text(prompt(number), coupled(number), LENGTH)) for number in range(DEVICES)]


def check_log(whole: Whole, done: Sequence[Generation]) -> None:
    rows = {row["session"]: row for row in whole.rows("SELECT session, reason, tokens FROM sessions")}
    for each_done in done:
        row = rows[each_done.session.hex()]
        assert each_done.reason is EndReason.LENGTH
        assert (row["reason"], row["tokens"]) == (EndReason.LENGTH.value, len(each_done.tokens))


def events(whole: Whole) -> list[str]:
    return [row["code"] for row in whole.rows("SELECT code FROM events WHERE kind = 'target' ORDER BY at")]


@pytest.mark.parametrize("told", [False, True])
def test_the_server_is_killed_and_returns_before_or_after_devices_are_told(
    whole: Whole, free_port: int, told: bool
) -> None:
    with inference_process(port=free_port) as server:
        with fleet(whole, server, away_s=0.5 if told else NEVER_S) as devices:
            texts = Texts(devices, coupled)
            texts.disturb(server.kill)
            if told:
                until(lambda: events(whole) == ["target-away"])
            with inference_process(port=free_port):
                done = texts.finish()
            assert [each_done.tokens for each_done in done] == wanted()
            assert {each_done.resumes > 0 for each_done in done} == {told}
        check_log(whole, done)
        assert events(whole) == (["target-away", "target-back"] if told else [])
