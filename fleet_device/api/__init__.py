"""Local HTTP API for applications on the device: OpenAI's, so that its clients work unchanged."""
