"""The lock on a run's folder: one run at a time writes there. Readers need none."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator

# The first is locked by the system, which gives it back when its process ends, however it ends. The second stands for
# it where a file system knows no locks: there its existence is the lock.
FILE, NAMED = "lock", "lock.owner"
_TAKEN = {errno.EACCES, errno.EAGAIN}
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_SECONDS = 0.5  # after which a lock that was taken over from a dead process must still be ours


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the folder and holds its lock; at the end the lock is gone, and so is a folder where nothing was written.

    A lock that a killed process has left behind is taken over.

    Raises:
      ValueError: one line, if another run holds it.
    """
    workdir = workdir.absolute()
    missing = [path for path in (workdir, *workdir.parents) if not path.exists()]
    descriptor = None
    try:
        descriptor = _locked(workdir)
        yield
    finally:
        if descriptor is not None:
            for name in (FILE, NAMED):
                (workdir / name).unlink(missing_ok=True)
            os.close(descriptor)
        with contextlib.suppress(OSError):  # not empty
            for path in missing:
                path.rmdir()


def _locked(workdir: pathlib.Path) -> int:
    """A descriptor of the locked file."""
    while True:
        workdir.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(workdir / FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # another run was refused just now, and took its empty folder away
        try:
            if _take(descriptor, workdir):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _take(descriptor: int, workdir: pathlib.Path) -> bool:
    """Locks the file; False where its holder has removed it meanwhile."""
    path = workdir / FILE
    try:
        # Not flock: its locks outlive a killed run in children that a reward function may have forked.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            raise _in_use(workdir, _holder(path), "") from None
        if error.errno not in _NO_LOCKS_HERE:
            raise
        _take_by_name(workdir)
        return True
    if not _is_file(descriptor, path):
        return False
    os.ftruncate(descriptor, 0)
    os.write(descriptor, _me())
    return True


def _is_file(descriptor: int, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _take_by_name(workdir: pathlib.Path) -> None:
    """Makes the file that stands for the lock; that of a process of this host that has ended is replaced."""
    path, taken_over = workdir / NAMED, False
    while True:
        try:
            with path.open("xb") as file:
                file.write(_me())
            break
        except FileExistsError:
            if not _has_ended(_holder(path)):
                raise _in_use(workdir, _holder(path), f", or, if that run has ended, delete {path}") from None
            path.unlink(missing_ok=True)
            taken_over = True
    if taken_over:
        time.sleep(_SECONDS)  # two may have seen the dead process; the second has replaced the file of the first
        if path.read_bytes() != _me():
            raise _in_use(workdir, _holder(path), f", or, if that run has ended, delete {path}")


def _me() -> bytes:
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(_STARTED))
    return (json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": started}) + "\n").encode()


_STARTED = time.time()


def _holder(path: pathlib.Path) -> dict:
    """What the lock's file says of who holds it; empty where it is being written."""
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _has_ended(holder: dict) -> bool:
    """Whether it is certain that this process has ended: one of this host that is not there any more."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return pid == os.getpid()  # an earlier process had our number


def _in_use(workdir: pathlib.Path, holder: dict, otherwise: str) -> ValueError:
    names = ("pid", "host", "since")
    who = "process {} on {}, since {}".format(*map(holder.get, names)) if holder else "which is just starting"
    return ValueError(
        f"workdir {workdir} is in use by another run ({who}): wait until it ends, choose another --workdir{otherwise}"
    )
