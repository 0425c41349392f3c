"""Rendering: the texts of the files that a broker and its machine read, each from the one description."""
