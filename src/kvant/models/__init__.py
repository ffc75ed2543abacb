"""One generic decoder; families differ by data."""
