"""Local HTTP API, by which applications on the device write texts: OpenAI's, so that its clients work unchanged."""
