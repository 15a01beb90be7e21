"""Where documents come from: files, the hub or the synthetic sample, cut into segments and read one document at a time.

A segment is what a restart reads again or not at all: a compressed file, a byte range of a .jsonl, row groups of a
.parquet, a shard of a hub dataset. Segments depend on the inputs alone, so shards do not depend on who reads what.
"""

import glob
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.json
import pyarrow.parquet

import sample_corpus
from errors import UserError, nearest
from manifest import DOMAINS, SET_NAMES
from tokenizer import replace_surrogates

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation",
               "dev": "validation", "test": "test"}
HELD_OUT = 50  # of files whose names tell no split, one document in 50 is for validation, by a hash of its text
LARGE = 16 << 20  # bytes; a longer document stays UTF-8: as a str, one emoji would make it four times as large
Text = str | memoryview  # memoryview: the UTF-8 of a large document


class Segment(NamedTuple):
    """A stretch of the source. split: of the source, None: each document's by a hash of its text."""
    path: str            # a file; hub: the name of the source's split
    split: str | None
    start: int           # first byte (.jsonl), row group (.parquet) or shard (hub)
    stop: int | None     # one past the last; None: to the end
    size: int            # bytes on disk; 0 where unknown


class Schema(NamedTuple):
    """Where a record holds its text and its domain; dots lead into nested fields."""
    text: str = "text"
    domain: str | None = "meta.redpajama_set_name"
    constant: str | None = None  # the domain of all documents, instead of a field


class Document(NamedTuple):
    text: Text
    utf8: bytes | memoryview
    domain: str
    split: str  # "train" or "val"
    kind: str   # the label meta.kind; "" for most data


class BadRecord(ValueError):
    """A record that is no document: broken JSON, no text, no known domain."""


def parse_schema(text: str | None) -> Schema:
    """"text=FIELD,domain=FIELD" or "text=FIELD,constant=NAME" -> Schema; UserError otherwise."""
    if text is None:
        return Schema()
    pairs = [part.split("=", 1) for part in text.split(",")]
    given = dict(pair for pair in pairs if len(pair) == 2 and pair[1])
    if len(given) != len(pairs) or set(given) not in ({"text", "domain"}, {"text", "constant"}):
        raise UserError(f"--schema {text}: expected text=FIELD,domain=FIELD or text=FIELD,constant=NAME")
    if not re.fullmatch("[a-z0-9][a-z0-9_-]*", given.get("constant", "ok")):
        raise UserError(f"--schema {text}: the constant names a folder; use small letters, digits, - and _")
    return Schema(given["text"], given.get("domain"), given.get("constant"))


def find_files(inputs: list[str]) -> list[tuple[Path, str | None]]:
    """(file, split by its name or a folder's, or None) of files, folders and glob patterns, in a fixed order."""
    # The same file once, however it is spelled; links are not followed: the hub's cache links names to hashes.
    found: dict[Path, Path] = {}
    tops = []  # the given folders; of a file: its own
    for item in inputs:
        roots = [item] if os.path.exists(item) else sorted(glob.glob(item, recursive=True))
        if not roots:
            raise UserError(f"--input {item}: no such file or folder")
        for root in map(Path, roots):
            try:
                if root.is_dir():
                    os.listdir(root)  # rglob would find nothing, without a word, in a folder it may not read
                paths = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
            except PermissionError:
                raise UserError(f"--input {root}: no permission to read it") from None
            paths = [p for p in paths if p.name.endswith(SUFFIXES)]
            if not paths and root == Path(item):
                raise UserError(f"--input {item}: no {', '.join(SUFFIXES)} there")
            found |= {Path(os.path.abspath(path)): path for path in paths}
            tops.append(os.path.abspath(root.parent if root.is_file() else root))
    if not found:
        raise UserError(f"--input {' '.join(inputs)}: no {', '.join(SUFFIXES)} there")
    # A name tells the split from the file up to the folder that holds all inputs. Those above it say where the corpus
    # happens to lie, as /dev/shm does.
    top = Path(os.path.commonpath(tops))
    files = []
    for whole, path in found.items():
        folders = [SPLIT_NAMES.get(p.name.lower()) for p in whole.parents if p == top or top in p.parents]
        files.append((path, next((split for split in (split_of(path.name), *folders) if split), None)))
    return files


def split_of(name: str) -> str | None:
    """"train", "validation" or "test" where a file's name has such a word."""
    match = re.search(rf"(?<![a-z])({'|'.join(SPLIT_NAMES)})(?![a-z])", name.lower())
    return SPLIT_NAMES[match[1]] if match else None


