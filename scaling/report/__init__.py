"""Pages, pictures and files for people and programs."""
