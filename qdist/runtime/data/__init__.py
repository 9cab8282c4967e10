"""From conversations to micro-batches of tokens."""
