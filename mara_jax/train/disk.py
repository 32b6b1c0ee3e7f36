"""A full disk, or a folder that is gone, in one line. Python, Orbax and TensorStore each say it in their own way."""

import contextlib
import errno
import os
import pathlib
import re
from collections.abc import Iterator

from mara_jax.parallel import hosts

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: a limit on the size of files
_NAMES = {os.strerror(code): (os.strerror(code), errno.errorcode[code]) for code in _FULL}


def reason(error: BaseException | None) -> str | None:
    """The system's words where an error, or one that it came from, says that a file found no room; else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return os.strerror(error.errno)
        for words, names in _NAMES.items():
            if any(name in str(error) for name in names):
                return words
        error = error.__cause__ or error.__context__
    return None


def gone(error: BaseException, workdir: pathlib.Path) -> pathlib.Path | None:
    """The outermost folder of a run that is not there any more, where that is why a file could not be written."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        return None
    quoted = re.search(r"'([^']+)'", str(error))  # pyarrow names the file in its words alone
    name = error.filename or (quoted.group(1) if quoted else "")
    path, top = pathlib.Path(os.path.abspath(os.fsdecode(name))), pathlib.Path(os.path.abspath(workdir))
    inside = [folder for folder in reversed(path.parents) if folder == top or top in folder.parents]
    return next((folder for folder in inside if not folder.is_dir()), None)


@contextlib.contextmanager
def one_line(workdir: pathlib.Path) -> Iterator[None]:
    """Turns an error for lack of room, or for a folder that is gone, into a ValueError of one line.

    Others pass unchanged.
    """
    try:
        yield
    except hosts.SharedError:
        raise  # reported by the process that met it
    except Exception as error:
        words, lost = reason(error), gone(error, workdir)
        if lost is not None:
            raise ValueError(
                f"{lost} is gone: put it back (is its disk mounted?), and give the same command again"
            ) from error
        if words is None:
            raise
        place = getattr(error, "filename", None) or workdir
        raise ValueError(
            f"no space left to write {place} ({words}): free some, and give the same command again"
        ) from error
