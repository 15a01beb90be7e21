"""Documents to token shards: one pass, each document to its domain by meta.redpajama_set_name, then manifest.json.

    python prepare_slimpajama.py --source files --input SlimPajama-627B --out data/slimpajama
    python prepare_slimpajama.py --source hub --dataset DKYoon/SlimPajama-6B --out data/slimpajama
    python prepare_slimpajama.py --source sample --tokenizer bytes --out data/sample      # synthetic, in seconds

Writes OUT/<domain>/{train,val}_00000.npy: the tokens of each document followed by end-of-text, uint16. The manifest
comes last: where it is, the data is complete. Memory does not grow with the input.
"""

import argparse
import glob
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from tqdm import tqdm

import sample_corpus
import tokenizer as tokenizers
from checkpoint import write_bytes, write_text
from configurator import Parser
from data import DOMAINS, SCHEMA, SET_NAMES, kinds_path, read_manifest
from errors import UserError, nearest, run

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation",
               "dev": "validation", "test": "test"}
HELD_OUT = 50  # of files whose names tell no split, one document in 50 is for validation, by a hash of its text
Document = tuple[str | None, str, dict]  # split of the source (None: by hash), where it stands, record


class ShardWriter:
    """One domain's stream of tokens in files of `shard_tokens`; each is renamed into place when it is whole."""

    def __init__(self, out: Path, domain: str, split: str, shard_tokens: int):
        self.out, self.stem, self.shard_tokens = out, f"{domain}/{split}", shard_tokens
        self.shards: list[dict] = []
        self.file = None

    def add(self, ids: np.ndarray, n_bytes: int, kind: str = "") -> None:
        """Append one document's tokens; it counts to the shard that it ends in. kind: its label, where it has one."""
        while True:
            if self.file is None:
                self._open()
            part = ids[:self.shard_tokens - self.info["tokens"]]
            self.file.write(part.tobytes())
            self.info["tokens"] += len(part)
            if self.runs and self.runs[-1][1] == kind:
                self.runs.pop()  # neighbours of one kind are one run
            self.runs.append((self.info["tokens"], kind))
            ids = ids[len(part):]
            if not len(ids):
                break
            self._finish()
        self.info["documents"] += 1
        self.info["bytes"] += n_bytes

    def _open(self) -> None:
        name = f"{self.stem}_{len(self.shards):05d}.npy"
        self.info = {"file": name, "tokens": 0, "documents": 0, "bytes": 0}
        self.runs: list[tuple[int, str]] = []  # (end, kind) of each stretch of tokens of one kind
        (self.out / name).parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.out / f"{name}.tmp", "w+b", buffering=1 << 20)
        self.file.write(npy_header(0))

    def _finish(self) -> None:
        self.file.seek(0)
        self.file.write(npy_header(self.info["tokens"]))
        self.file.seek(0)
        digest = hashlib.sha256()
        while block := self.file.read(1 << 20):
            digest.update(block)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        path = self.out / self.info["file"]
        os.replace(f"{path}.tmp", path)
        self.shards.append({**self.info, "file_bytes": path.stat().st_size, "sha256": digest.hexdigest()})
        if kinds := sorted({kind for _, kind in self.runs} - {""}):  # no index where no document has a label
            names = [*kinds, ""]
            index = np.array([(end, names.index(kind)) for end, kind in self.runs], dtype=np.int64)
            content = io.BytesIO()
            np.save(content, index)
            write_bytes(kinds_path(path), content.getvalue())
            self.shards[-1]["kinds"] = names
        self.file = None

    def close(self) -> list[dict]:
        """Finish the last shard; what the manifest says of all of them."""
        if self.file is not None:
            self._finish()
        return self.shards


