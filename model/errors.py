"""The error a person can act on."""

from __future__ import annotations


class UserError(Exception):
    """One line that says what is wrong, where, and what to do; the command ends with exit code 2."""
