"""stub until the real one arrives"""
import torch
def top_k(logits, k):
    order = torch.sort(logits, dim=-1, descending=True, stable=True)
    return order.values[:, :k], order.indices[:, :k]
