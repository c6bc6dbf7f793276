"""The one exception for mistakes a user can mend, shown as a message, never as a traceback; and what a full disk looks like."""

import errno
import os
from pickle import UnpicklingError

UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    EOFError,
    UnpicklingError,
)  # weights that are damaged, or more than weights

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """A wrong option, a missing or damaged file. The message names the key, the value and what is allowed."""


def why_unreadable(error: Exception) -> str:
    """Say in a line why weights could not be read. What torch says of a pickle is advice to run whatever code it holds."""
    if isinstance(error, UnpicklingError):
        return (
            "they are pickled and hold more than tensors, or are damaged; that is never run: save "
            "them as safetensors"
        )
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Give the first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def out_of_room(error: BaseException) -> str | None:
    """Say why nothing more can be written, if that is what `error` comes from: every library has an error of its own for it."""
    found: BaseException | None = error
    while found is not None:
        for number in FULL:
            reason = os.strerror(number)
            if (isinstance(found, OSError) and found.errno == number) or reason in str(found):
                return reason
        found = found.__cause__ or found.__context__
    return None
