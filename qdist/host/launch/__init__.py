"""From a spec to running ranks."""
