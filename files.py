"""Files that are whole or absent, and a lock that keeps two writers out of one folder.

This module imports no torch, so that the data preparation starts quickly.
"""

import errno
import fcntl
import io
import os
import time
from pathlib import Path
from typing import IO

import numpy as np

from cli import UserError

# What a write raises when there is no room: a full disk, a quota, or a limit on file size.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a file system without hard links raises.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
# What fsync raises on a file system that cannot do it for folders.
NO_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
# What flock raises on a file system without locks.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is either whole or absent (temporary name, fsync, rename)."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """write_bytes for text."""
    write_bytes(path, text.encode())


def write_npy(path: Path, array: np.ndarray) -> None:
    """write_bytes for an array, in NumPy's format."""
    content = io.BytesIO()
    np.save(content, array)
    write_bytes(path, content.getvalue())


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC or not os.path.isdir(path):
            raise
    finally:
        os.close(handle)


def lock(path: Path, what: str, shared: bool = False, wait: float = 0.0) -> IO:
    """Lock a file until the returned file object is closed or the process ends.

    Raises UserError if another process still has the lock after `wait` seconds.
    what: what that process is doing, for the error message.
    shared: allow other shared locks on the file, but no exclusive one.
    """
    file = open(path, "a")
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(file, mode | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise UserError(f"{what} (it holds {path}); wait for it or stop it") from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                raise
            if not shared:  # a folder has one exclusive lock and perhaps many shared ones
                print(
                    f"warning: {path}: its file system has no locks ({error.strerror}); two runs "
                    "in one folder are not detected there",
                    flush=True,
                )
            return file  # go on unlocked rather than not at all
