"""Requests: prompts, queue, stop strings, chat templates."""
