import ast
import json
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.exactness.cases import LENGTH, law
from benchmarks.exactness.system import FLEET
from broker_config.broker import Broker
from broker_config.processes import MosquittoProcess
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import BrokerSettings
from fleet_device.client.agent import Agent
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.pacing.contract import FixedPacing
from fleet_device.requests.generate import GenerateRequest
from sampling.downlink import FormName
from schemas.policy import Mode
from tests.support.brokers import StartBroker
from tests.support.processes import toy_edge_process
from tests.support.statistics import ALARM, p_value
from tests.support.toy_devices import PATIENT, PATIENT_OUTAGES
from tests.support.toy_pair import END_TOKENS, PROMPT, ToyPair, policy
from tests.support.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
FILES = ("reference_client.py", "reference_formulas.py", "reference_link.py")
MAX_LINES = 150
TEXTS = 600

Cases = list[dict[str, Any]]


@pytest.fixture
def formulas(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import reference_formulas  # noqa: PLC0415 - found by the line above

    return reference_formulas


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import reference_link  # noqa: PLC0415 - likewise

    return reference_link


def vectors(name: str, part: str) -> Cases:
    found = json.loads((ROOT / "docs" / "vectors" / f"{name}.json").read_text(encoding="utf-8"))
    return list(found[part]["cases"])


def spread(ids: list[int], values: list[Any]) -> dict[int, Any]:
    return dict(zip(ids, values, strict=True))


@pytest.mark.parametrize("name", FILES)
def test_it_is_short_and_imports_nothing_of_ours(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    packages = {module.partition(".")[0] for module in imported} - set(sys.stdlib_module_names)
    assert packages <= {"cbor2", "numpy", "paho", "reference_formulas", "reference_link"}


def test_its_random_numbers_are_those_of_the_vectors(formulas: Any) -> None:
    for case in vectors("random-numbers", "uniforms"):
        found = formulas.uniform(case["seed"], case["position"], case["purpose"], case["index"])
        assert found == case["uniform"] == case["k"] / 2**53
    for case in vectors("random-numbers", "noises"):
        found = [formulas.gumbel(case["seed"], case["position"], token) for token in case["tokens"]]
        assert found == pytest.approx(case["noise"], rel=1e-12)


def test_its_distributions_are_those_of_the_vectors(formulas: Any) -> None:
    for case in vectors("distributions", "shapes"):
        logits = [-np.inf if logit is None else logit for logit in case["logits"]]
        if "prompt" in case:
            logits = formulas.adjust(logits, case, case["prompt"], case["generated"], case["end_tokens"])
        with np.errstate(over="ignore"):
            found = formulas.shape(logits, case)
        assert list(found) == case["ids"], case["name"]
        assert list(found.values()) == pytest.approx(case["probs"], rel=1e-12), case["name"]
    for case in vectors("distributions", "quantizations"):
        found = formulas.quantize(spread(case["ids"], case["probs"]))
        assert list(found.items()) == list(spread(case["q_ids"], case["counts"]).items()), case["name"]


def test_it_draws_what_the_vectors_say(formulas: Any, link: Any) -> None:
    for case in vectors("device", "drafts"):
        counts = spread(case["q_ids"], case["counts"])
        token = formulas.invert(counts, formulas.uniform(case["seed"], case["position"], formulas.DRAFT))
        assert (token, counts[token]) == (case["token"], case["count"])
    for case in vectors("device", "corrections"):
        form = link.read("", bytes.fromhex("84000000" + case["form"]))["next"]
        counts = spread(case["q_ids"], case["counts"])
        tried = form[1] if form[0] == 2 else 0
        assert formulas.correct(form, counts, case["seed"], case["position"], tried) == case["token"], case["name"]
    for case in vectors("device", "couplings"):
        probs = spread(case["ids"], case["probs"])
        assert formulas.couple(probs, case["seed"], case["position"]) == case["token"]


def test_samples_that_were_looked_at_and_unknown_forms_are_refused(formulas: Any) -> None:
    for form in ([2, 0, [1], [0.5]], [9, b""]):
        with pytest.raises(ValueError, match=f"{form[0]}"):
            formulas.correct(form, {1: 65536}, 1, 0, 3)


def test_its_digests_and_fingerprints_are_those_of_the_vectors(formulas: Any) -> None:
    for case in vectors("identity", "digests"):
        assert formulas.digest(case["tokens"]) == case["digest"]
    for case in vectors("identity", "vocabularies"):
        assert formulas.fingerprint(case["tokens"]).hex() == case["fingerprint"]
        assert len(case["tokens"]) == case["size"]


def test_it_reads_every_message_that_comes_down(link: Any) -> None:
    kinds = set()
    for case in vectors("messages", "messages"):
        name, fields = case["name"], case["fields"]
        if name.startswith(("verdict", "opened", "refused", "fault", "closed")):
            found = link.read("down", bytes.fromhex(case["hex"]))
            kinds.add(name.split(":")[0])
            for key in ("handle", "round", "accepted", "finish", "kind", "code", "action", "end_tokens", "retry_s"):
                if fields.get(key) is not None and key in found:
                    assert found[key] == fields[key], (name, key)
    assert kinds == {"verdict", "opened", "refused", "fault", "closed"}


class AnsweringBroker:
    def __init__(self, heard: "queue.Queue[dict[str, Any]]", replies: list[list[dict[str, Any]]]) -> None:
        self.heard, self.replies, self.published = heard, replies, 0

    def publish(self, _topic: str, _payload: bytes, *, qos: int) -> None:
        assert qos == 1
        self.published += 1
        for reply in self.replies.pop(0):
            self.heard.put(reply)


OURS = {"session": b"12345678", "attempt": 1, "handle": 7}
OPENED = {"kind": "opened"} | OURS
LATER = {"kind": "refused", "session": OURS["session"], "code": "over-quota", "sentence": "Later.", "retry_s": 0.1}


def asked(link: Any, topic: str, *replies: list[dict[str, Any]]) -> tuple[Any, int]:
    asking = object.__new__(link.ReferenceLink)
    asking.root, asking.ours, asking.heard = "dssd/v1/home/d/", dict(OURS), queue.Queue()
    asking.mqtt = AnsweringBroker(asking.heard, list(replies))
    return asking.ask(topic, [], OPENED, again_s=60.0), asking.mqtt.published


def test_it_asks_again_when_that_is_worth_it(link: Any) -> None:
    waiting = {
        "kind": "fault",
        "handle": 7,
        "action": "wait",
        "code": "over-quota",
        "sentence": "Wait.",
        "retry_s": 0.1,
    }
    for first in (LATER, waiting, {"kind": "connected"}):
        assert asked(link, "up/open", [first], [OPENED]) == (OPENED, 2)


@pytest.mark.parametrize(
    "other",
    [
        LATER | {"session": b"87654321", "code": "busy"},
        OPENED | {"attempt": 0},
        {"kind": "fault", "handle": 6, "action": "give-up", "code": "counts", "sentence": "No."},
        {"kind": "closed", "session": OURS["session"], "attempt": 0},
        {"edge": "edge-2", "presence": "offline"},
        {"kind": "newer"},
        {},
    ],
)
def test_what_concerns_others_changes_nothing(link: Any, other: dict[str, Any]) -> None:
    assert asked(link, "up/draft/edge-1", [other, OPENED]) == (OPENED, 1)


@pytest.mark.parametrize(
    "lost",
    [
        {"kind": "fault", "handle": 7, "action": "resume", "code": "tokens-differ", "sentence": "Another text."},
        {"kind": "closed", "session": OURS["session"], "attempt": 1, "reason": "lost"},
        {"edge": "edge-1", "presence": "offline"},
        {"kind": "nobody"},
    ],
)
def test_a_lost_session_is_opened_again(link: Any, lost: dict[str, Any]) -> None:
    with pytest.raises(link.SessionLostError):
        asked(link, "up/draft/edge-1", [lost])


def test_a_fault_of_a_draft_is_no_verdict_on_it(link: Any) -> None:
    """An edge of the same name that has restarted does not know the session, and names its handle and the round."""
    import reference_client  # noqa: PLC0415 - found by the fixture

    fault = {"kind": "fault", "handle": 7, "round": 0, "action": "resume", "code": "unknown", "sentence": "Open it."}
    text = reference_client.Text(object.__new__(link.ReferenceLink), {}, [1], 4)
    text.link.root, text.link.ours, text.link.heard = "dssd/v1/home/d/", dict(OURS), queue.Queue()
    text.link.mqtt = AnsweringBroker(text.link.heard, [[fault]])
    with pytest.raises(link.SessionLostError):
        text.judge({"handle": 7, "edge": "edge-1"}, 0, [2], None)


@pytest.mark.parametrize(
    "end",
    [
        LATER | {"code": "vocabulary-mismatch", "retry_s": None},
        LATER | {"code": "unheard-of", "retry_s": None},
        {"kind": "fault", "action": "give-up", "code": "over-quota", "sentence": "Later.", "retry_s": 10.0},
        {"kind": "fault", "handle": 7, "action": "unheard-of", "code": "other", "sentence": "Later."},
    ],
)
def test_what_ends_a_text_is_told(link: Any, end: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Later\."):
        asked(link, "up/open", [{key: value for key, value in end.items() if value is not None}])


def toy_edge(
    broker: MosquittoProcess, form: FormName = FormName.AUTO
) -> AbstractContextManager["subprocess.Popen[str]"]:
    return toy_edge_process(broker.port, FLEET, "--form", form.value)


@contextmanager
def client(
    broker: MosquittoProcess, folder: Path, mode: Mode, *, texts: int, tokens: int, seed: int, name: str = "stranger"
) -> Iterator["subprocess.Popen[str]"]:
    """Run the client in a folder where nothing of ours can be imported by accident."""
    (folder / "vocabulary.json").write_text(json.dumps(ToyPair.standard().target.words))
    asked = policy(mode, seed)
    flags = {
        "port": broker.port, "fleet": FLEET, "device": name, "mode": mode.value, "seed": seed, "texts": texts,
        "tokens": tokens, "temperature": asked.temperature, "top-k": asked.top_k, "top-p": asked.top_p,
    }  # fmt: skip
    arguments = [f"--{flag}={value}" for flag, value in flags.items()]
    process = subprocess.Popen(
        [
            sys.executable,
            EXAMPLES / "reference_client.py",
            "vocabulary.json",
            *arguments,
            "--prompt",
            *map(str, PROMPT),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def texts_of(process: "subprocess.Popen[str]") -> list[list[int]]:
    out, complaint = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, complaint
    return [json.loads(line)["tokens"] for line in out.splitlines()]


def our_texts(broker: MosquittoProcess, *, seeds: range, tokens: int) -> list[list[int]]:
    """Return coupled outputs of our own device, which has another draft model."""
    pair = ToyPair.standard()
    drafter = ScriptedDrafter(pair.draft, pair.draft.words, end_tokens=END_TOKENS)
    link = PahoLink(BrokerSettings(port=broker.port).link(FLEET, "ours", will=None))
    agent = Agent(link, FLEET, "ours", drafter, FixedPacing(3), time.monotonic, PATIENT)
    agent.attach()
    link.start(timeout_s=PATIENCE_S)
    try:
        written = [
            agent.generate(
                GenerateRequest(
                    PROMPT, policy=policy(Mode.COUPLED, seed), max_new_tokens=tokens, outages=PATIENT_OUTAGES
                )
            ).tokens
            for seed in seeds
        ]
    finally:
        link.stop()
    return [list(text) for text in written]


@pytest.mark.broker
@pytest.mark.parametrize(
    ("mode", "form"),
    [
        (Mode.RESIDUAL, FormName.AUTO),
        pytest.param(Mode.RESIDUAL, FormName.SAMPLES, marks=pytest.mark.exhaustive),
        pytest.param(Mode.RESIDUAL, FormName.DENSE, marks=pytest.mark.exhaustive),
        # Each coupled output is compared with ours below.
        pytest.param(Mode.COUPLED, FormName.AUTO, marks=pytest.mark.exhaustive),
    ],
)
def test_its_texts_follow_the_target(mode: Mode, form: FormName, tmp_path: Path, start_mosquitto: StartBroker) -> None:
    # With fresh seeds a false alarm would occur once in 10,000 runs.
    broker = start_mosquitto(Broker(fleet=FLEET))
    with toy_edge(broker, form), client(broker, tmp_path, mode, texts=TEXTS, tokens=LENGTH, seed=1) as process:
        texts = texts_of(process)
    counts = np.zeros((ToyPair.standard().target.size,) * LENGTH, dtype=np.int64)
    for text in texts:
        counts[tuple(text) + (text[-1],) * (LENGTH - len(text))] += 1
    assert counts.sum() == TEXTS
    assert p_value(counts.ravel(), law(mode).ravel()) > ALARM


@pytest.mark.broker
def test_coupled_text_equals_ours_even_if_the_edge_dies(tmp_path: Path, start_mosquitto: StartBroker) -> None:
    broker = start_mosquitto(Broker(fleet=FLEET))
    with client_across_two_edges(broker, tmp_path) as (texts, cut):
        ours = our_texts(broker, seeds=range(7, 7 + len(texts)), tokens=40)
    assert 0 < cut < len(texts)
    assert texts == ours


@contextmanager
def client_across_two_edges(broker: MosquittoProcess, folder: Path) -> Iterator[tuple[list[list[int]], int]]:
    """Kill the edge under the client once it has written some texts; yield all, with another edge still there."""
    with toy_edge(broker) as first, client(broker, folder, Mode.COUPLED, texts=80, tokens=40, seed=7) as process:
        lines = [process.stdout.readline() for _ in range(20)]
        first.kill()
        with toy_edge(broker):
            lines_before = len(lines)
            lines += process.stdout  # not `communicate`, which loses what is buffered here
            assert process.wait(PATIENCE_S) == 0, process.stderr.read()
            texts = [json.loads(line)["tokens"] for line in lines]
            assert len(texts) == 80
            yield texts, lines_before


@pytest.mark.broker
def test_what_an_edge_refuses_is_its_sentence(tmp_path: Path, start_mosquitto: StartBroker) -> None:
    broker = start_mosquitto(Broker(fleet=FLEET))
    with toy_edge(broker), client(broker, tmp_path, Mode.COUPLED, texts=1, tokens=0, seed=1) as process:
        _, complaint = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert complaint == "max_new_tokens is 0; ask for at least one token.\n"