def npy_header(n: int) -> bytes:
    """The header of an npy file with n uint16; NumPy pads it, so its length does not depend on n."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (n,)})
    return header.getvalue()


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
            paths = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
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


def read_files(files: list[tuple[Path, str | None]], bar: tqdm) -> Iterator[Document]:
    """The documents of all files in order; the bar counts their bytes on disk."""
    for path, split in files:
        try:
            with open(path, "rb") as file:
                records = read_parquet(path, file) if path.suffix == ".parquet" else read_lines(path, file)
                position = 0
                for where, record in records:
                    yield split, where, record
                    now = min(file.tell(), path.stat().st_size) if not file.closed else position
                    bar.update(now - position)
                    position = now
            bar.update(path.stat().st_size - position)
        except PermissionError:
            raise UserError(f"{path}: no permission to read it") from None
        except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: damaged or cut short ({error})") from None


def read_lines(path: Path, file: io.BufferedReader) -> Iterator[tuple[str, dict]]:
    """(where, record) of each line of a .jsonl, .jsonl.zst or .jsonl.gz file."""
    codec = {".zst": "zstd", ".gz": "gzip"}.get(path.suffix)
    # pyarrow's streams raise at a file that was cut short; zstandard's would end there without a word.
    lines = io.BufferedReader(pyarrow.CompressedInputStream(file, codec), 1 << 20) if codec else file
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            if line.strip():
                raise UserError(f"{where}: broken JSON ({error})") from None


def read_parquet(path: Path, file: io.BufferedReader) -> Iterator[tuple[str, dict]]:
    """(where, record) of each row, a row group at a time."""
    table = pyarrow.parquet.ParquetFile(file)
    row = 0
    for group in range(table.num_row_groups):
        for batch in table.iter_batches(1024, row_groups=[group]):
            for record in batch.to_pylist():
                row += 1
                yield f"{path}, row {row}", record


def read_hub(args: argparse.Namespace, split_map: dict[str, str], bar: tqdm) -> Iterator[Document]:
    """The documents of a dataset on the Hugging Face hub (or a local folder laid out like one), streamed."""
    import datasets  # only here: it takes a second to import
    for source_split in split_map.values():
        try:
            stream = datasets.load_dataset(args.dataset, split=source_split, revision=args.revision, streaming=True)
            for i, record in enumerate(stream):
                yield source_split, f"{args.dataset} {source_split}, document {i + 1}", record
                bar.update(len(record.get("text") or ""))
        except UserError:
            raise
        except Exception as error:  # the library raises a dozen kinds for a hub that cannot be reached
            reason = str(error).split("\n")[0] or type(error).__name__
            raise UserError(f"cannot read {args.dataset!r} from the hub ({reason}); download its files elsewhere "
                            "and use: --source files --input FOLDER") from None


def read_sample(seed: int, bar: tqdm) -> Iterator[Document]:
    """The embedded synthetic corpus."""
    for i, (split, record) in enumerate(sample_corpus.documents(seed)):
        yield split, f"sample document {i}", record
        bar.update(len(record["text"]))


def domain_of(record: dict, where: str) -> str:
    """The domain that a record names; UserError where it names none that we know."""
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise UserError(f"{where}: no string called 'text'")
    meta = record.get("meta")
    name = meta.get("redpajama_set_name") if isinstance(meta, dict) else None
    if not isinstance(name, str) or name not in SET_NAMES:
        raise UserError(f"{where}: unknown domain meta.redpajama_set_name {name!r}{nearest(str(name), SET_NAMES)} "
                        f"(known: {', '.join(SET_NAMES)}; more are added in data.py)")
    return SET_NAMES[name]


def parse_split_map(text: str) -> dict[str, str]:
    """"train=train,val=test" -> {"train": "train", "val": "test"}: our splits from the source's."""
    pairs = dict(part.split("=", 1) for part in text.split(",") if part.count("=") == 1)
    if not pairs or len(pairs) != text.count(",") + 1 or not set(pairs) <= {"train", "val"} or (
            len(set(pairs.values())) < len(pairs)):
        raise UserError(f"--split {text}: expected two different splits of the source as train=NAME,val=NAME, or one")
    return pairs


def tokenize(documents: Iterator[Document], split_map: dict[str, str], encode: Callable[[str], np.ndarray],
             eot: int, out: Path, shard_tokens: int) -> dict:
    """Write the shards; the manifest's "domains"."""
    ours = {source: split for split, source in split_map.items()}
    writers = {(domain, split): ShardWriter(out, domain, split, shard_tokens)
               for domain in DOMAINS for split in ("train", "val")}
    for source_split, where, record in documents:
        domain, text = domain_of(record, where), record["text"]
        raw = text.encode("utf-8", "replace")
        if source_split is None:
            split = "val" if int.from_bytes(hashlib.sha1(raw).digest()[:4], "big") % HELD_OUT == 0 else "train"
        else:
            if source_split not in ours:
                continue
            split = ours[source_split]
        kind = record["meta"].get("kind")
        writers[domain, split].add(np.append(encode(text), np.uint16(eot)), len(raw), str(kind or ""))
    domains = {}
    for (domain, split), writer in writers.items():
        if shards := writer.close():
            domains.setdefault(domain, {})[split] = shards
    return domains


