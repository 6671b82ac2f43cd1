"""The two errors that end in one line for the user."""


class UserError(ValueError):
    """A user's mistake: the command line prints the message as one line and exits with 2."""


class RunError(RuntimeError):
    """A failure that the message explains: the command line prints it as one line and exits with 1."""
