"""Capacity planning: what an edge holds, whether drafting pays there, and what a fleet needs."""
