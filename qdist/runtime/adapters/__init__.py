"""What is trained: a file a method."""
