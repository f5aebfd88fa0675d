"""What to run: one file a study."""
