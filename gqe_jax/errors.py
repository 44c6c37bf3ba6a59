"""Errors that a user can mend."""


class UserError(Exception):
    """A command, a configuration or a file is wrong, and the message says how to mend it."""


class DataError(UserError, ValueError):
    """A corpus, its source or its tokenizer cannot be used."""
