"""Codes chosen by what goes through a model: decoder layer by decoder layer, one of them in memory."""
