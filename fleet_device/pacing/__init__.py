"""Pacing: choose between edge-only decoding, drafting and drafting ahead, and the draft length."""
