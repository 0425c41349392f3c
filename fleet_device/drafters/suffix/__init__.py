"""Drafts from what has been written before: an index of it, its file, and the drafter over both."""
