"""Inference servers under an edge: whether texts are exactly theirs, and what a step takes."""
