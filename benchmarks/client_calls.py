"""Calls of one client library to a device's API: `python client_calls.py LIBRARY URL`; prints JSON, results by feature.

It runs in an environment of that library and imports nothing of this project. A result is empty, or says what failed.
"""

import asyncio
import importlib
import json
import sys
from collections.abc import Callable
from enum import Enum
from typing import Any

from pydantic import BaseModel

ASKED = "The pump runs hot. What is its state?"
MESSAGES: list[Any] = [{"role": "user", "content": ASKED}]


class State(Enum):
    NORMAL = "normal"
    HOT = "hot"


class Reading(BaseModel):
    """State of a pump."""

    state: State
    alarm: bool


def read_pump(pump: State) -> str:
    """Return the temperature of a pump."""
    return f"{pump}: 80 degrees"


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "read_pump",
        "description": "Return the temperature of a pump.",
        "parameters": {
            "type": "object",
            "properties": {"pump": {"enum": ["normal", "hot"]}},
            "required": ["pump"],
            "additionalProperties": False,
        },
    },
}
SCHEMA: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {"name": "reading", "schema": Reading.model_json_schema()},
}
Calls = dict[str, Callable[[], object]]
FEATURES = ("chat", "async", "stream", "object", "tools")


def _tool_loop(create: Callable[..., Any]) -> str:
    """Let a tool be called, return its result, and return the answer; the client has OpenAI's shapes."""
    message = create(messages=MESSAGES, tools=[TOOL], tool_choice="required").choices[0].message
    (call,) = message.tool_calls
    result = read_pump(json.loads(call.function.arguments)["pump"])
    called = message.model_dump(exclude_none=True)
    answer = create(messages=[*MESSAGES, called, {"role": "tool", "tool_call_id": call.id, "content": result}])
    return str(answer.choices[0].message.content)


def of_openai(url: str) -> Calls:
    openai = importlib.import_module("openai")
    given = {"base_url": url, "api_key": "unused", "max_retries": 0}
    client, asked = openai.OpenAI(**given), {"model": "fleet", "max_tokens": 60}

    def create(**more: Any) -> Any:  # noqa: ANN401
        return client.chat.completions.create(**asked, **more)

    def stream() -> object:
        with client.chat.completions.stream(**asked, messages=MESSAGES) as events:
            return events.get_final_completion().choices[0].message.content

    return {
        "chat": lambda: create(messages=MESSAGES).choices[0].message.content,
        "async": lambda: asyncio.run(
            openai.AsyncOpenAI(**given).chat.completions.create(**asked, messages=MESSAGES)
        ).choices[0].message.content,
        "stream": stream,
        "object": lambda: client.chat.completions.parse(**asked, messages=MESSAGES, response_format=Reading)
        .choices[0].message.parsed.alarm in {True, False},
        "tools": lambda: _tool_loop(create),
    }  # fmt: skip


def of_langchain(url: str) -> Calls:
    model = importlib.import_module("langchain_openai").ChatOpenAI(
        base_url=url, api_key="unused", model="fleet", max_tokens=60, max_retries=0
    )
    messages = importlib.import_module("langchain_core.messages")

    def tools() -> object:
        called = model.bind_tools([TOOL], tool_choice="required").invoke(ASKED)
        (call,) = called.tool_calls
        result = messages.ToolMessage(read_pump(call["args"]["pump"]), tool_call_id=call["id"])
        return model.invoke([messages.HumanMessage(ASKED), called, result]).content

    return {
        "chat": lambda: model.invoke(ASKED).content,
        "async": lambda: asyncio.run(model.ainvoke(ASKED)).content,
        "stream": lambda: "".join(chunk.content for chunk in model.stream(ASKED)),
        "object": lambda: isinstance(model.with_structured_output(Reading).invoke(ASKED), Reading),
        "tools": tools,
    }


def of_llama_index(url: str) -> Calls:
    like = importlib.import_module("llama_index.llms.openai_like")
    core = importlib.import_module("llama_index.core.llms")
    functions = importlib.import_module("llama_index.core.tools")
    given = {"is_chat_model": True, "is_function_calling_model": True, "max_tokens": 60, "max_retries": 0}
    model = like.OpenAILike(model="fleet", api_base=url, api_key="unused", **given)
    structured = like.OpenAILike(
        model="fleet", api_base=url, api_key="unused", should_use_structured_outputs=True, **given
    )
    messages = [core.ChatMessage(role="user", content=ASKED)]

    def tools() -> object:
        tool = functions.FunctionTool.from_defaults(read_pump)
        return model.predict_and_call([tool], ASKED, tool_required=True).response

    return {
        "chat": lambda: model.chat(messages).message.content,
        "async": lambda: asyncio.run(model.achat(messages)).message.content,
        "stream": lambda: "".join(chunk.delta or "" for chunk in model.stream_chat(messages)),
        "object": lambda: isinstance(structured.as_structured_llm(Reading).chat(messages).raw, Reading),
        "tools": tools,
    }


def of_litellm(url: str) -> Calls:
    litellm = importlib.import_module("litellm")
    given = {"model": "openai/fleet", "api_base": url, "api_key": "unused", "max_tokens": 60, "num_retries": 0}

    def create(**more: Any) -> Any:  # noqa: ANN401
        return litellm.completion(**given, **more)

    return {
        "chat": lambda: create(messages=MESSAGES).choices[0].message.content,
        "async": lambda: asyncio.run(litellm.acompletion(**given, messages=MESSAGES)).choices[0].message.content,
        "stream": lambda: "".join(
            chunk.choices[0].delta.content or "" for chunk in create(messages=MESSAGES, stream=True)
        ),
        "object": lambda: Reading.model_validate_json(
            create(messages=MESSAGES, response_format=SCHEMA).choices[0].message.content
        ).alarm in {True, False},
        "tools": lambda: _tool_loop(create),
    }  # fmt: skip


def main() -> None:
    of, url = globals()[f"of_{sys.argv[1]}"], sys.argv[2]
    results = {}
    for name, call in of(url).items():
        try:
            results[name] = "" if call() else "no result"
        except Exception as error:  # noqa: BLE001 - reported in the table
            results[name] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
