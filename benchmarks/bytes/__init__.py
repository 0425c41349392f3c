"""Bytes: what each system sends for a token of text, as payload, as packets, over TLS and over TCP/IP."""

from typing import TYPE_CHECKING

from fleet_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from benchmarks.bytes.command import main

__all__ = ["main"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, {"main": "benchmarks.bytes.command"})
