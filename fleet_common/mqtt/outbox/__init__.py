"""Outbox: what waits to be sent or answered, in which order it goes, and how large it is."""
