"""Errors that are told in one line, without a stack trace; exit codes."""

FINISHED, FAILED, USER_ERROR, STOPPED = 0, 1, 2, 75


class UserError(Exception):
    """A user's mistake: what is wrong, where, and what to do, in one line (exit code 2)."""


class RunFailed(Exception):
    """A run that cannot go on, for a reason that one line tells (exit code 1)."""
