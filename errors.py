"""What a user's mistake looks like: one line on standard error and exit code 2, never a traceback.

Raise `UserError` with what was given, what is allowed and what to do. What the machine refuses (a full disk, a missing
permission) is told in one line too. Anything else that is raised is a bug of ours and keeps its traceback.
`python -X dev train.py ...` shows the traceback of everything.
"""

import errno
import os
import select
import sys
import time
from collections.abc import Callable
from difflib import get_close_matches

from tqdm import tqdm

# errno of an OSError that is no bug of ours -> what to do about it.
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
                    "what was finished is kept: make room and run the same command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give a place that may be read and written"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP,
                     errno.ENAMETOOLONG), "give another path"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files: ulimit -n"),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ENOTCONN),
                    "look at the disk or its mount, then run the same command again"),
}
INTERRUPTED, NOBODY_READS = 130, 141  # exit codes of a shell for SIGINT and SIGPIPE


class UserError(ValueError):
    """A mistake in what the user gave: a flag, a config file, a data folder, a checkpoint."""


def nearest(name: str, allowed) -> str:
    """"; did you mean 'NAME'?" with the allowed name closest to `name`, or nothing where none is close."""
    match = get_close_matches(name, list(allowed), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def run(main: Callable[[], None]) -> None:
    """Run a script's main function; a UserError becomes one line and exit code 2, also under torchrun.

    torchrun ends all processes soon after one has ended. So rank 0 speaks at once, and another rank only if it is
    still there after three seconds: then the mistake was seen by that rank alone.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a path may hold bytes that are no text, and a terminal may lack a letter
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()  # what cannot be written is told here, not at the interpreter's end
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # all ranks get it
            tell("interrupted")
        sys.exit(INTERRUPTED)
    except (UserError, MemoryError, OSError) as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            sys.exit(NOBODY_READS)
        text = one_line(error)
        if text is None or sys.flags.dev_mode:
            raise
        if (rank := os.environ.get("RANK", "0")) != "0":
            time.sleep(3)
        tell(f"error{f' (rank {rank})' if rank != '0' else ''}: {text}")
        sys.exit(2)
    finally:
        silence()


def one_line(error: Exception) -> str | None:
    """What to say instead of a traceback; None for an OSError that may be a bug of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"out of memory ({str(error) or 'no more to be had'}); make the batch, the model or --workers smaller"
    if error.errno not in REMEDIES or error.errno == errno.ENOENT and not error.filename:
        return None
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
    return f"{where}{error.strerror}; {REMEDIES[error.errno]}"


def tell(line: str) -> None:
    """A line of its own on standard error, also where a bar is drawn."""
    try:
        tqdm.write(line, file=sys.stderr)
        if sys.stderr:
            sys.stderr.flush()
    except OSError:  # nobody reads it
        pass


def nobody_reads() -> bool:
    """Whether the program that output is piped into has ended, as `head` does."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        try:
            poll.register(stream, 0)
        except (ValueError, OSError, TypeError):  # closed, or none at all
            continue
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def silence() -> None:
    """Let what standard output still holds and nobody takes go, or the interpreter's end would print a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
