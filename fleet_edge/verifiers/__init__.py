"""Verifiers: the target model behind one small interface."""

import fleet_edge.openmp  # first: what follows may import torch

__all__ = ["fleet_edge"]
