"""Output: what a run leaves in its folder, and what says that it is whole."""
