"""The frozen backbone: packed linears, skeleton, weights."""
