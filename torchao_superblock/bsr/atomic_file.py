"""A file that is replaced in one step: after a crash, a full disk or a kill it is the old one or the new one."""

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file under another name next to it, and rename it once it is complete and on the disk.

    A file that is replaced keeps its mode, and its owner where that is allowed; a new one gets what `open` gives. A
    symbolic link stays, what it points to is replaced. Drafts that killed processes left behind are removed.

    Args:
        path: the file to write.

    Yields:
        The draft, open for writing at any position.

    Raises:
        FileNotFoundError: the directory does not exist.
        OSError: the path is not that of a regular file, or the system's error.
    """
    target = os.path.realpath(path)
    directory, name = os.path.split(target)
    try:
        status = os.stat(target)
    except FileNotFoundError:
        status = None
        if not os.path.isdir(directory):
            raise FileNotFoundError(errno.ENOENT, "its directory does not exist", target) from None
    if status is not None and not stat.S_ISREG(status.st_mode):
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
        raise OSError(errno.EINVAL, "it exists and is not a regular file", target)
    # A hash, since a name may have as many bytes as the file system allows.
    prefix = f".save_bsr-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}-"
    _remove_stale(directory, prefix)
    # Nobody may read the draft of a private file, not even while it is empty.
    file = None
    try:
        file = _create(directory, prefix, 0o666 if status is None else 0o600)
        draft = file.name
        with file:
            if status is not None:
                if hasattr(os, "chown"):
                    with suppress(OSError):
                        os.chown(draft, status.st_uid, status.st_gid)
                os.chmod(draft, stat.S_IMODE(status.st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # which does not rename open files
                file.close()
            os.replace(draft, target)
    except BaseException:
        if file is not None:
            with suppress(FileNotFoundError):
                os.unlink(file.name)
        raise
    with suppress(OSError):  # not every system can sync a directory
        entry = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)


def _create(directory: str, prefix: str, mode: int) -> BinaryIO:
    """A new draft, locked for as long as its writer lives."""
    while True:
        draft = os.path.join(directory, f"{prefix}{secrets.token_hex(4)}.part")
        file = None
        try:
            file = open(draft, "xb", opener=lambda path, flags: os.open(path, flags, mode))
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            if fcntl is None or os.fstat(file.fileno()).st_nlink:
                return file
            file.close()  # before it was locked, another process took it for a stale one
        except BaseException:
            if file is not None:
                with suppress(FileNotFoundError):
                    os.unlink(draft)
            raise


def _remove_stale(directory: str, prefix: str) -> None:
    """Remove the drafts that no living process holds."""
    for entry in os.listdir(directory):
        if not entry.startswith(prefix):
            continue
        draft = os.path.join(directory, entry)
        with suppress(OSError):  # locked, so somebody writes it; or gone, or not ours to remove
            if fcntl is None:
                os.unlink(draft)  # Windows refuses while it is open
                continue
            with open(draft, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(draft)
