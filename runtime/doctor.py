"""What a bug report needs, and what is wrong with this machine: python train.py --doctor.

First torch's own report on the environment (torch.utils.collect_env). Then a line for each check
of ours: ok, warning (it may work, but look at it) or wrong (a run would stop there). Under
torchrun, the network between the ranks is measured too. Exit code 1 if anything is wrong.
"""

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.utils import collect_env

import data
from cli import UserError
from corpus import tokenizer
from corpus.manifest import data_hash, read_manifest
from families import SIZES, build_empty
from recipe import TrainConfig
from runtime import distributed
from runtime.distributed import print0
from runtime.metrics import versions

ROOT = Path(__file__).parents[1]
Line = tuple[str, str, str]  # "ok", "warning" or "wrong"; what was checked; what it is


def examine(config: TrainConfig) -> None:
    """Print everything for a config that is not settled; exit code 1 where something is wrong."""
    try:
        is_first = distributed.ranks().rank == 0
    except UserError:  # the launcher's variables are wrong, which is one of the lines below
        is_first = True
    if is_first:
        print(collect_env.get_pretty_env_info())
    checks = [code, packages, ranks, gpus, limits, out_dir, tokenizers, data_dir]
    marks = []
    for check in checks:
        try:
            for mark, what, text in check(config):
                marks.append(mark)
                print_line(is_first, mark, what, text)
        except (UserError, OSError) as error:
            marks.append("wrong")
            print_line(is_first, "wrong", check.__name__, str(error))
    if is_first:
        print(f"{marks.count('wrong')} wrong, {marks.count('warning')} warnings", flush=True)
    if "wrong" in marks:
        sys.exit(1)
    network(config)


def print_line(is_first: bool, mark: str, what: str, text: str) -> None:
    if is_first:
        print(f"{mark:<9}{what:<16}{text}", flush=True)


def code(config: TrainConfig) -> Iterator[Line]:
    """The command, and the commit with the number of files that differ from it."""
    yield "ok", "command", versions()["command"]
    commit = versions()["git_commit"]
    if not commit:
        yield "warning", "commit", "unknown: no git, or not a clone"
        return
    git = ["git", "status", "--porcelain", "-uno"]
    changes = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    if changes:
        yield "warning", "commit", f"{commit}, {len(changes)} files differ from it"
    else:
        yield "ok", "commit", commit


def packages(config: TrainConfig) -> Iterator[Line]:
    """Those of requirements.txt are needed; the others are for evaluation, export and tests."""
    for file in sorted(ROOT.glob("requirements*.txt"), key=lambda path: len(path.name)):
        for name in re.findall(r"^[A-Za-z][\w.-]*", file.read_text(), re.MULTILINE):
            try:
                yield "ok", name, version(name)
            except PackageNotFoundError:
                mark = "wrong" if file.name == "requirements.txt" else "ok"
                yield mark, name, f"not installed: pip install -r {file.name}"


def ranks(config: TrainConfig) -> Iterator[Line]:
    """This process's place, from the launcher's environment, and where others find this node."""
    rank, local_rank, world_size = distributed.ranks()
    yield "ok", "ranks", f"rank {rank} of {world_size}, local rank {local_rank}"
    address = distributed.address_of(socket.gethostname())
    text = f"{socket.gethostname()} is {address}"
    if distributed.is_reachable(address) or os.environ.get("GLOO_SOCKET_IFNAME"):
        yield "ok", "address", text
    else:
        remedy = "for several nodes set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        mark = "warning" if world_size > int(os.environ.get("LOCAL_WORLD_SIZE", 1)) else "ok"
        yield mark, "address", f"{text}, where no other node finds it; {remedy}"


def gpus(config: TrainConfig) -> Iterator[Line]:
    """What collect_env leaves out: free memory, bfloat16, attention, a torch without CUDA."""
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            mark = "wrong" if config.device == "cuda" else "warning"
            build = f"torch {torch.__version__} may be built for another CUDA"
            yield mark, "GPUs", f"none, though a driver is installed: {build}"
        elif config.device == "cuda":
            yield "wrong", "GPUs", "none; --device cuda needs one"
        else:
            yield "ok", "GPUs", "none"
        return
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        mark = "ok" if free > 0.9 * total else "warning"
        name = torch.cuda.get_device_name(i)
        yield mark, f"GPU {i}", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if not torch.distributed.is_nccl_available():
        yield "wrong", "NCCL", "not in this build of torch; several GPUs need it"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        yield "warning", "bfloat16", "no: float32 is used, at a fraction of the speed"
    has_flash = torch.backends.cuda.is_flash_attention_available()
    if not has_flash or torch.cuda.get_device_capability() < (8, 0):
        yield "warning", "flash attention", "no: attention takes more memory"


