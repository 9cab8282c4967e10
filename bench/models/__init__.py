"""Every causal language model of transformers, tiny and random."""
