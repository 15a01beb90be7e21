"""Where documents come from: files, the Hugging Face hub or the synthetic sample.

The source is cut into segments: compressed files, byte ranges of a .jsonl, row groups of a .parquet
or shards of a hub dataset. After an interruption, a segment is read again from its start or not at
all. Segments depend only on the inputs, so the token shards do not depend on which worker reads
what.
"""

import glob
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.json
import pyarrow.parquet

from cli import UserError, nearest
from corpus import sample as sample_corpus
from corpus.manifest import DOMAINS, SET_NAMES, find_name_defect
from corpus.tokenizer import replace_surrogates

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")
CODECS = {".zst": "zstd", ".gz": "gzip"}
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
# Where no file name says the split, one document in 50 is for validation, by a hash of its text.
HELD_OUT = 50
# Bytes. A longer text stays UTF-8: as a str, a single emoji would make it four times as large.
LARGE = 16 << 20
Text = str | memoryview  # memoryview: the UTF-8 of a large document
STRING_SCALARS = (pyarrow.StringScalar, pyarrow.LargeStringScalar)


class Segment(NamedTuple):
    """A stretch of the source."""

    path: str  # a file; hub: the name of the source's split
    split: str | None  # the source's name; None: each document's, by a hash of its text
    start: int  # first byte (.jsonl), row group (.parquet) or shard (hub)
    stop: int | None  # one past the last; None: to the end
    size: int  # bytes on disk; 0 if unknown


class Schema(NamedTuple):
    """Where a record has its text and its domain; dots lead into nested fields."""

    text: str = "text"
    domain: str | None = "meta.redpajama_set_name"
    constant: str | None = None  # the domain of all documents, instead of a field


class Document(NamedTuple):
    text: Text
    utf8: bytes | memoryview
    domain: str
    split: str  # "train" or "val"
    kind: str  # the label meta.kind; "" for most data


class BadRecord(ValueError):
    """A record that is not a document: broken JSON, no text, or an unknown domain."""


def parse_schema(text: str | None) -> Schema:
    """--schema "text=FIELD,domain=FIELD" or "text=FIELD,constant=NAME"; UserError otherwise."""
    if text is None:
        return Schema()
    fields = {}
    parts = text.split(",")
    for part in parts:
        key, _, field = part.partition("=")
        if field:
            fields[key] = field
    if len(fields) < len(parts) or set(fields) not in ({"text", "domain"}, {"text", "constant"}):
        raise UserError(
            f"--schema {text}: expected text=FIELD,domain=FIELD or text=FIELD,constant=NAME"
        )
    schema = Schema(fields["text"], fields.get("domain"), fields.get("constant"))
    if schema.constant:
        defect = find_name_defect(schema.constant)
        if defect:
            raise UserError(
                f"--schema text={schema.text},constant={schema.constant!r:.120}: no name for a "
                f"domain ({defect}); choose another name"
            )
    return schema


# Finding files


def find_files(inputs: list[str]) -> list[tuple[Path, str | None]]:
    """(file, split) for files, folders and glob patterns, in a fixed order.

    The split is that in the file's name or in the name of a folder around it, else None.
    """
    # Each file once, however its path is written. Links are not followed: in the hub's cache, the
    # names are links to files that are called by their hashes.
    paths: dict[Path, Path] = {}  # absolute path -> path as given
    tops = []  # the given folders, and those of the given files
    for item in inputs:
        roots = [item] if os.path.exists(item) else sorted(glob.glob(item, recursive=True))
        if not roots:
            raise UserError(f"--input {item}: no such file or folder")
        for root in map(Path, roots):
            root_paths = list_files(root)
            if not root_paths and root == Path(item):
                raise UserError(f"--input {item}: no {', '.join(SUFFIXES)} there")
            for path in root_paths:
                paths[Path(os.path.abspath(path))] = path
            tops.append(os.path.abspath(root.parent if root.is_file() else root))
    if not paths:
        raise UserError(f"--input {' '.join(inputs)}: no {', '.join(SUFFIXES)} there")
    # Only folders from the one that holds all inputs downward can name a split. Those above it say
    # where the corpus happens to be stored, as /dev/shm does.
    top = Path(os.path.commonpath(tops))
    return [(path, find_split(absolute, top)) for absolute, path in paths.items()]


