"""Capacity of an edge, by this system and by what else there is."""
