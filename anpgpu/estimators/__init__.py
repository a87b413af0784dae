"""How a gradient is estimated."""
