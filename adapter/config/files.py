"""A user's files: regular ones, of a size that fits what they are to hold. No fifo is waited for, no device read."""

from __future__ import annotations

import errno
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO


def open_regular(path: Path, most: int | None = None) -> BinaryIO:
    """Open a regular file of at most `most` bytes for reading. Raises OSError, or ValueError for a path with NUL."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # non-blocking: opening a fifo would wait for ever
    try:
        facts = os.fstat(fd)
        if stat.S_ISDIR(facts.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if most is not None and facts.st_size > most:
            raise OSError(errno.EFBIG, f"it has {facts.st_size} bytes, and at most {most} are expected here", str(path))
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_text(path: Path, most: int, encoding: str = "utf-8") -> str:
    """The text of a regular file of at most `most` bytes. Raises OSError or ValueError."""
    with open_regular(path, most) as stream:
        return stream.read().decode(encoding)


def finite(value: Any) -> Any:
    """The same with what JSON has no word for as text: "inf", "nan"."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
