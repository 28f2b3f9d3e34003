"""Calibrated rounding, pass 1: codes of a decoder layer at a time, chosen by what a text makes of its inputs."""
