"""Folders and files of tensors: written whole, with checksums."""
