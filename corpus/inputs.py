"""Which files the input is: nothing is left out without a word, and nothing is taken twice.

Folders are searched through links, as in the cache of the Hugging Face hub, where every file is a
link. Names that begin with a dot are no part of a corpus: .ipynb_checkpoints has copies of files,
and macOS puts ._a.jsonl beside a.jsonl.
"""

import errno
import fnmatch
import glob
import hashlib
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cli import UserError

SUFFIXES = (
    ".jsonl",
    ".jsonl.zst",
    ".jsonl.gz",
    ".json",
    ".json.zst",
    ".json.gz",
    ".parquet",
)
NAMES_SHOWN = 5  # of the files that are left out for one reason
# Why something is left out
OTHER_ENDING = "with another ending"
DOT_NAME = "whose name begins with a dot"
NO_FILE = "that is a pipe, a socket or a device"
EMPTY = "of 0 bytes"
# How the text of a file begins that stands for another file -> (whose it is, how to get that file)
POINTERS = {
    b"version https://git-lfs.github.com/spec/": ("Git-LFS", "git lfs pull"),
    b"/annex/objects/": ("git-annex", "git annex get"),
}
POINTER_BYTES = 1024  # a pointer is smaller
COMPARED = 1 << 16  # bytes at either end of files of one size


def suffix_of(name: str) -> str | None:
    """Which of SUFFIXES a name ends in, in small or capital letters; None if in none."""
    name = name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


# Finding


class Listing(NamedTuple):
    """What was found in a folder."""

    files: list[Path]  # those with documents, by name
    left_out: dict[str, list[Path]]  # the others, and those of 0 bytes, by reason


def list_files(root: Path) -> Listing:
    """The files with documents in a folder, links followed, or the file itself."""
    files: list[Path] = []
    left_out: dict[str, list[Path]] = {}
    first_names: dict[tuple[int, int], Path] = {}  # (device, inode) of each folder
    todo: list[tuple[Path, tuple]] = [(root, ())]  # path, (device, inode) of the folders around it
    while todo:
        path, around = todo.pop()
        status = read_status(path)
        if not stat.S_ISDIR(status.st_mode):
            reason = why_left_out(path, status)
            if reason:
                left_out.setdefault(reason, []).append(path)
            if reason in (None, EMPTY):
                files.append(path)
            continue
        identity = (status.st_dev, status.st_ino)
        if identity in around:
            continue  # a link to a folder that is being listed: all of it is found without the link
        if identity in first_names:  # reading it again could take forever, and gives the same
            first = first_names[identity]
            below = [file.relative_to(first) for file in files if file.is_relative_to(first)]
            files += [path / name for name in below]
            continue
        first_names[identity] = path
        for name in reversed(names_in(path)):
            if name.startswith("."):
                left_out.setdefault(DOT_NAME, []).append(path / name)
            else:
                todo.append((path / name, (*around, identity)))
    return Listing(sorted(files), left_out)


def why_left_out(path: Path, status: os.stat_result) -> str | None:
    if not stat.S_ISREG(status.st_mode):
        return NO_FILE
    if not suffix_of(path.name):
        return OTHER_ENDING
    if status.st_size == 0:
        return EMPTY
    return None


def expand(pattern: str) -> list[Path]:
    """The paths that match a glob pattern. Python's glob would skip folders it may not read."""
    anchor = Path(pattern).anchor
    found = [Path(anchor)]
    for part in Path(pattern).relative_to(anchor).parts:
        matches = []
        for path in found:
            if part == "**":
                matches += folders_below(path)
            elif glob.has_magic(part):
                matches += matching(path, part)
            elif os.path.lexists(path / part):
                matches.append(path / part)
        found = matches
    if pattern.endswith("/"):
        found = [path for path in found if is_folder(path)]
    return sorted(set(found), key=str)


def matching(folder: Path, pattern: str) -> list[Path]:
    """What a folder holds whose name matches; names that begin with a dot must be asked for."""
    if not is_folder(folder):
        return []
    names = fnmatch.filter(names_in(folder), pattern)
    return [folder / name for name in names if pattern.startswith(".") or name[0] != "."]


def folders_below(folder: Path) -> list[Path]:
    """A folder and all folders in it, links followed, each once."""
    seen = set()
    found = []
    todo = [folder]
    while todo:
        path = todo.pop()
        if not is_folder(path):
            continue
        status = read_status(path)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        found.append(path)
        todo += [path / name for name in names_in(path) if not name.startswith(".")]
    return found


def is_there(path: str) -> bool:
    """Whether a path exists, be it a link to nothing; UserError if that may not be known."""
    try:
        os.lstat(path)
    except PermissionError as error:
        raise unreadable(path, error) from None
    except (OSError, ValueError):  # ValueError: a character that no name may have
        return False
    return True