def file_segments(files: list[tuple[Path, str | None]], limit: int) -> list[Segment]:
    """The files in order, those above `limit` bytes in pieces where the format allows it."""
    def pieces(file: tuple[Path, str | None]) -> list[Segment]:
        path, split = file
        size = path.stat().st_size
        if not os.access(path, os.R_OK):
            raise UserError(f"{path}: no permission to read it")
        if size > limit and path.suffix == ".jsonl":
            starts = range(0, size, limit)
            return [Segment(str(path), split, a, min(a + limit, size), min(limit, size - a)) for a in starts]
        if size > limit and path.suffix == ".parquet":
            return row_groups(path, split, limit)
        return [Segment(str(path), split, 0, None, size)]

    with ThreadPoolExecutor(16) as pool:  # on a network's file system a look into each file takes milliseconds
        return [segment for found in pool.map(pieces, files) for segment in found]


def row_groups(path: Path, split: str | None, limit: int) -> list[Segment]:
    """The segments of a .parquet: row groups up to about `limit` bytes on disk."""
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: damaged or cut short ({first_line(error)})") from None
    sizes = [sum(g.column(i).total_compressed_size for i in range(g.num_columns)) for g in groups]
    segments, start = [], 0
    for i in range(len(sizes)):
        if i + 1 == len(sizes) or sum(sizes[start:i + 2]) > limit:
            segments.append(Segment(str(path), split, start, i + 1, sum(sizes[start:i + 1])))
            start = i + 1
    return segments


def hub_segments(dataset: str, revision: str | None, splits: list[str]) -> list[Segment]:
    """One segment for each file of the dataset's splits."""
    return [Segment(split, split, i, i + 1, 0) for split in splits
            for i in range(hub_stream(dataset, revision, split).num_shards)]


@lru_cache
def hub_stream(dataset: str, revision: str | None, split: str) -> Any:
    """A split of a dataset on the Hugging Face hub (or of a local folder laid out like one), to be streamed."""
    import datasets  # only here: it takes a second to import
    try:
        return datasets.load_dataset(dataset, split=split, revision=revision, streaming=True)
    except Exception as error:  # the library raises a dozen kinds for a hub that cannot be reached
        raise unreachable(dataset, error) from None


def unreachable(dataset: str, error: Exception) -> UserError:
    return UserError(f"cannot read {dataset!r} from the hub ({first_line(error)}); download its files elsewhere and "
                     "use: --source files --input FOLDER")


def first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def read(source: dict, segment: Segment) -> Iterator[tuple[int, int, Any]]:
    """(bytes of the segment read so far, number in the segment from 1, JSON line or record) in order.

    source: the manifest's entry of that name. UserError for a file that is damaged or may not be read.
    """
    if source["source"] == "sample":
        n = 0
        for i, (split, record) in enumerate(sample_corpus.documents(source["seed"]), 1):
            n += len(record["text"])
            yield n, i, {**record, "split": split}
    elif source["source"] == "hub":
        stream = hub_stream(source["dataset"], source["revision"], segment.path)
        shard = stream.shard(num_shards=stream.num_shards, index=segment.start)
        try:
            for i, record in enumerate(shard, 1):
                yield 0, i, record
        except Exception as error:  # as above
            raise unreachable(source["dataset"], error) from None
    else:
        path = Path(segment.path)
        try:
            with open(path, "rb") as file:
                yield from (read_parquet if path.suffix == ".parquet" else read_lines)(path, file, segment, source)
        except PermissionError:
            raise UserError(f"{path}: no permission to read it") from None
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: damaged or cut short ({first_line(error)})") from None


def read_lines(path: Path, file: io.BufferedReader, segment: Segment, _: dict) -> Iterator[tuple[int, int, bytes]]:
    """The lines that start in the segment."""
    codec = {".zst": "zstd", ".gz": "gzip"}.get(path.suffix)
    # pyarrow's streams raise at a file that was cut short; zstandard's would end there without a word.
    lines = io.BufferedReader(pyarrow.CompressedInputStream(file, codec), 1 << 20) if codec else file
    if segment.start:
        file.seek(segment.start - 1)
        file.readline()  # the rest of a line that started before
    at, number = file.tell(), 0
    while (segment.stop is None or codec or at < segment.stop) and (line := lines.readline()):
        number += 1
        at = file.tell() if codec else at + len(line)
        if not line.isspace():
            yield at - segment.start, number, line
        del line


