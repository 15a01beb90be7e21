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
    """Run a script's main function; a UserError becomes one line and exit code 2. Under torchrun rank 0 prints."""
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            tqdm.write(f"error: {error}", file=sys.stderr)  # on a line of its own, also where a progress bar is drawn
            sys.stderr.flush()
        else:
            time.sleep(1)  # torchrun ends all processes when one has ended: rank 0 must have printed by then
        sys.exit(2)
