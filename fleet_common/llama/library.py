"""Loader of llama.cpp's native library: once, silent.

The library logs through one callback for the whole process. Ours keeps the last complaints, for the sentence
that an error ends in, and hands everything to Python's logging at debug level.
"""

import ctypes
import functools
import logging
from collections import deque
from typing import Any, Final

from fleet_common.llama.errors import LlamaError

_ERROR = 4
_log = logging.getLogger("fleet_common.llama_cpp")
_complaints: Final[deque[str]] = deque(maxlen=16)


@functools.cache
def library() -> Any:  # noqa: ANN401 - the binding is untyped
    """Return the module `llama_cpp`, its native logging redirected.

    Raises:
        LlamaError: It is not installed, or is too old.
    """
    try:
        import llama_cpp  # noqa: PLC0415 - what does without llama.cpp may lack it
    except ImportError:
        raise LlamaError(
            "Drafting, and an edge's engine llama.cpp, need llama-cpp-python; install it with: "
            "pip install 'dssd-fleet[device]'"
        ) from None
    if not hasattr(llama_cpp, "LLAMA_FLASH_ATTN_TYPE_ENABLED"):
        # An older structure would take our settings silently and use none of them.
        raise LlamaError(
            f"llama-cpp-python {llama_cpp.__version__} is too old; upgrade it with: "
            "pip install -U 'llama-cpp-python>=0.3.30'"
        )
    # The callback must outlive the library's use of it: the module holds it.
    llama_cpp.fleet_log_callback = llama_cpp.llama_log_callback(_on_log)
    llama_cpp.llama_log_set(llama_cpp.fleet_log_callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def native_reason() -> str:
    """Return what the library complained of first since the last call, or a word in its place."""
    reason = _complaints[0] if _complaints else "no reason given"
    _complaints.clear()
    return reason.rstrip(".")


def _on_log(level: int, text: bytes, _data: object) -> None:
    line = text.decode("utf-8", "replace").strip()
    if not line:
        return
    _log.debug("%s", line)
    if level == _ERROR:
        # The name of the function that complains says nothing to the reader.
        _complaints.append(line.split(": ", 1)[-1].removeprefix("error loading model: "))
