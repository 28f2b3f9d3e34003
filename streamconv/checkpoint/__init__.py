"""Safetensors files as one set of named tensors: read by range, written in file order."""