def read_parquet(path: Path, file: io.BufferedReader, segment: Segment,
                 source: dict) -> Iterator[tuple[int, int, dict]]:
    """The rows of the segment's row groups, in batches of about LARGE bytes."""
    # Pages are read as they are needed: a row group may be larger than the memory.
    table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    schema = Schema(*source["schema"])
    columns = [field.split(".")[0] for field in (schema.text, schema.domain) if field]
    for column in columns:
        if column not in table.schema_arrow.names:
            raise UserError(f"{path}: no column {column!r}{nearest(column, table.schema_arrow.names)} (there: "
                            f"{', '.join(table.schema_arrow.names)}); name the columns with --schema")
    number, before = 0, 0
    for group in range(segment.start, table.num_row_groups if segment.stop is None else segment.stop):
        info = table.metadata.row_group(group)
        size = sum(info.column(i).total_compressed_size for i in range(info.num_columns))
        rows, done = max(1, min(1024, LARGE * info.num_rows // max(1, info.total_byte_size))), 0
        for batch in table.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
            names = batch.schema.names
            for i in range(batch.num_rows):
                number, done = number + 1, done + 1
                yield before + size * done // info.num_rows, number, {
                    name: value(batch.column(j)[i]) for j, name in enumerate(names)}
        before += size


def value(scalar: pyarrow.Scalar) -> Any:
    """A cell as Python has it, but large text as a view of its UTF-8."""
    kinds = (pyarrow.StringScalar, pyarrow.LargeStringScalar)
    if isinstance(scalar, kinds) and scalar.is_valid and (buffer := scalar.as_buffer()).size > LARGE:
        return memoryview(buffer)
    return scalar.as_py()


def place(source: dict, segment: Segment, number: int) -> str:
    """Where a record stands, for messages: "FILE, line 4"."""
    if source["source"] != "files":
        return f"{source.get('dataset', 'sample')} {segment.path}, file {segment.start + 1}, document {number}"
    if segment.path.endswith(".parquet"):
        if segment.start:
            metadata = pyarrow.parquet.read_metadata(segment.path)
            number += sum(metadata.row_group(i).num_rows for i in range(segment.start))
        return f"{segment.path}, row {number}"
    if segment.start:  # lines before the segment are only counted where there is something to say
        with open(segment.path, "rb") as file:
            left = segment.start - 1
            while left and (block := file.read(min(left, 1 << 20))):
                number, left = number + block.count(b"\n"), left - len(block)
            number += 1  # the line that was begun before the segment
    return f"{segment.path}, line {number}"


def parse_line(line: bytes, schema: Schema) -> dict:
    """A JSON line as a record; the text of a large one as a view of its UTF-8."""
    if len(line) > LARGE:
        try:
            options = pyarrow.json.ReadOptions(use_threads=False, block_size=len(line) + 1)
            strings = pyarrow.json.ParseOptions(explicit_schema=pyarrow.schema([(schema.text, pyarrow.large_string())]))
            row = pyarrow.json.read_json(pyarrow.BufferReader(line), options, strings)
            return {name: value(column[0]) for name, column in zip(row.column_names, row.columns, strict=True)}
        except pyarrow.ArrowException:  # what json accepts and Arrow does not: json has the last word
            pass
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"broken JSON ({error})") from None


def field_of(record: Any, name: str) -> Any:
    """The value of a field, dots leading into nested ones; None where there is none."""
    for part in name.split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return record


def domain_of(record: dict, schema: Schema) -> str:
    """The domain that a record names; BadRecord where it names none that we know."""
    if schema.constant:
        return schema.constant
    name = field_of(record, schema.domain)
    if isinstance(name, str) and (name in SET_NAMES or name in DOMAINS):
        return SET_NAMES.get(name, name)
    raise BadRecord(f"unknown domain {schema.domain} {name!r}{nearest(str(name), SET_NAMES)} "
                    f"(known: {', '.join(SET_NAMES)}; more are added in manifest.py; other fields: --schema)")


def to_document(item: Any, split: str | None, schema: Schema, splits: dict[str, str]) -> Document | None:
    """A line or record as a document, None where its split is not asked for; BadRecord where it is none.

    splits: ours from the source's.
    """
    record = parse_line(item, schema) if isinstance(item, bytes) else item
    text = field_of(record, schema.text)
    if not isinstance(text, Text):
        there = f" (there: {', '.join(map(str, record))}; see --schema)" if isinstance(record, dict) else ""
        raise BadRecord(f"no string called {schema.text!r}{there}")
    domain = domain_of(record, schema)
    if isinstance(text, str):
        try:
            utf8 = text.encode()
        except UnicodeEncodeError:
            text = replace_surrogates(text)
            utf8 = text.encode()
    else:
        utf8 = text
    split = record.get("split") if isinstance(record, dict) and split == "sample" else split
    if split is None:
        ours = "val" if int.from_bytes(hashlib.sha1(utf8).digest()[:4], "big") % HELD_OUT == 0 else "train"
    elif (ours := splits.get(split)) is None:
        return None
    return Document(text, utf8, domain, ours, str(field_of(record, "meta.kind") or ""))
