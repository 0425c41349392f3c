"""A real Home Assistant with its integrations llama.cpp and Ollama, against a device with a scripted target.

Home Assistant needs a newer Python than ours, so `FLEET_HASS` names the command that starts one of release 2026.11 or
later: `/opt/hass/bin/hass` after `python3.14 -m venv /opt/hass && /opt/hass/bin/pip install homeassistant`. It installs
the requirements of its integrations itself. `FLEET_HASS_CONFIG` is an empty folder that this command can write.
"""

import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from broker_config.broker import Broker
from broker_config.processes import MosquittoProcess, reserved_port
from fleet_device.drafters.model_file import GgufModel
from tests.support.edge_thread import NO_QUOTAS
from tests.support.keys_file import keys_file
from tests.support.prepared_models import prepared
from tests.support.scripted_verifier import ScriptedVerifier
from tests.support.served_device import Served, device_at
from tests.support.thinking_model import CONTEXT, DONE, PARIS, STORY, Answers, Draft, ScriptedModel
from tests.support.waiting import PATIENCE_S, until
from tests.support.whole import FLEET, Whole

COMMAND = os.environ.get("FLEET_HASS", "")
pytestmark = [
    pytest.mark.broker,
    pytest.mark.models,
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        not COMMAND, reason="FLEET_HASS names no command of a Home Assistant; see the module's docstring"
    ),
]

KEY = "sesame"
CONFIGURATION = """\
homeassistant: {name: Home, unit_system: metric, country: DE, language: en}
http: {server_host: 127.0.0.1, server_port: %d}
api:
config:
conversation:
onboarding:
input_boolean: {lamp: {name: Switch of the lamp}}
template:
  - light:
      - name: Desk lamp
        unique_id: desk_lamp
        state: "{{ is_state('input_boolean.lamp', 'on') }}"
        turn_on: [{action: input_boolean.turn_on, target: {entity_id: input_boolean.lamp}}]
        turn_off: [{action: input_boolean.turn_off, target: {entity_id: input_boolean.lamp}}]
"""


class Home:
    """A Home Assistant, through the requests of its own pages."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def answers(self) -> bool:
        try:
            return self._http.get("/api/onboarding").status_code == 200
        except httpx.HTTPError:
            return False

    def log_in(self) -> None:
        client, person = "http://127.0.0.1/", {"name": "A", "username": "a", "password": "trial-only", "language": "en"}
        code = self.post("/api/onboarding/users", {**person, "client_id": client})["auth_code"]
        form = {"grant_type": "authorization_code", "code": code, "client_id": client}
        token = self._http.post("/auth/token", data=form).raise_for_status().json()["access_token"]
        self._http.headers["Authorization"] = f"Bearer {token}"

    def post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self._http.post(path, json=body)
        assert answer.is_success, answer.text
        return answer.json()

    def flow(self, path: str, handler: object, *answers: dict[str, Any]) -> dict[str, Any]:
        """Click through a dialogue; return its last state."""
        state = self.post(path, {"handler": handler})
        for answer in answers:
            assert state["type"] == "form", state
            state = self.post(f"{path}/{state['flow_id']}", answer)
        assert state["type"] == "create_entry", state
        return state  # type: ignore[no-any-return]

    def states(self) -> dict[str, str]:
        found = self._http.get("/api/states").raise_for_status().json()
        return {each["entity_id"]: each["state"] for each in found}

    def agent(self, before: dict[str, str]) -> str:
        """Return the conversation agent that has come since."""

        def new() -> list[str]:
            own = before.keys() | {"conversation.home_assistant"}
            return [name for name in self.states() if name.startswith("conversation.") and name not in own]

        until(lambda: bool(new()))
        return new()[0]

    def say(self, agent: str, text: str) -> str:
        answer = self.post("/api/conversation/process", {"text": text, "agent_id": agent, "language": "en"})
        response = answer["response"]
        assert response["response_type"] != "error", response
        return str(response["speech"]["plain"]["speech"])

    def light(self, *, on: bool) -> None:
        self.post(f"/api/services/light/turn_{'on' if on else 'off'}", {"entity_id": "light.desk_lamp"})


@pytest.fixture(scope="module")
def file() -> Iterator[GgufModel]:
    model = ScriptedModel(prepared("Q4_0.gguf"), vocabulary_only=True)
    yield model
    model.close()


@pytest.fixture(scope="module")
def script(file: GgufModel) -> Answers:
    return Answers(file)


@pytest.fixture(scope="module")
def whole(file: GgufModel, script: Answers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    verifier = ScriptedVerifier(script, file.strings, context=CONTEXT, end_tokens=file.end_tokens, name="big-model")
    with MosquittoProcess(Broker(fleet=FLEET)) as broker:
        yield Whole(broker.port, tmp_path_factory.mktemp("fleet"), verifier, {"quotas": NO_QUOTAS})


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    folder = Path(os.environ["FLEET_HASS_CONFIG"])
    with reserved_port() as port:
        (folder / "configuration.yaml").write_text(CONFIGURATION % port)
        url = f"http://127.0.0.1:{port}"
        with (
            subprocess.Popen(shlex.split(COMMAND), stdin=subprocess.DEVNULL) as process,
            httpx.Client(base_url=url, timeout=PATIENCE_S) as http,
        ):
            try:
                home = Home(http)
                until(lambda: home.answers() or process.poll() is not None)
                assert process.poll() is None, "Home Assistant has ended; its output says why"
                home.log_in()
                yield home
            finally:
                process.terminate()


def add_llama_cpp(home: Home, served: Served) -> str:
    before = home.states()
    flow = "/api/config/config_entries/flow"
    home.flow(flow, "llama_cpp", {"base_url": served.url, "api_key": KEY}, {"chat_model": "big-model"})
    return home.agent(before)


def add_ollama(home: Home, served: Served) -> str:
    before = home.states()
    flow = "/api/config/config_entries"
    access = {"url": served.url.removesuffix("/v1"), "api_key": KEY}
    entry = home.flow(f"{flow}/flow", "ollama", access)["result"]["entry_id"]
    options = {"name": "Ollama", "model": "big-model", "llm_hass_api": ["assist"], "think": True}
    home.flow(f"{flow}/subentries/flow", [entry, "conversation"], options)
    return home.agent(before)


@pytest.mark.parametrize("add", [add_llama_cpp, add_ollama])
def test_a_question_a_light_and_an_edge_that_goes_away(
    home: Home, whole: Whole, script: Answers, file: GgufModel, add: Callable[[Home, Served], str]
) -> None:
    with ExitStack() as edge:
        edge.enter_context(whole.edge())
        keys = keys_file(whole.folder, KEY)
        with (
            device_at(whole, Draft(file), max_new_tokens=2000, applications=keys) as served,
            ThreadPoolExecutor() as thread,
        ):
            agent = add(home, served)
            assert home.say(agent, "What is the capital of France?") == PARIS  # without the thinking

            home.light(on=False)
            assert home.say(agent, "Please make the desk lamp shine") == DONE
            assert home.states()["light.desk_lamp"] == "on"

            script.reached_cut.clear()
            resumed = _resumed(whole)
            story = thread.submit(home.say, agent, "Tell me a story")
            assert script.reached_cut.wait(PATIENCE_S)
            edge.close()
            assert not story.done()
            edge.enter_context(whole.edge())
            assert story.result(PATIENCE_S) == STORY
            until(lambda: _resumed(whole) == resumed + 1)


def _resumed(whole: Whole) -> int:
    [row] = whole.rows("SELECT count(*) AS n FROM segments WHERE resumed_tokens > 0")
    return int(row["n"])
