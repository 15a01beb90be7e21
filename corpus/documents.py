"""Where documents come from: files, the Hugging Face hub or the synthetic sample.

The source is cut into segments: compressed files, byte ranges of a .jsonl, row groups of a .parquet
or shards of a hub dataset. After an interruption, a segment is read again from its start or not at
all. Segments depend only on the inputs, so the token shards do not depend on which worker reads
what.
"""

import codecs
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

import orjson
import pyarrow
import pyarrow.json
import pyarrow.parquet

from cli import UserError, nearest
from corpus import inputs
from corpus import sample as sample_corpus
from corpus.inputs import SUFFIXES
from corpus.manifest import DOMAINS, SET_NAMES, find_name_defect
from corpus.tokenizer import replace_surrogates

CODECS = {".zst": "zstd", ".gz": "gzip"}
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
# Where no file name says the split, or with --split train=NAME,val=hash, one document in 50 is for
# validation, by a hash of its text.
HELD_OUT = 50
HASH = "hash"  # what --split has in place of the name of a split
# What to do where the source has no split for validation
SPLIT_HELP = (
    "choose with --split train=NAME,val=NAME, or hold out one document in "
    f"{HELD_OUT} of the training data by a hash of its text: --split train=NAME,val={HASH}"
)
# Bytes. A longer text stays UTF-8: as a str, a single emoji would make it four times as large.
LARGE = 16 << 20
Text = str | memoryview  # memoryview: the UTF-8 of a large document
# What a value is called in messages
KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    bytes: "bytes",
    list: "a list",
    dict: "an object",
}


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


def find_files(given: list[str], schema: Schema | None = None) -> list[tuple[Path, str | None]]:
    """(file, split) for files, folders and glob patterns, in a fixed order.

    The split is that in the file's name or in the name of a folder around it, else None. Prints
    what is left out.
    """
    # Each file once, however its path is written. Links count by their own names: in the hub's
    # cache, they lead to files that are called by their hashes.
    paths: dict[Path, Path] = {}  # absolute path -> path as given
    tops = []  # the given folders, and those of the given files
    left_out: dict[str, list[Path]] = {}
    for item in given:
        roots = [Path(item)] if inputs.is_there(item) else inputs.expand(item)
        if not roots or not item:
            raise UserError(f"--input {item}: no such file or folder")
        for root in roots:
            listing = inputs.list_files(root)
            if not listing.files and root == Path(item):
                raise nothing_there(item, listing.left_out)
            for path in listing.files:
                paths[Path(os.path.abspath(path))] = path
            for reason, others in listing.left_out.items():
                left_out.setdefault(reason, []).extend(others)
            tops.append(os.path.abspath(root.parent if root.is_file() else root))
    drop_other_json(paths, left_out, schema or Schema())
    if not paths:
        raise nothing_there(" ".join(given), left_out)
    print_left_out(left_out, paths)
    # Only folders from the one that holds all inputs downward can name a split. Those above it say
    # where the corpus happens to be stored, as /dev/shm does.
    top = Path(os.path.commonpath(tops))
    return [(path, find_split(absolute, top)) for absolute, path in paths.items()]


def nothing_there(given: str, left_out: dict[str, list[Path]]) -> UserError:
    found = f" (left out: {inputs.describe(left_out)})" if left_out else ""
    return UserError(f"--input {given}: no {', '.join(SUFFIXES)} there{found}")


def print_left_out(left_out: dict[str, list[Path]], paths: dict[Path, Path]) -> None:
    """Say what was not taken, other than files that are read under another name by a link."""
    targets = {os.path.realpath(path) for path in paths.values() if path.is_symlink()}
    shown = {}
    for reason, others in left_out.items():
        once = {os.path.abspath(path): path for path in others}
        if reason == inputs.OTHER_ENDING and targets:
            once = {
                key: path for key, path in once.items() if os.path.realpath(path) not in targets
            }
        if once:
            shown[reason] = list(once.values())
    if shown:
        print(f"left out: {inputs.describe(shown)}")


