"""Moves bytes between workers: connections, shared memory, and who is still there."""
