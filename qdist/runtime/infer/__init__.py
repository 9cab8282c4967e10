"""Using a model: loading, answering, chatting."""
