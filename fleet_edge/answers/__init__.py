"""Answers: replies and verdicts of an edge are made, counted, published and recorded in one place."""
