"""Fuzzing of everything that a stranger's or a damaged file can say: guided by coverage, and aware of structure."""
