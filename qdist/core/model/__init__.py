"""What a model is, as data: shapes, storage, names."""
