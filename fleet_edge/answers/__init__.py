"""Replies and verdicts of an edge, on one path: made, counted, published and recorded."""
