"""Errors that are the user's to mend."""

from __future__ import annotations


class UserError(Exception):
    """Something the user asked for cannot be done.

    The message says what is wrong, what was expected and how to mend it; the command line prints it on one line,
    without a traceback, and exits with code 2.
    """


class Preempted(Exception):
    """A run was asked to stop (SIGTERM, SIGINT) and saved its state; the same command goes on from there."""
