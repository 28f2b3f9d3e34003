"""What a run tells afterwards: numbers for people and scripts, the manifest and the model card."""
