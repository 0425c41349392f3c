"""The API from another network namespace, as from a container or another machine, and over a Unix socket.

A cable joins this namespace with another one; that needs root and ip.
"""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fleet_device.applications import Application, ApplicationsFile, new_key
from tests.support.served_device import Served, served_device
from tests.support.tls_fleet import of_server
from tests.system.test_firewall import ip
from tests.system.test_openai_client import ASKED, COUPLED, LENGTH, MESSAGES, expected

pytestmark = [pytest.mark.broker]

HERE, THERE = "198.51.100.1", "198.51.100.2"
NAME = "gateway-7.test"
BODY = json.dumps({"model": "fleet", "messages": MESSAGES, "max_tokens": LENGTH, "seed": 5, **COUPLED})
OPENAI = """
import json, sys
from openai import OpenAI
client = OpenAI(base_url=sys.argv[1], api_key=sys.argv[2], max_retries=0, timeout=240.0)
stream = client.chat.completions.create(**json.loads(sys.argv[3]), stream=True)
print("".join(chunk.choices[0].delta.content or "" for chunk in stream), end="")
"""


def applications(folder: Path) -> tuple[Path, str]:
    """Return a file of applications, and the key of its only one."""
    file = ApplicationsFile(folder / "applications.json")
    key, digest = new_key()
    with file.changing() as known:
        known.append(Application(name="house", sha256=digest))
    return file.path, key


def curl(*words: str, key: str | None) -> tuple[int, Any]:
    """Return the command of a chat request by curl."""
    command = [*words, "-sS", "--max-time", "60", "-w", "\\n%{http_code}", "-H", "Content-Type: application/json"]
    command += ["-d", BODY] if key is None else ["-d", BODY, "-H", f"Authorization: Bearer {key}"]
    body, _, status = subprocess.run(command, capture_output=True, text=True, check=True).stdout.rpartition("\n")
    return int(status), json.loads(body)


def content(answer: tuple[int, Any]) -> str:
    status, body = answer
    assert status == 200
    return str(body["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def apart() -> Iterator[list[str]]:
    """Words that run a command in the other namespace."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs root and ip")
    name = f"api-{uuid.uuid4().hex[:8]}"
    with ExitStack() as stack:
        try:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
            ip("link", "add", name, "type", "veth", "peer", "name", "cable", "netns", name)
            stack.callback(ip, "link", "delete", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr!r}")
        ip("address", "add", f"{HERE}/30", "dev", name)
        ip("link", "set", name, "up")
        ip("-n", name, "address", "add", f"{THERE}/30", "dev", "cable")
        ip("-n", name, "link", "set", "cable", "up")
        yield ["ip", "netns", "exec", name]


def test_another_namespace_reaches_the_api_with_a_key(apart: list[str], tmp_path: Path) -> None:
    file, key = applications(tmp_path)
    with served_device(tmp_path, api_listen=f"{HERE}:0", applications=file, api_hosts=NAME) as served:
        url = f"{served.url}/chat/completions"
        assert content(curl(*apart, "curl", url, key=key)) == expected(5)
        for wrong in (None, "wrong"):
            status, body = curl(*apart, "curl", url, key=wrong)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        port = url.split(":")[2].partition("/")[0]
        named = ["--resolve", f"*:{port}:{HERE}"]
        by_name = curl(*apart, "curl", *named, url.replace(HERE, NAME), key=key)
        assert content(by_name) == expected(5)
        status, body = curl(*apart, "curl", *named, url.replace(HERE, "evil.test"), key=key)
        assert (status, body["error"]["code"]) == (421, "wrong_host")
        program = [*apart, sys.executable, "-c", OPENAI, served.url, key, json.dumps(ASKED)]
        assert subprocess.run(program, capture_output=True, text=True, check=True).stdout == expected(5)


def test_another_namespace_reaches_it_over_tls(apart: list[str], tmp_path: Path) -> None:
    file, key = applications(tmp_path)
    certificate, authority = of_server(tmp_path, HERE)
    with served_device(tmp_path, api_listen=f"{HERE}:0", applications=file, api_certificate=certificate) as served:
        assert served.url.startswith("https://")
        trusting = ["--cacert", str(authority)]
        assert content(curl(*apart, "curl", *trusting, f"{served.url}/chat/completions", key=key)) == expected(5)


@pytest.fixture(scope="module")
def over_socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path, str]]:
    folder = tmp_path_factory.mktemp("socket")
    file, key = applications(folder)
    path = folder / "api.sock"
    with served_device(folder, api_listen=str(path), applications=file) as served:
        yield served, path, key


def test_curl_uses_the_socket_with_a_key(over_socket: tuple[Served, Path, str]) -> None:
    _, path, key = over_socket
    words = ["curl", "--unix-socket", str(path), "http://fleet/v1/chat/completions"]
    assert content(curl(*words, key=key)) == expected(5)
    status, body = curl(*words, key=None)
    assert (status, body["error"]["code"]) == (401, "invalid_api_key")


def test_openai_uses_the_socket_with_a_key(over_socket: tuple[Served, Path, str]) -> None:
    _, path, key = over_socket
    http: Any = httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=240.0)
    with openai.OpenAI(base_url="http://fleet/v1", api_key=key, http_client=http, max_retries=0) as client:
        stream = client.chat.completions.create(**ASKED, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected(5)
    http = httpx.Client(transport=httpx.HTTPTransport(uds=str(path)))
    with (
        openai.OpenAI(base_url="http://fleet/v1", api_key="wrong", http_client=http, max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
