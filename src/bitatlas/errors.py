"""The one error that a user's mistake raises, and one line for what the system says against a file."""

from __future__ import annotations

import errno

CANNOT_BE_USED = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR,
    errno.ENOENT,
)  # fmt: skip
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAKE_ROOM = "free some space and run the same command again (a survey: with --resume, which keeps what was measured)"


class UserError(Exception):
    """Wrong use or an impossible request. The message is one line that names the flag or file and what would be right."""


def file_trouble(error: OSError) -> str | None:
    """Return one line about a file or a disk that cannot be used; None for an error of another kind."""
    if error.errno not in CANNOT_BE_USED:
        return None
    line = f"{error.filename or 'a file'}: {(error.strerror or 'cannot be used').lower()}"
    return f"{line}; {MAKE_ROOM}" if error.errno in FULL else line
