"""The ops as PyTorch's transforms see them."""
