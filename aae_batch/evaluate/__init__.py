"""Is the guidance working? Pictures are scored, and methods compared."""
