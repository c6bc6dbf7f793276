"""The one exception for mistakes a user can mend: shown as a message, never as a traceback."""


class UserError(Exception):
    """A wrong option, a missing or damaged file. The message names the key, the value and what is allowed."""