def drop_other_json(
    paths: dict[Path, Path], left_out: dict[str, list[Path]], schema: Schema
) -> None:
    """Move each .json that does not hold a record per line from `paths` to `left_out`."""
    candidates = [absolute for absolute in paths if absolute.suffix.lower() == ".json"]
    with ThreadPoolExecutor(16) as pool:
        reasons = list(pool.map(partial(why_no_records, schema=schema), candidates))
    for absolute, reason in zip(candidates, reasons, strict=True):
        if reason:
            left_out.setdefault(reason, []).append(paths.pop(absolute))


def why_no_records(path: Path, schema: Schema) -> str | None:
    """Why a .json does not hold a record per line, as dataset_info.json does not; None if it does.

    Only its first line is judged, and whether there is a second one. What is wrong in a file of
    records is an error when it is read.
    """
    try:
        with open(path, "rb") as file:
            lines = (line for line in iter(partial(file.readline, LARGE), b"") if line.strip())
            first = next(lines, b"")
            second = next(lines, b"")
    except OSError as error:
        raise inputs.unreadable(path, error) from None
    first = first.removeprefix(codecs.BOM_UTF8).strip()
    if first.startswith(b"["):
        return "with a JSON array, not a record per line (jq -c '.[]' FILE makes them)"
    if not first or len(first) >= LARGE - 1 or first.startswith(tuple(inputs.POINTERS)):
        return None
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return "with JSON that is not a record per line"
    if not second and field_of(record, schema.text) is None:
        return f"with one line of JSON that has no {schema.text!r}"
    return None


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
    inputs.refuse_pointer(path, size)
    suffix = path.suffix.lower()
    if size > limit and suffix in (".jsonl", ".json"):
        segments = []
        for start in range(0, size, limit):
            stop = min(start + limit, size)
            segments.append(Segment(str(path), split, start, stop, stop - start))
        return segments
    if size > limit and suffix == ".parquet":
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


class Dataset(NamedTuple):
    """A dataset on the Hugging Face hub, or a local folder laid out like one."""

    path: str
    name: str | None  # of a part that the dataset names
    revision: str | None


def dataset_of(source: dict) -> Dataset:
    """source: the manifest's entry of that name."""
    return Dataset(source["dataset"], source.get("name"), source["revision"])


def hub_segments(dataset: Dataset, splits: list[str]) -> list[Segment]:
    """One segment for each file of the dataset's splits."""
    segments = []
    for split in splits:
        for i in range(hub_stream(dataset, split).num_shards):
            segments.append(Segment(split, split, i, i + 1, 0))
    if os.path.isdir(dataset.path):
        check_local_dataset(dataset.path, hub_builder(dataset).config.data_files, splits)
    return segments


def split_names(dataset: Dataset) -> list[str]:
    """The splits that a dataset has."""
    return sorted(hub_streams(dataset))


def has_domains(dataset: Dataset, splits: dict[str, str]) -> bool:
    """Whether a dataset's first document names its domain as SlimPajama's do."""
    split = next(name for name in splits.values() if name != HASH)
    try:
        record = next(iter(hub_stream(dataset, split)), None)
    except UserError:
        raise
    except Exception as error:  # of any kind, as in hub_builder
        raise unreachable(dataset.path, error) from None
    return record is None or field_of(record, str(Schema().domain)) is not None


def domain_of_dataset(path: str) -> str:
    """The name of the one domain of a dataset: "fineweb" for HuggingFaceFW/fineweb."""
    name = re.sub("[^a-z0-9_-]+", "-", Path(path).absolute().name.lower()).strip("-_")
    if find_name_defect(name):
        raise UserError(
            f"--dataset {path} names no domains, and its name is none that a domain may have; "
            "give one: --schema text=text,constant=NAME"
        )
    return name


def check_local_dataset(dataset: str, data_files: dict | None, splits: list[str]) -> None:
    """Say which files of a folder the library leaves out; UserError if it takes some twice."""
    data_files = data_files or {}
    inputs.refuse_twice([Path(path) for split in splits for path in data_files.get(split, [])])
    taken = {os.path.abspath(path) for paths in data_files.values() for path in paths}
    listing = inputs.list_files(Path(dataset))
    ignored = [path for path in listing.files if os.path.abspath(path) not in taken]
    left_out = {**listing.left_out, "that the library of the hub does not take": ignored}
    print_left_out(left_out, {})


