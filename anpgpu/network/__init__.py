"""The network without gradients: cells, weights, the clean run of a stack of layers."""
