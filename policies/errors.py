"""The one exception that means "a person can fix this"."""


class UserError(ValueError):
    """Something a user asked for cannot be done: says what, where, the values, and what to do.

    Commands print its message without a traceback and exit with 2. Anything else that escapes is a bug and keeps its
    traceback.
    """
