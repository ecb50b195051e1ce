"""Every number in the README has the command here that made it."""
