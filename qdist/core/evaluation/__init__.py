"""What is measured of a model, and how sure one can be of it."""
