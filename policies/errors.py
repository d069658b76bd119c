"""The exceptions that are not bugs: a person can fix it, or a check did not hold."""


class UserError(ValueError):
    """Something a user asked for cannot be done: says what, where, the values, and what to do.

    Commands print its message without a traceback and exit with 2. Anything else that escapes is a bug and keeps its
    traceback.
    """


class CheckFailed(RuntimeError):
    """A check of the running job did not hold: says which, where, on which ranks, and what to do.

    Not a user's mistake, and nothing that a traceback of ours would explain: commands print its message without one
    and exit with 1.
    """


DONE, CHECK_FAILED, BAD_INPUT, CRASHED = 0, 1, 2, 70  # exit codes of the commands
MOST_SHOWN = 60  # problems in one message


def shortened(problems: list[str]) -> list[str]:
    """Return as many of them as a person may read: a checkpoint of another model can lack a thousand tensors."""
    more = len(problems) - MOST_SHOWN
    return [*problems[:MOST_SHOWN], f"and {more} more"] if more > 0 else problems
