"""Errors that a user can mend: one line, no stack trace."""


class UserError(Exception):
    """A user's mistake: what is wrong, where, and what to do, in one line (exit code 2)."""