def limits(config: TrainConfig) -> Iterator[Line]:
    """Open files: 64 shards a split, sockets to all ranks. Locked memory: for InfiniBand."""
    locked = 2**26 if torch.cuda.is_available() else 0
    yield limit("open files", resource.RLIMIT_NOFILE, 1024)
    yield limit("locked memory", resource.RLIMIT_MEMLOCK, locked)


def limit(what: str, number: int, least: int) -> Line:
    """The check of a limit of this process, as `ulimit` sets it."""
    soft, hard = resource.getrlimit(number)
    if soft == resource.RLIM_INFINITY:
        return "ok", what, "unlimited"
    highest = "" if hard == resource.RLIM_INFINITY else f", at most {hard:,}"
    return "warning" if soft < least else "ok", what, f"{soft:,}{highest}"


def out_dir(config: TrainConfig) -> Iterator[Line]:
    """Whether out_dir can be written, and has room for the checkpoints."""
    folder = Path(config.out_dir or "runs").absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    shape = replace(SIZES.get(config.model, SIZES["124m"]), block_size=config.block_size)
    n_parameters = build_empty(shape).n_parameters()
    checkpoint_bytes = 12 * n_parameters  # float32: weights and two moments
    needed = checkpoint_bytes * (config.keep_checkpoints + 1)
    free = shutil.disk_usage(existing).free
    text = f"{folder}, {free / 1e9:.1f} GB free, checkpoints take up to {needed / 1e9:.1f} GB"
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield "wrong", "out_dir", f"{text}; {existing} is no folder that may be written"
    else:
        yield "ok" if free > needed else "wrong", "out_dir", text


def tokenizers(config: TrainConfig) -> Iterator[Line]:
    for name in tokenizer.NAMES:
        yield "ok", f"tokenizer {name}", tokenizer.load(name).sha256[:16]


def data_dir(config: TrainConfig) -> Iterator[Line]:
    """Whether every shard exists and is as long as the manifest says."""
    manifest = read_manifest(config.data_dir)
    splits = {
        name: data.Split(config.data_dir, manifest, name, config.block_size)
        for name in ("train", "val")
    }
    yield "ok", "data_dir", f"{config.data_dir}, fingerprint {data_hash(manifest)}"
    name, sha256 = manifest["tokenizer"]["name"], manifest["tokenizer"]["sha256"]
    try:
        tokenizer.find(sha256, config.data_dir)
        yield "ok", "its tokenizer", f"{name}, {sha256[:16]}"
    except UserError:
        text = f"{name}, {sha256[:16]}, none of the tokenizers here, and no copy in data_dir"
        yield "warning", "its tokenizer", text
    for split_name, split in splits.items():
        counts = ", ".join(f"{domain} {n:,}" for domain, n in split.tokens.items())
        yield "ok" if counts else "wrong", f"{split_name} tokens", counts or "none"
    data.mixture_weights(config.mixture, splits["train"])
    yield "ok", "mixture", config.mixture


def network(config: TrainConfig) -> None:
    """Print what joins several ranks and how fast it is; takes under a second."""
    W = distributed.ranks().world_size
    if W == 1:
        return
    device_type = config.device
    if device_type == "auto":
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    device = distributed.setup(device_type, config.timeout_s)
    nodes = W // int(os.environ.get("LOCAL_WORLD_SIZE", W))
    backend = distributed.backend()
    cards = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    prefix = f"{backend.upper()}_"
    settings = [f"{key}={value}" for key, value in os.environ.items() if key.startswith(prefix)]

    all_reduce_seconds(1, device)  # connects the ranks
    latency = min(all_reduce_seconds(1, device) for _ in range(5))
    numbers = 2**18
    seconds = all_reduce_seconds(numbers, device)
    while seconds < 0.1 and numbers < 2**24:
        numbers *= 2
        seconds = all_reduce_seconds(numbers, device)
    size = 4 * numbers
    sent = size * 2 * (W - 1) / W  # bytes by each rank, in a ring
    print0(
        f"network    {backend}, {nodes} {'node' if nodes == 1 else 'nodes'}, InfiniBand "
        f"{', '.join(cards) or 'none'}, {' '.join(sorted(settings)) or f'no {prefix} variable'}; "
        f"all-reduce: {latency * 1e3:.2f} ms for one number, {sent / seconds / 1e9:.2f} GB/s "
        f"through each rank for {size / 1e6:.0f} MB"
    )
    distributed.cleanup()


def all_reduce_seconds(numbers: int, device: torch.device) -> float:
    """Duration of an all-reduce of float32 on the slowest rank; the same value on all ranks."""
    values = torch.zeros(numbers, device=device)
    distributed.barrier(device)
    began = time.perf_counter()
    distributed.reduce_sum(values)
    values[0].item()
    seconds = torch.tensor(time.perf_counter() - began, device=device)
    return distributed.reduce_max(seconds).item()