@lru_cache
def hub_stream(dataset: Dataset, split: str, columns: tuple[str, ...] | None = None) -> Any:
    """A split of a dataset. columns: read only these, where the format allows it; None: all."""
    streams = hub_streams(dataset, columns)
    if split in streams:
        return streams[split]
    raise UserError(
        f"{dataset.path} has no split {split!r}{nearest(split, streams)} (it has: "
        f"{', '.join(streams)}); {SPLIT_HELP}"
    )


@lru_cache
def hub_streams(dataset: Dataset, columns: tuple[str, ...] | None = None) -> dict:
    """All splits of a dataset by name."""
    try:
        return hub_builder(dataset, columns).as_streaming_dataset()
    except Exception as error:  # any kind, as in hub_builder
        raise unreachable(dataset.path, error) from None


@lru_cache
def hub_builder(dataset: Dataset, columns: tuple[str, ...] | None = None) -> Any:
    """What the library of the hub knows of a dataset."""
    import datasets  # only here: it takes a second to import

    datasets.config.TORCH_AVAILABLE = False  # or a stream imports torch, which takes two more
    selection = {"columns": list(columns)} if columns else {}
    try:
        return datasets.load_dataset_builder(
            dataset.path, dataset.name, revision=dataset.revision, **selection
        )
    except Exception as error:  # the library raises a dozen kinds for a hub that cannot be reached
        raise unreachable(dataset.path, error) from None


def hub_columns(dataset: Dataset, split: str, schema: Schema) -> tuple[str, ...] | None:
    """The columns that a schema needs of a dataset in Parquet; None: all, as of other formats."""
    config = hub_builder(dataset).config
    names = hub_stream(dataset, split).column_names
    if not names or not hasattr(config, "columns") or getattr(config, "features", None):
        return None
    wanted = {"meta.kind"}
    for field in (schema.text, schema.domain or schema.text):
        wanted.add(field if field in names else field.split(".")[0])
    return tuple(name for name in names if name in wanted) or None


def unreachable(dataset: str, error: Exception) -> UserError:
    if isinstance(error, UserError):  # it says so already
        return error
    return UserError(
        f"cannot read {dataset!r} from the hub ({first_line(error)}); download its files elsewhere "
        "and use: --source files --input FOLDER"
    )


def damaged(path: Path, error: Exception) -> UserError:
    reason = first_line(error)
    if "too much memory" in reason:  # what zstd says of a window that its reader does not allow
        return UserError(
            f"{path}: compressed with a window above 128 MB (zstd --long), which is not read here; "
            f"the file is intact, compress it anew: zstd -dc --long=31 {path} | zstd -o NEW_FILE"
        )
    if isinstance(error, OSError) and error.errno:
        return UserError(
            f"{path}: cannot be read ({error.strerror}); look at the disk or its mount, then run "
            "the same command again"
        )
    return UserError(f"{path}: damaged or cut short ({reason})")


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
    dataset = dataset_of(source)
    columns = hub_columns(dataset, segment.path, Schema(*source["schema"]))
    stream = hub_stream(dataset, segment.path, columns)
    shard = stream.shard(num_shards=stream.num_shards, index=segment.start)
    try:
        for number, record in enumerate(shard, start=1):
            yield 0, number, record
    except Exception as error:  # any kind, as in hub_stream
        raise unreachable(dataset.path, error) from None


def read_file(source: dict, segment: Segment) -> Iterator[tuple[int, int, bytes | dict]]:
    path = Path(segment.path)
    try:
        with open(path, "rb") as file:
            if path.suffix.lower() == ".parquet":
                schema = Schema(*source["schema"])
                yield from read_parquet(path, file, segment, schema)
            else:
                yield from read_lines(path, file, segment)
    except PermissionError:
        raise UserError(f"{path}: no permission to read it") from None
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise damaged(path, error) from None


