"""The algorithms, one file each, and the two bases that they share."""
