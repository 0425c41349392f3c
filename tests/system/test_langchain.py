from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.served_device import Served, served_device
from tests.system.test_openai_client import LENGTH, expected

pytestmark = [pytest.mark.broker]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_device(tmp_path_factory.mktemp("served")) as served:
        yield served


def model(served: Served, **given: Any) -> Any:
    fixed = {"base_url": served.url, "api_key": "unused", "model": "fleet", "seed": 5, "max_tokens": LENGTH}
    langchain_openai = pytest.importorskip("langchain_openai")  # takes a second of each worker that collects it
    return langchain_openai.ChatOpenAI(**fixed, extra_body={"mode": "coupled", "top_k": 20}, **given)


def test_a_chat_and_its_usage(served: Served) -> None:
    answer = model(served).invoke("t1 t2 t3")
    assert answer.content == expected(5)
    assert answer.usage_metadata["output_tokens"] == LENGTH


def test_a_stream(served: Served) -> None:
    pieces = [piece.content for piece in model(served).stream("t1 t2 t3")]
    assert "".join(pieces) == expected(5)
    assert sum(map(bool, pieces)) > 1
