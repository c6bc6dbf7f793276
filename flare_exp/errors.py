"""Define the exception for mistakes of a user, and describe errors in one line.

The exception is shown as a message, never as a traceback.
"""

import errno
import os
from pickle import UnpicklingError

# errors of loading weights that are damaged, or that hold more than weights
UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    EOFError,
    UnpicklingError,
)

# errors of a full disk, a quota or a limit of the file size
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Error for a wrong option, or a missing or damaged file.

    The message names the key, the value and what is allowed.
    """


def why_unreadable(error: Exception) -> str:
    """Return in one line why weights could not be read.

    torch's own message about a pickle is not used: it advises to run whatever code the file holds.
    """
    if isinstance(error, UnpicklingError):
        return (
            "they are pickled and hold more than tensors, or are damaged; that is never run: save "
            "them as safetensors"
        )
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def out_of_room(error: BaseException) -> str | None:
    """Return the reason why nothing more can be written, or None if `error` has another cause.

    Every library raises its own error for a full disk, so causes and messages are searched.
    """
    found: BaseException | None = error
    while found is not None:
        for number in FULL:
            reason = os.strerror(number)
            if (isinstance(found, OSError) and found.errno == number) or reason in str(found):
                return reason
        found = found.__cause__ or found.__context__
    return None
