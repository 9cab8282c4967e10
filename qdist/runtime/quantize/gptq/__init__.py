"""Creating and checking GPTQ checkpoints."""
