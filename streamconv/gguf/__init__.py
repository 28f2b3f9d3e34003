"""Models as GGUF files have them: names of tensors, hyperparameters, tokenizers."""
