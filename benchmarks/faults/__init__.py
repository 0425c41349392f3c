"""Faults of every kind in a fleet that writes: what becomes of texts and session log, and how soon they go on."""