def list_files(root: Path) -> list[Path]:
    """The files with documents in a folder, or the file itself."""
    try:
        if root.is_file():
            paths = [root]
        else:
            if root.is_dir():
                os.listdir(root)  # rglob would silently find nothing where reading is not allowed
            paths = [path for path in sorted(root.rglob("*")) if path.is_file()]
    except PermissionError:
        raise UserError(f"--input {root}: no permission to read it") from None
    return [path for path in paths if path.name.endswith(SUFFIXES)]


def find_split(path: Path, top: Path) -> str | None:
    """ "train", "validation" or "test" if the file's name has such a word, else by its folders.

    A folder counts if its whole name is such a word and it is `top` or below.
    """
    match = re.search(rf"(?<![a-z])({'|'.join(SPLIT_NAMES)})(?![a-z])", path.name.lower())
    if match:
        return SPLIT_NAMES[match[1]]
    for folder in path.parents:
        if folder.is_relative_to(top) and folder.name.lower() in SPLIT_NAMES:
            return SPLIT_NAMES[folder.name.lower()]
    return None


# Cutting into segments


def file_segments(files: list[tuple[Path, str | None]], limit: int) -> list[Segment]:
    """The files in order; those above `limit` bytes in pieces, if the format allows it."""
    segments = []
    with ThreadPoolExecutor(16) as pool:  # a network's file system takes milliseconds per file
        for pieces in pool.map(partial(cut_file, limit=limit), files):
            segments += pieces
    return segments


def cut_file(file: tuple[Path, str | None], limit: int) -> list[Segment]:
    """The segments of one file."""
    path, split = file
    size = path.stat().st_size
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: no permission to read it")
    if size > limit and path.suffix == ".jsonl":
        segments = []
        for start in range(0, size, limit):
            stop = min(start + limit, size)
            segments.append(Segment(str(path), split, start, stop, stop - start))
        return segments
    if size > limit and path.suffix == ".parquet":
        return cut_parquet(path, split, limit)
    return [Segment(str(path), split, 0, None, size)]


def cut_parquet(path: Path, split: str | None, limit: int) -> list[Segment]:
    """The segments of a .parquet: row groups of together about `limit` bytes on disk."""
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            sizes = [row_group_size(table, i) for i in range(table.num_row_groups)]
    except (OSError, pyarrow.ArrowException) as error:
        raise damaged(path, error) from None
    segments = []
    start = size = 0
    for i, group_size in enumerate(sizes):
        size += group_size
        is_last = i + 1 == len(sizes)
        if is_last or size + sizes[i + 1] > limit:
            segments.append(Segment(str(path), split, start, i + 1, size))
            start = i + 1
            size = 0
    return segments


def row_group_size(table: pyarrow.parquet.ParquetFile, i: int) -> int:
    """Bytes on disk."""
    group = table.metadata.row_group(i)
    return sum(group.column(j).total_compressed_size for j in range(group.num_columns))


def hub_segments(dataset: str, revision: str | None, splits: list[str]) -> list[Segment]:
    """One segment for each file of the dataset's splits."""
    segments = []
    for split in splits:
        for i in range(hub_stream(dataset, revision, split).num_shards):
            segments.append(Segment(split, split, i, i + 1, 0))
    return segments


@lru_cache
def hub_stream(dataset: str, revision: str | None, split: str) -> Any:
    """A split of a dataset on the Hugging Face hub, or of a local folder laid out like one."""
    import datasets  # only here: it takes a second to import

    datasets.config.TORCH_AVAILABLE = False  # or a stream imports torch, which takes two more
    try:
        return datasets.load_dataset(dataset, split=split, revision=revision, streaming=True)
    except Exception as error:  # the library raises a dozen kinds for a hub that cannot be reached
        raise unreachable(dataset, error) from None


def unreachable(dataset: str, error: Exception) -> UserError:
    return UserError(
        f"cannot read {dataset!r} from the hub ({first_line(error)}); download its files elsewhere "
        "and use: --source files --input FOLDER"
    )


def damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: damaged or cut short ({first_line(error)})")


def first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__


# Reading a segment


