"""Files that are whole or absent, and a lock that keeps two writers out of one folder. No torch."""

import errno
import fcntl
import io
import os
import time
from pathlib import Path
from typing import IO

import numpy as np

from errors import UserError

# What a write raises where there is no room: the disk, a quota, or a limit on file size.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is either whole or absent (temporary name, fsync, rename)."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """write_bytes of a text."""
    write_bytes(path, text.encode())


def write_npy(path: Path, array: np.ndarray) -> None:
    """write_bytes of an array in NumPy's format."""
    content = io.BytesIO()
    np.save(content, array)
    write_bytes(path, content.getvalue())


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(path: Path, what: str, shared: bool = False, wait: float = 0.0) -> IO:
    """Hold a file's lock until the result is closed or the process ends; UserError if another holds it after `wait` s.

    what: says in the error what the other one is doing. shared: any number of holders, but none that is not shared.
    """
    file = open(path, "a")
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > until:
                file.close()
                raise UserError(f"{what} (it holds {path}); wait for it or stop it") from None
            time.sleep(0.1)
        except OSError:  # a file system without locks: better unlocked than not at all
            return file
