"""The device's API as other projects' conformance tests judge it, with the real models."""

import importlib.resources
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from benchmarks.schemas import ask_all
from broker_config.broker import Broker
from broker_config.processes import MosquittoProcess
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_edge.verifiers.torch_engine.verifier import TorchVerifier
from tests.support.edge_thread import NO_QUOTAS
from tests.support.one_thread import OnOneThread
from tests.support.prepared_models import prepared
from tests.support.served_device import Served, device_at
from tests.support.whole import FLEET, Whole

pytestmark = [pytest.mark.broker, pytest.mark.models, pytest.mark.exhaustive]

UNSUPPORTED = {"chat-image-input", "image-input", "chat-reasoning-summary", "reasoning-summary"}
OPTIONS = {"context": 2048, "max_new_tokens": 1500, "mode": "coupled", "seed": 1}  # the same answers in each run


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, verifier: TorchVerifier) -> Iterator[Served]:
    loading = LlamaCppSettings(path=prepared("Q4_0.gguf"), threads=1, context=2048)
    drafter = OnOneThread(lambda: LlamaCppDrafter(loading))
    with MosquittoProcess(Broker(fleet=FLEET)) as broker:
        whole = Whole(broker.port, tmp_path_factory.mktemp("conformance"), verifier, {"quotas": NO_QUOTAS})
        with whole.edge(), device_at(whole, drafter, **OPTIONS) as served:
            yield served


@pytest.mark.parametrize("form", ["openai-chat", "open-responses"])
def test_llm_comply(served: Served, form: str) -> None:
    pytest.importorskip("llm_comply")
    command = [sys.executable, "-m", "llm_comply.cli", "-u", served.url, "-k", "unused", "-m", "fleet"]
    done = subprocess.run([*command, "--format", form, "--json"], capture_output=True, text=True, check=False)
    results = json.loads(done.stdout)["results"]
    print("\n".join(f"{each['id']} {each['status']} {each.get('errors', '')}" for each in results))
    passed = {each["id"] for each in results if each["status"] == "passed"}
    assert {each["id"] for each in results} - passed <= UNSUPPORTED
    assert len(passed) >= 7


def test_compatcanary(served: Served) -> None:
    program = shutil.which("compatcanary")
    if program is None:
        pytest.skip("npm install --global compatcanary")
    model = httpx.get(f"{served.url}/models").json()["data"][0]["id"]
    command = [program, "scan", "--base-url", served.url, "--model", model, "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    print(json.dumps(report["results"], indent=1))
    assert report["score"] == 100


def test_schemas_of_check_jsonschema(served: Served) -> None:
    pytest.importorskip("check_jsonschema")
    folder = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    texts = {file.name: file.read_text() for file in folder.iterdir() if file.name.endswith(".json")}
    schemas = {name: json.loads(text) for name, text in texts.items() if len(text) < 1 << 18}
    answers = ask_all(served.url, schemas, clients=8, tokens=200)
    print("\n".join(map(str, answers)))
    assert {answer.outcome for answer in answers} <= {"valid", "truncated", "refused"}
    assert len([answer for answer in answers if answer.outcome != "refused"]) >= 7