def read(source: dict, segment: Segment) -> Iterator[tuple[int, int, Any]]:
    """(bytes of the segment read so far, number in the segment from 1, JSON line or record).

    In the order of the source. source: the manifest's entry of that name. Raises UserError if a
    file is damaged or may not be read.
    """
    if source["source"] == "sample":
        return read_sample(source["seed"])
    if source["source"] == "hub":
        return read_hub(source, segment)
    return read_file(source, segment)


def read_sample(seed: int) -> Iterator[tuple[int, int, dict]]:
    position = 0
    for number, (split, record) in enumerate(sample_corpus.documents(seed), start=1):
        position += len(record["text"])
        yield position, number, {**record, "split": split}


def read_hub(source: dict, segment: Segment) -> Iterator[tuple[int, int, dict]]:
    stream = hub_stream(source["dataset"], source["revision"], segment.path)
    shard = stream.shard(num_shards=stream.num_shards, index=segment.start)
    try:
        for number, record in enumerate(shard, start=1):
            yield 0, number, record
    except Exception as error:  # any kind, as in hub_stream
        raise unreachable(source["dataset"], error) from None


def read_file(source: dict, segment: Segment) -> Iterator[tuple[int, int, bytes | dict]]:
    path = Path(segment.path)
    try:
        with open(path, "rb") as file:
            if path.suffix == ".parquet":
                schema = Schema(*source["schema"])
                yield from read_parquet(path, file, segment, schema)
            else:
                yield from read_lines(path, file, segment)
    except PermissionError:
        raise UserError(f"{path}: no permission to read it") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise damaged(path, error) from None


def read_lines(
    path: Path, file: io.BufferedReader, segment: Segment
) -> Iterator[tuple[int, int, bytes]]:
    """The lines that start in the segment."""
    codec = CODECS.get(path.suffix)
    lines = file
    if codec:
        # pyarrow's stream raises at a file that was cut short; zstandard's would just end.
        lines = io.BufferedReader(pyarrow.CompressedInputStream(file, codec), 1 << 20)
    if segment.start:
        file.seek(segment.start - 1)
        file.readline()  # the rest of a line that starts before the segment
    position = file.tell()
    number = 0
    while segment.stop is None or codec or position < segment.stop:
        line = lines.readline()
        if not line:
            break
        number += 1
        position = file.tell() if codec else position + len(line)
        if not line.isspace():
            yield position - segment.start, number, line
        del line  # a large one must be gone before the next is read


def read_parquet(
    path: Path, file: io.BufferedReader, segment: Segment, schema: Schema
) -> Iterator[tuple[int, int, dict]]:
    """The rows of the segment's row groups, in batches of about LARGE bytes."""
    # Pages are read when they are needed, since a row group may be larger than the memory.
    table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    columns = needed_columns(path, table, schema)
    stop = table.num_row_groups if segment.stop is None else segment.stop
    number = 0
    position = 0  # bytes of the row groups before this one
    for i in range(segment.start, stop):
        group = table.metadata.row_group(i)
        size = row_group_size(table, i)
        rows_per_batch = LARGE * group.num_rows // max(1, group.total_byte_size)
        rows_per_batch = max(1, min(1024, rows_per_batch))
        rows_read = 0
        for batch in table.iter_batches(
            rows_per_batch, row_groups=[i], columns=columns, use_threads=False
        ):
            cells = list(zip(batch.schema.names, batch.columns, strict=True))
            for row in range(batch.num_rows):
                number += 1
                rows_read += 1
                record = {name: value(column[row]) for name, column in cells}
                yield position + size * rows_read // group.num_rows, number, record
                del record  # a large one must be gone before the next is read
        position += size


def needed_columns(path: Path, table: pyarrow.parquet.ParquetFile, schema: Schema) -> list[str]:
    """The columns that a schema names; UserError if the file lacks one."""
    names = table.schema_arrow.names
    fields = [field for field in (schema.text, schema.domain) if field]
    columns = [field.split(".")[0] for field in fields]
    for column in columns:
        if column not in names:
            raise UserError(
                f"{path}: no column {column!r}{nearest(column, names)} (it has: "
                f"{', '.join(names)}); name the columns with --schema"
            )
    return columns


