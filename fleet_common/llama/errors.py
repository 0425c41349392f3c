"""Exceptions of llama.cpp's library and of GGUF files."""

from schemas.errors import FleetError


class LlamaError(FleetError):
    """llama.cpp is not installed, or a model file cannot be used. Its text is one sentence for the user."""
