"""People's choices between two images: the files that they are kept in."""