def value(scalar: pyarrow.Scalar) -> Any:
    """A cell as a Python value, but a large text as a view of its UTF-8."""
    if isinstance(scalar, STRING_SCALARS) and scalar.is_valid:
        buffer = scalar.as_buffer()
        if buffer.size > LARGE:
            return memoryview(buffer)
    return scalar.as_py()


def place(source: dict, segment: Segment, number: int) -> str:
    """Where a record is, for messages: "FILE, line 4"."""
    if source["source"] != "files":
        dataset = source.get("dataset", "sample")
        return f"{dataset} {segment.path}, file {segment.start + 1}, document {number}"
    if segment.path.endswith(".parquet"):
        if segment.start:
            metadata = pyarrow.parquet.read_metadata(segment.path)
            number += sum(metadata.row_group(i).num_rows for i in range(segment.start))
        return f"{segment.path}, row {number}"
    if segment.start:
        number += lines_before(segment)
    return f"{segment.path}, line {number}"


def lines_before(segment: Segment) -> int:
    """How many lines of the file start before the segment. This reads all of them."""
    n_lines = 1
    left = segment.start - 1
    with open(segment.path, "rb") as file:
        while left:
            block = file.read(min(left, 1 << 20))
            if not block:
                break
            n_lines += block.count(b"\n")
            left -= len(block)
    return n_lines


# From a record to a document


def to_document(
    item: bytes | dict, split: str | None, schema: Schema, splits: dict[str, str]
) -> Document | None:
    """A line or record as a document; None if its split is not wanted; may raise BadRecord.

    split: the segment's. splits: our name ("train", "val") for each wanted split of the source.
    """
    record = parse_line(item, schema) if isinstance(item, bytes) else item
    text = field_of(record, schema.text)
    if not isinstance(text, Text):
        names = ""
        if isinstance(record, dict):
            names = f" (it has: {', '.join(map(str, record))}; see --schema)"
        raise BadRecord(f"no string called {schema.text!r}{names}")
    domain = domain_of(record, schema)
    utf8 = text
    if isinstance(text, str):
        try:
            utf8 = text.encode()
        except UnicodeEncodeError:
            text = replace_surrogates(text)
            utf8 = text.encode()
    if split == "sample":  # the sample's records name their splits
        split = record.get("split")
    if split is None:
        digest = hashlib.sha1(utf8).digest()
        is_held_out = int.from_bytes(digest[:4], "big") % HELD_OUT == 0
        our_split = "val" if is_held_out else "train"
    elif split in splits:
        our_split = splits[split]
    else:
        return None
    kind = str(field_of(record, "meta.kind") or "")
    return Document(text, utf8, domain, our_split, kind)


def parse_line(line: bytes, schema: Schema) -> dict:
    """A JSON line as a record; a large text as a view of its UTF-8."""
    if len(line) > LARGE:
        try:
            return parse_large_line(line, schema)
        except pyarrow.ArrowException:
            pass  # json accepts more than Arrow does, so it decides
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"broken JSON ({error})") from None


def parse_large_line(line: bytes, schema: Schema) -> dict:
    types = pyarrow.schema([(schema.text, pyarrow.large_string())])
    row = pyarrow.json.read_json(
        pyarrow.BufferReader(line),
        pyarrow.json.ReadOptions(use_threads=False, block_size=len(line) + 1),
        pyarrow.json.ParseOptions(explicit_schema=types),
    )
    columns = zip(row.column_names, row.columns, strict=True)
    return {name: value(column[0]) for name, column in columns}


def field_of(record: Any, name: str) -> Any:
    """The value of a field, dots leading into nested fields; None if there is no such field."""
    for part in name.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def domain_of(record: dict, schema: Schema) -> str:
    """The domain that a record names; BadRecord if it names none that is known."""
    if schema.constant:
        return schema.constant
    name = field_of(record, schema.domain)
    if isinstance(name, str):
        if name in SET_NAMES:
            return SET_NAMES[name]
        if name in DOMAINS:
            return name
    raise BadRecord(
        f"unknown domain {schema.domain} {name!r}{nearest(str(name), SET_NAMES)} (known: "
        f"{', '.join(SET_NAMES)}; more are added in corpus/manifest.py; other fields: --schema)"
    )
