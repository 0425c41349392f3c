"""Texts: generation on request, queue, stop strings, chat templates."""
