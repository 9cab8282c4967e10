"""A server that answers in OpenAI's protocol, and its page."""