class Counted(io.RawIOBase):
    """A stream that is decompressed, with the number of bytes that came out of it."""

    def __init__(self, file: io.BufferedReader, codec: str):
        # pyarrow's stream raises at a file that was cut short; zstandard's would just end.
        self.stream = pyarrow.CompressedInputStream(file, codec)
        self.n_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self.stream.readinto(buffer)
        self.n_bytes += n
        return n


def read_lines(
    path: Path, file: io.BufferedReader, segment: Segment
) -> Iterator[tuple[int, int, bytes]]:
    """The lines that start in the segment."""
    codec = CODECS.get(path.suffix.lower())
    lines = file
    if codec:
        decompressed = Counted(file, codec)
        lines = io.BufferedReader(decompressed, 1 << 20)
    if segment.start:
        file.seek(segment.start - 1)
        file.readline()  # the rest of a line that starts before the segment
    position = file.tell()
    n_bytes = 0  # in the lines so far
    number = 0
    while segment.stop is None or codec or position < segment.stop:
        line = lines.readline()
        if not line:
            break
        number += 1
        n_bytes += len(line)
        if codec:
            # The buffers have read ahead: the share of their bytes that the lines have taken.
            position = max(position, file.tell() * n_bytes // decompressed.n_bytes)
        else:
            position += len(line)
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
    columns = []
    for field in (schema.text, schema.domain):
        if not field:
            continue
        column = field if field in names else field.split(".")[0]
        if column not in names:
            raise UserError(
                f"{path}: no column {column!r}{nearest(column, names)} (it has: "
                f"{', '.join(names)}); name the columns with --schema"
            )
        if names.count(column) > 1:
            raise UserError(f"{path}: {names.count(column)} columns {column!r}; rename all but one")
        columns.append(column)
    if "meta.kind" in names:
        columns.append("meta.kind")
    return columns


def value(scalar: pyarrow.Scalar) -> Any:
    """A cell as a Python value, but a large text as a view of its UTF-8."""
    if isinstance(scalar, pyarrow.BinaryScalar) and scalar.is_valid:  # all kinds of text and bytes
        buffer = scalar.as_buffer()
        if buffer.size > LARGE:
            return memoryview(buffer)
        if isinstance(scalar, pyarrow.StringScalar | pyarrow.LargeStringScalar):
            try:
                return scalar.as_py()
            except UnicodeDecodeError:
                return buffer.to_pybytes()  # to_document reports it as a broken record
    return scalar.as_py()


def place(source: dict, segment: Segment, number: int) -> str:
    """Where a record is, for messages: "FILE, line 4"."""
    if source["source"] != "files":
        dataset = source.get("dataset", "sample")
        return f"{dataset} {segment.path}, file {segment.start + 1}, document {number}"
    if segment.path.lower().endswith(".parquet"):
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
    text, utf8 = text_of(record, schema)
    domain = domain_of(record, schema)
    if split == "sample":  # the sample's records name their splits
        split = record.get("split")
    if split is not None and split not in splits:
        return None
    our_split = splits.get(split, "train")
    if our_split == "train" and (split is None or HASH in splits):
        digest = hashlib.sha1(utf8).digest()
        if int.from_bytes(digest[:4], "big") % HELD_OUT == 0:
            our_split = "val"
    kind = str(field_of(record, "meta.kind") or "")
    return Document(text, utf8, domain, our_split, kind)


def text_of(record: Any, schema: Schema) -> tuple[Text, bytes | memoryview]:
    """A record's text, and its UTF-8; BadRecord if it has none."""
    text = field_of(record, schema.text)
    if isinstance(text, str):
        try:
            return text, text.encode()
        except UnicodeEncodeError:
            text = replace_surrogates(text)
            return text, text.encode()
    if not isinstance(text, bytes | memoryview):
        found = what_is(record, schema.text)
        raise BadRecord(f"no string called {schema.text!r}: {found}; see --schema")
    try:
        if isinstance(text, bytes):
            return str(text, "utf-8"), text
        decoder = codecs.getincrementaldecoder("utf-8")()
        for start in range(0, len(text), 1 << 20):
            decoder.decode(text[start : start + (1 << 20)])
        decoder.decode(b"", final=True)
        return text, text
    except UnicodeDecodeError as error:
        raise BadRecord(f"{schema.text} is not UTF-8 ({error.reason})") from None


def parse_line(line: bytes, schema: Schema) -> dict:
    """A JSON line as a record; a large text as a view of its UTF-8."""
    text_key = schema.text.split(".")[0]
    # json and Arrow would take the last of two texts without a word.
    may_repeat = line.count(f'"{text_key}"'.encode()) > 1
    if len(line) > LARGE and not may_repeat:
        try:
            return parse_large_line(line, schema)
        except pyarrow.ArrowException:
            pass  # json accepts more than Arrow does, so it decides
    hook = partial(to_object, text_key=text_key) if may_repeat else None
    try:
        if not hook:
            try:
                return orjson.loads(line)  # in less than half the time
            except orjson.JSONDecodeError:
                pass  # json accepts more, such as lone surrogates, so it decides
        return json.loads(line, object_pairs_hook=hook)
    except BadRecord:
        raise
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"broken JSON ({error})") from None


