"""What each adapter method counts and refuses: one file a method."""
