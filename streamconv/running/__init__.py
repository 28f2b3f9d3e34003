"""Running: a plan carried out, cell by cell and tile by tile."""
