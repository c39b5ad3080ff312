"""Which entries of a batch are the best: exact selection that never writes out all that it looks at."""
