"""What a user's mistake looks like: one line on standard error and exit code 2, never a traceback.

Raise `UserError` with what was given, what is allowed and what to do. Anything else that is raised is a bug of ours
and keeps its traceback.
"""

import os
import sys
import time
from collections.abc import Callable
from difflib import get_close_matches

from tqdm import tqdm


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
    try:
        main()
    except UserError as error:
        if (rank := os.environ.get("RANK", "0")) != "0":
            time.sleep(3)
        where = f" (rank {rank})" if rank != "0" else ""
        tqdm.write(f"error{where}: {error}", file=sys.stderr)  # on a line of its own, also where a bar is drawn
        sys.stderr.flush()
        sys.exit(2)
