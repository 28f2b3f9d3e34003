"""A model's forward pass with one decoder layer in memory at a time; transformers supplies the maths."""
