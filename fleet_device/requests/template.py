"""Chat templates: programs by the author of a model's file, which make a prompt of the messages of a chat.

A template runs in Jinja's sandbox in a process of its own (see `template_worker`), sees only the messages and a few
helpers, and its time, memory and output are bounded.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final

from fleet_common.host import python_path
from fleet_device.drafters.contract import DrafterError
from fleet_device.requests.structured import ChatMessage, ToolCall

_MAX_TEMPLATE: Final = 1 << 18
_MAX_PROMPT: Final = 1 << 22
_PROGRAM: Final = "fleet_device.requests.template_worker"
_CPU_S: Final = 2.0
"""Processor time of a request: a real template takes some milliseconds."""

_MEMORY_MB: Final = 256
_WAIT_S: Final = 60.0
"""Time-out of a reply. It is long, since the worker limits its own processor time."""

_CHUNK: Final = 1 << 16


class ChatError(DrafterError):
    """The messages cannot be made into a prompt; one sentence for the user."""


class ChatTemplate:
    def __init__(
        self, source: str, *, bos: str = "", eos: str = "", now: Callable[[], datetime] = datetime.now
    ) -> None:
        if len(source) > _MAX_TEMPLATE:
            raise ChatError(f"The model's chat template has {len(source)} characters; refusing it.")
        self._source = source
        self._names = {"bos_token": bos, "eos_token": eos}
        self._now = now

    def render(self, messages: Sequence[ChatMessage], variables: Mapping[str, Any] = MappingProxyType({})) -> str:
        """Return the prompt, up to where the assistant begins; `variables` are further ones, as JSON has them.

        Raise ChatError if there are no messages, or the template cannot be read, fails, declines them, or takes too
        much time or memory.
        """
        if not messages:
            raise ChatError("A chat needs at least one message.")
        plain = [_fields(message) for message in messages]
        names = {**variables, **self._names, "messages": plain, "add_generation_prompt": True}
        request = {"source": self._source, "names": names, "now": self._now().isoformat(), "most": _MAX_PROMPT}
        match _worker.ask(request):
            case {"text": text}:
                return str(text)
            case {"declined": reason}:
                raise ChatError(f"The model's chat template declines these messages: {reason}.")
            case {"unreadable": reason}:
                raise ChatError(f"The model's chat template cannot be read: {reason}.")
            case {"failed": reason}:
                raise ChatError(f"The model's chat template fails: {reason}.")
            case _:
                raise ChatError(f"The chat gives a prompt of more than {_MAX_PROMPT} characters.")


def _fields(message: ChatMessage) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        fields["reasoning_content"] = fields["thinking"] = message.reasoning  # the latter is gpt-oss's
    if message.calls:
        fields["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": _arguments(call)}}
            for call in message.calls
        ]
    if message.role == "tool":
        fields["tool_call_id"] = message.call_id
    return fields


def _arguments(call: ToolCall) -> Any:  # noqa: ANN401 - JSON
    """Return the arguments as templates expect them, as an object; those that are none as they are."""
    try:
        return json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        return call.function.arguments


class _Worker:
    """The process that renders, started with the first request. Callable on any thread."""

    def __init__(self) -> None:
        self._one = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        """Return the reply to a request; raise ChatError if it takes too much time or memory."""
        line = json.dumps(request).encode() + b"\n"
        with self._one:
            if self._process is not None:
                reply = self._exchange(self._process, line)
                if reply is not None:
                    return reply
                if self._process.returncode == -signal.SIGPROF:
                    raise self._failure()
            # The first request, or the process was ended by something else than this request.
            self._process = _start()
            weakref.finalize(self, _stop, self._process)
            reply = self._exchange(self._process, line)
            if reply is None:
                raise self._failure()
            return reply

    def _exchange(self, process: "subprocess.Popen[bytes]", line: bytes) -> dict[str, str] | None:
        """Return a reply; None if the process has ended, or was ended because it did not answer."""
        assert process.stdin is not None
        assert process.stdout is not None
        received, deadline = bytearray(), time.monotonic() + _WAIT_S
        poll = select.poll()  # select() takes no descriptor above 1,023
        poll.register(process.stdout, select.POLLIN)
        try:
            process.stdin.write(line)
            process.stdin.flush()
            while not received.endswith(b"\n"):
                ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1e3)
                part = os.read(process.stdout.fileno(), _CHUNK) if ready else b""
                if not part:
                    break
                received += part
        except OSError:
            received.clear()
        if received.endswith(b"\n"):
            reply: dict[str, str] = json.loads(received)
            return reply
        _stop(process)
        return None

    def _failure(self) -> ChatError:
        self._process = None
        return ChatError(
            f"The model's chat template takes more than {_CPU_S:g} s of processor time or {_MEMORY_MB} MB of memory; "
            "use another file of the model."
        )


def _start() -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-P", "-m", _PROGRAM, str(_CPU_S), str(_MEMORY_MB)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": python_path()},
        start_new_session=True,
    )


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what was not written is lost
                pipe.close()


_worker: Final = _Worker()