def is_folder(path: Path) -> bool:
    """Whether a path leads to a folder; UserError if that may not be known."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False  # a link to nothing
        raise unreadable(path, error) from None


def read_status(path: Path) -> os.stat_result:
    """os.stat of a path, of its target if it is a link; UserError if it cannot be read."""
    try:
        return os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from None


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; UserError if it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error) from None


def unreadable(path: str | Path, error: OSError) -> UserError:
    if isinstance(error, PermissionError):
        reason = "no permission to read it"
    elif error.errno == errno.ENOENT and os.path.islink(path):
        reason = f"it is a link to {os.readlink(path)}, which is not there"
    else:
        reason = f"it cannot be read ({error.strerror})"
    return UserError(f"--input {path}: {reason}; mend or remove it, or give other paths")


def describe(left_out: dict[str, list[Path]]) -> str:
    """ "2 with other endings (a.txt, b.md); 1 with ...", for messages."""
    texts = []
    for reason, paths in left_out.items():
        names = ", ".join(map(str, paths[:NAMES_SHOWN]))
        more = len(paths) - NAMES_SHOWN
        if more > 0:
            names += f" and {more:,} more"
        texts.append(f"{len(paths):,} {reason} ({names})")
    return "; ".join(texts)


# Checking


def refuse_twice(paths: list[Path]) -> None:
    """UserError if two files have the same documents, as far as their names and links tell."""
    with ThreadPoolExecutor(16) as pool:  # a network's file system takes milliseconds per file
        statuses = list(pool.map(read_status, paths))
    snapshots: dict[Path, Path] = {}
    stems: dict[str, Path] = {}
    identities: dict[tuple[int, int], Path] = {}
    for path, status in zip(paths, statuses, strict=True):
        snapshot = snapshot_of(path)
        if snapshot:
            first = snapshots.setdefault(snapshot.parent, snapshot)
            if first != snapshot:
                raise taken_twice(first, snapshot, "are two snapshots of one repository")
        absolute = os.path.abspath(path)
        suffix = suffix_of(path.name) or ""  # a dataset of the hub may have others
        first = stems.setdefault(absolute[: len(absolute) - len(suffix)], path)
        if first != path:
            raise taken_twice(first, path, "differ in their format only")
        first = identities.setdefault((status.st_dev, status.st_ino), path)
        if first != path and is_one_file(first, path, status):
            raise taken_twice(first, path, "are one file")


def is_one_file(first: Path, second: Path, status: os.stat_result) -> bool:
    """Whether two paths with the same device and inode lead to one file.

    Without links they do not: some network file systems make up numbers, which may be equal.
    """
    return status.st_nlink > 1 or os.path.realpath(first) == os.path.realpath(second)


def print_copies(paths: list[Path]) -> None:
    """Say which files seem to be copies of others. This is allowed, to give some text more weight.

    Compared are the sizes, and of equal ones the beginnings and ends.
    """
    by_size: dict[int, list[Path]] = {}
    for path in paths:
        by_size.setdefault(path.stat().st_size, []).append(path)
    copies = []
    for size, alike in by_size.items():
        firsts: dict[bytes, Path] = {}
        for path in alike if size and len(alike) > 1 else []:
            first = firsts.setdefault(hash_ends(path, size), path)
            if first != path:
                copies.append(f"{path} of {first}")
    if copies:
        more = f" and {len(copies) - NAMES_SHOWN:,} more" if len(copies) > NAMES_SHOWN else ""
        print(
            f"copies, by size, beginning and end: {', '.join(copies[:NAMES_SHOWN])}{more}; "
            "--dedup drops documents that come twice"
        )


def hash_ends(path: Path, size: int) -> bytes:
    """A hash of the first and last bytes of a file."""
    try:
        with open(path, "rb") as file:
            beginning = file.read(COMPARED)
            file.seek(max(0, size - COMPARED))
            return hashlib.blake2b(beginning + file.read(COMPARED), digest_size=16).digest()
    except OSError as error:
        raise unreadable(path, error) from None


def snapshot_of(path: Path) -> Path | None:
    """The folder snapshots/COMMIT of the hub's cache that a file is in; None if it is in none."""
    for folder in Path(os.path.abspath(path)).parents:
        if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name):
            return folder
    return None


def taken_twice(first: Path, second: Path, what: str) -> UserError:
    return UserError(
        f"{first} and {second} {what}, so their documents would be taken twice; "
        "move or rename one of them, or give only the files that are to be read"
    )


def refuse_pointer(path: Path, size: int) -> None:
    """UserError if a file only stands for data that was not downloaded."""
    if size > POINTER_BYTES:
        return
    with open(path, "rb") as file:
        beginning = file.read(POINTER_BYTES)
    for words, (owner, remedy) in POINTERS.items():
        if beginning.startswith(words):
            raise UserError(f"{path}: a {owner} pointer, not the data itself; get it: {remedy}")
