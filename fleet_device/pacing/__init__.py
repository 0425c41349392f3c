"""Pacing: how many tokens to draft, and whether to draft ahead of the verdict."""
