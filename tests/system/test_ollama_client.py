from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.served_device import Served, served_device
from tests.system.test_openai_client import LENGTH, expected
from tests.system.test_reaching_the_api import applications

ollama = pytest.importorskip("ollama")

pytestmark = [pytest.mark.broker]

CHAT: Any = {"model": "fleet", "messages": [{"role": "user", "content": "t1 t2 t3"}]}
SAME: Any = {"options": {"seed": 5, "num_predict": LENGTH, "top_k": 20}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_device(tmp_path_factory.mktemp("served"), mode="coupled") as served:
        yield served


def test_a_chat_whole_and_streamed(served: Served) -> None:
    with closing(ollama.Client(host=served.url.removesuffix("/v1"))) as client:
        ask(client)


def ask(client: Any) -> None:
    whole = client.chat(**CHAT, **SAME)
    assert whole.message.content == expected(5)
    assert (whole.done, whole.done_reason, whole.eval_count) == (True, "length", LENGTH)
    pieces = [part.message.content for part in client.chat(**CHAT, **SAME, stream=True)]
    assert "".join(pieces) == expected(5)
    assert len(pieces) > 2
    assert client.generate(model="fleet", prompt="t1 t2 t3", **SAME).response == expected(5)
    assert [each.model for each in client.list().models] == ["scripted-target"]
    assert [each.model for each in client.ps().models] == ["scripted-target"]
    assert "tools" in client.show("fleet").capabilities
    with pytest.raises(ollama.ResponseError, match="other"):
        client.show("other")
    with pytest.raises(ollama.ResponseError, match="mirostat"):
        client.chat(**CHAT, options={"mirostat": 2})


def test_over_a_socket_with_a_key(tmp_path: Path) -> None:
    file, key = applications(tmp_path)
    path = tmp_path / "api.sock"
    with served_device(tmp_path, api_listen=str(path), applications=file):

        def client_with(word: str) -> Any:
            headers = {"Authorization": f"Bearer {word}"}
            return ollama.Client(host="http://fleet", transport=httpx.HTTPTransport(uds=str(path)), headers=headers)

        with closing(client_with(key)) as client:
            assert client.chat(**CHAT, **SAME).done
        with closing(client_with("wrong")) as client, pytest.raises(ollama.ResponseError) as caught:
            client.list()
    assert caught.value.status_code == 401
