"""Making and checking GPTQ checkpoints."""
