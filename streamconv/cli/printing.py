"""Printing: the one door to standard output and standard error."""

from __future__ import annotations

import click


def say(text: str, err: bool = False) -> None:
    """Print `text` as lines. Line breaks are the caller's; anything else that would steer a terminal is spelt out."""
    click.echo("\n".join(map(printable, text.split("\n"))), err=err)


def printable(text: str) -> str:
    """One line. Names come from files that anyone may have written: none may break it or steer the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
