"""What can go wrong, in words a user can act on."""

from __future__ import annotations


class AvtrainError(Exception):
    """A problem that ends the command: one line saying what is wrong and what to do."""
