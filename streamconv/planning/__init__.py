"""Planning: options and headers become a plan of every byte, before a weight is read."""
