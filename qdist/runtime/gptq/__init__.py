"""GPTQ checkpoints: their bits, their files, and making them."""
