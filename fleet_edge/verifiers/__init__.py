"""Verifiers: the target model behind one small interface."""
