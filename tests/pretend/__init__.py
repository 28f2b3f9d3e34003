"""A GPU made of Python, for a build of torch that has none."""