def table(domains: dict) -> str:
    """Tokens, documents and bytes per domain and split."""
    lines = [f"{'domain':<15}{'split':<7}{'documents':>12}{'MB of text':>12}{'tokens':>17}{'bytes/token':>13}"
             f"{'shards':>8}"]
    for domain, splits in domains.items():
        for split, shards in splits.items():
            documents, n_bytes, tokens = (sum(s[key] for s in shards) for key in ("documents", "bytes", "tokens"))
            lines.append(f"{domain:<15}{split:<7}{documents:>12,}{n_bytes / 1e6:>12,.2f}{tokens:>17,}"
                         f"{n_bytes / tokens:>13.2f}{len(shards):>8,}")
    return "\n".join([*lines, "(tokens: with one end-of-text for each document)"])


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--source", choices=("sample", "files", "hub"), required=True, help="where the documents come from")
    add("--input", nargs="+", metavar="PATH", help=f"files: {', '.join(SUFFIXES)}; folders; glob patterns")
    add("--dataset", default="DKYoon/SlimPajama-6B", help="hub: name, or a folder laid out so (default: %(default)s)")
    add("--revision", help="hub: branch, tag or commit of the dataset")
    add("--split", help="our splits from the source's (default: train=train,val=validation; hub: train=train,val=test)")
    add("--tokenizer", choices=tokenizers.NAMES, default="gpt2", help="bytes: 257 symbols, for a CPU (default: gpt2)")
    add("--out", required=True, help="folder to write")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens per shard (default: %(default)s)")
    add("--seed", type=int, default=0, help="sample: of the corpus (default: 0)")
    args = parser.parse_args()
    if (args.source == "files") != bool(args.input):
        raise UserError("--source files needs --input PATH ..., and the other sources take none")
    if args.shard_tokens < 1:
        raise UserError(f"--shard_tokens {args.shard_tokens}: must be above 0")
    args.split = args.split or ("train=train,val=test" if args.source == "hub" else "train=train,val=validation")
    return args


def choose_files(args: argparse.Namespace, split_map: dict[str, str]) -> list[tuple[Path, str | None]]:
    """The files whose split is asked for; says which are left out."""
    files = find_files(args.input)
    kept = [(path, split) for path, split in files if split is None or split in split_map.values()]
    for name in sorted({split for _, split in files if split} - set(split_map.values())):
        print(f"left out: {sum(split == name for _, split in files)} files of split {name!r} (see --split)")
    seen = {split for _, split in kept}
    if unnamed := sum(split is None for _, split in kept):
        print(f"{unnamed} of {len(kept)} files: no name tells a split; one document in {HELD_OUT} of theirs is for "
              "validation, by a hash of its text")
    if None not in seen and (absent := sorted(set(split_map.values()) - seen)):
        there = ", ".join(sorted({str(split) for _, split in files}))
        raise UserError(f"no file of split {', '.join(absent)} in --input (there: {there}); choose with "
                        "--split train=NAME,val=NAME")
    return kept


def main() -> None:
    args = parse_args()
    split_map, out = parse_split_map(args.split), Path(args.out)
    source = {"sample": {"seed": args.seed, "note": sample_corpus.NOTE}, "files": {"input": args.input},
              "hub": {"dataset": args.dataset, "revision": args.revision}}[args.source]
    settings = {"source": args.source, **source, "split": args.split, "shard_tokens": args.shard_tokens}
    tokenizer = tokenizers.load(args.tokenizer)
    described = {"name": tokenizer.name, "sha256": tokenizer.sha256, "n_vocab": tokenizer.n_vocab,
                 "eot_token": tokenizer.eot_token}
    if (out / "manifest.json").exists():
        there = read_manifest(out)
        if there["source"] != settings or there["tokenizer"] != described:
            raise UserError(f"{out} holds other data (made from {there['source']} with tokenizer "
                            f"{there['tokenizer']['name']}); choose another --out or delete the folder")
        print(f"{out} is complete already; nothing to do\n{table(there['domains'])}")
        return
    files = choose_files(args, split_map) if args.source == "files" else []
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give a folder that can be made") from None
    for leftover in [p for domain in DOMAINS for p in (out / domain).glob("*_[0-9][0-9][0-9][0-9][0-9].*")
                     if p.name.startswith(("train_", "val_"))]:  # shards of an interrupted preparation
        leftover.unlink()
    total = sum(path.stat().st_size for path, _ in files) or None
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"{args.source} -> {args.tokenizer}") as bar:
        documents = {"files": lambda: read_files(files, bar), "hub": lambda: read_hub(args, split_map, bar),
                     "sample": lambda: read_sample(args.seed, bar)}[args.source]()
        domains = tokenize(documents, split_map, tokenizer.encode_to_numpy, tokenizer.eot_token, out, args.shard_tokens)
    if not domains:
        raise UserError("the source holds no document")
    manifest = {"schema": SCHEMA, "tokenizer": described, "dtype": "uint16", "source": settings, "domains": domains}
    write_text(out / "manifest.json", json.dumps(manifest, indent=1))
    print(table(domains))
    print(f"written to {out}" + (f" ({sample_corpus.NOTE})" if args.source == "sample" else ""))


if __name__ == "__main__":
    run(main)