def to_object(pairs: list[tuple[str, Any]], text_key: str) -> dict:
    """The object that a JSON text has; BadRecord if the field of the text stands there twice."""
    if [key for key, _ in pairs].count(text_key) > 1:
        raise BadRecord(f"two fields called {text_key!r}")
    return dict(pairs)


def parse_large_line(line: bytes, schema: Schema) -> dict:
    types = pyarrow.schema([(schema.text, pyarrow.large_string())])
    row = pyarrow.json.read_json(
        pyarrow.BufferReader(line),
        pyarrow.json.ReadOptions(use_threads=False, block_size=len(line) + 1),
        pyarrow.json.ParseOptions(explicit_schema=types),
    )
    columns = zip(row.column_names, row.columns, strict=True)
    record = {name: value(column[0]) for name, column in columns}
    if f'"{schema.text}"'.encode() not in line:
        record.pop(schema.text, None)  # Arrow adds a null where the field is absent, or nested
    return record


def field_of(record: Any, name: str) -> Any:
    """The value of a field, dots leading into nested fields; None if there is no such field.

    The name with its dots comes first: tables that were flattened have columns of such names.
    """
    fields = fields_of(record)
    if name in fields:
        return fields[name]
    first, _, rest = name.partition(".")
    if rest:
        return field_of(fields.get(first), rest)
    return None


def fields_of(value: Any) -> dict:
    """The fields of an object, of JSON in a string or of an Arrow map; none if it is none of these.

    Arrow makes a list of pairs of a map.
    """
    if type(value) is dict:
        return value
    if isinstance(value, str | bytes) and value.strip()[:1] in ("{", b"{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    if isinstance(value, list) and all(isinstance(item, tuple) for item in value):
        return {as_text(key): item for key, item in value}
    return value if isinstance(value, dict) else {}


def as_text(value: Any) -> Any:
    """Bytes as text: programs that know no strings write binary columns."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def what_is(record: Any, name: str) -> str:
    """What a record has where a string called `name` should be: "text is null"."""
    reached = "the record"
    value = record
    for part in (name,) if name in fields_of(record) else name.split("."):
        fields = fields_of(value)
        if part not in fields:
            if not fields:
                return f"{reached} is {kind_of(value)}"
            return f"{reached} has no {part!r} (it has: {', '.join(map(str, fields))})"
        value = fields[part]
        reached = part if reached == "the record" else f"{reached}.{part}"
    return f"{reached} is {kind_of(value)}"


def kind_of(value: Any) -> str:
    return KINDS.get(type(value), type(value).__name__)


def domain_of(record: dict, schema: Schema) -> str:
    """The domain that a record names; BadRecord if it names none that is known."""
    if schema.constant:
        return schema.constant
    name = as_text(field_of(record, schema.domain))
    if isinstance(name, str):
        if name in SET_NAMES:
            return SET_NAMES[name]
        if name in DOMAINS:
            return name
    found = "" if isinstance(name, str) else f"{what_is(record, schema.domain)}; "
    raise BadRecord(
        f"unknown domain {schema.domain} {name!r}{nearest(str(name), SET_NAMES)} ({found}known: "
        f"{', '.join(SET_NAMES)}; more are added in corpus/manifest.py; other fields: --schema)"
    )
