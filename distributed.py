"""The processes of one run: who am I, gather, reduce, print. The only file that calls collectives.

torchrun sets RANK, LOCAL_RANK and WORLD_SIZE; without it there is one process and no process group.
`rank` is global; `local_rank` only picks the device.
"""

import functools
import gc
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from errors import UserError


class Ranks(NamedTuple):
    rank: int
    local_rank: int
    world_size: int


def ranks() -> Ranks:
    """This process's place, from torchrun's environment."""
    given = {name: os.environ.get(name, default) for name, default in
             (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "1"))}
    if not all(re.fullmatch("[0-9]{1,7}", x) for x in given.values()) or int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        there = " ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(f"{there} in the environment: expected numbers, RANK below WORLD_SIZE; start with torchrun, or "
                        "unset them")
    return Ranks(int(given["RANK"]), int(given["LOCAL_RANK"]), int(given["WORLD_SIZE"]))


def setup(device_type: str, timeout_s: float = 600) -> torch.device:
    """Join the process group (nccl on cuda, gloo elsewhere) where torchrun started several; the device to work on.

    timeout_s: a collective that takes longer ends the processes that wait in it.
    """
    device = torch.device("cuda", ranks().local_rank) if device_type == "cuda" else torch.device(device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    if ranks().world_size > 1:
        if lacking := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise UserError(f"WORLD_SIZE={ranks().world_size}, but no {lacking[0]} in the environment; start with "
                            "torchrun, or unset WORLD_SIZE")
        timeout = timedelta(seconds=timeout_s)
        if device_type == "cuda":
            dist.init_process_group("nccl", device_id=device, timeout=timeout)
        else:
            dist.init_process_group("gloo", timeout=timeout)
    return device


def describe_network(device: torch.device) -> None:
    """Rank 0 prints what joins several ranks and how fast: at most 64 MB in an all-reduce, in well under a second."""
    W = ranks().world_size
    if W == 1:
        return
    nodes, backend = W // int(os.environ.get("LOCAL_WORLD_SIZE", W)), dist.get_backend()
    cards = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    settings = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(f"{backend.upper()}_")]

    def seconds(numbers: int) -> float:
        """Of one all-reduce, on the slowest rank, so that all ranks do the same next."""
        values = torch.zeros(numbers, device=device)
        barrier(device)
        began = time.perf_counter()
        dist.all_reduce(values)
        values[0].item()
        took = torch.tensor(time.perf_counter() - began, device=device)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        return took.item()

    seconds(1)  # connects
    latency, numbers = min(seconds(1) for _ in range(5)), 2**18
    while (took := seconds(numbers)) < 0.1 and numbers < 2**24:
        numbers *= 2
    sent = 4 * numbers * 2 * (W - 1) / W  # bytes by each rank, in a ring
    print0(f"network    {backend}, {nodes} {'node' if nodes == 1 else 'nodes'}, "
           f"InfiniBand {', '.join(cards) or 'none'}, {' '.join(settings) or f'no {backend.upper()}_ variable'}; "
           f"all-reduce: {latency * 1e3:.2f} ms for one number, {sent / took / 1e9:.2f} GB/s through each rank for "
           f"{4 * numbers / 1e6:.0f} MB")


def cleanup() -> None:
    """Leave the process group; the caller has let go of the data-parallel model before."""
    if dist.is_initialized():
        gc.collect()  # the wrapper is part of a cycle, and with it alive some processes abort at exit after all is done
        dist.barrier()
        dist.destroy_process_group()


def reported(main: Callable[[], None]) -> Callable[[], None]:
    """main, whose error goes into torchrun's report, and that of a rank which died before those of its peers.

    A rank's death breaks the collectives of the others, often before torchrun sees it. So they wait with their own
    error, and torchrun, which takes the first one for the cause and stops all, names the dead rank.
    """
    @functools.wraps(main)
    def reporting() -> None:
        try:
            main()
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                time.sleep(5)
            raise
    return record(reporting) if "TORCHELASTIC_RUN_ID" in os.environ else reporting


class Agreement:
    """The largest of all ranks' numbers without waiting for the device: a group of the CPUs beside the main one.

    Each call gives what the ranks offered in their previous call, so that the exchange has a step's time.
    """

    def __init__(self, timeout_s: float):
        timeout = timedelta(seconds=timeout_s)
        self.group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self.largest, self.work = torch.zeros(1, dtype=torch.int64), None

    def __call__(self, value: int) -> int:
        if self.group is None:
            return value
        agreed = 0
        if self.work:
            self.work.wait()
            agreed = self.largest.item()
        self.largest.fill_(value)
        self.work = dist.all_reduce(self.largest, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return agreed


class Watchdog:
    """Says on rank 0 which ranks are behind the others, and for how long; the main loop says where it is by `at`.

    A thread of each rank writes the rank's place to the store by which the ranks found each other, which works also
    while a collective hangs. The last word of a rank whose process hangs or is gone is old.
    """

    PLACES = ("evaluating or saving", "reading its batch", "computing")

    def __init__(self, step: int, timeout_s: float):
        self.place, self.late_s, self.ended = step * len(self.PLACES), timeout_s / 20, threading.Event()
        if dist.is_initialized():
            self.store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store())
            self._write(0)
            dist.barrier()  # from here on no thread has to wait for a key
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()

    def at(self, step: int, place: int) -> None:
        """This rank has reached PLACES[place] of a step."""
        self.place = step * len(self.PLACES) + place

    def close(self) -> None:
        self.ended.set()
        if dist.is_initialized():
            self.thread.join(timeout=10)  # or it might ask the store while the process ends

    def _write(self, beat: int) -> None:
        self.store.set(str(dist.get_rank()), f"{self.place} {beat}")

    def _run(self) -> None:
        beat, told = 0, {}  # rank -> seconds that were told last
        places, beats = {}, {}  # rank -> (what it was when it last changed, when that was)
        while not self.ended.wait(self.late_s / 5):
            try:
                self._write(beat := beat + 1)
                keys = [str(r) for r in range(dist.get_world_size() if dist.get_rank() == 0 else 0)]
                words = [tuple(map(int, word.split())) for word in self.store.multi_get(keys)] if keys else []
            except RuntimeError:  # the store's process is gone, and torchrun is stopping all
                return
            now, first = time.monotonic(), max((place for place, _ in words), default=0)
            for r, (place, count) in enumerate(words):
                for seen, value in ((places, place), (beats, count)):
                    if seen.get(r, (None,))[0] != value:
                        seen[r] = value, now
                silent, waited = now - beats[r][1] > self.late_s, now - places[r][1]
                if waited < self.late_s or not (place < first or silent):
                    told[r] = self.late_s / 2
                elif waited > 2 * told[r]:  # again after twice the time
                    told[r] = waited
                    print(f"rank {r} is late: {self._name(place)} since {waited:.0f} s" +
                          (", and its process gives no sign" if silent else f", others {self._name(first)}"),
                          file=sys.stderr, flush=True)

    def _name(self, place: int) -> str:
        step, place = divmod(place, len(self.PLACES))
        return f"{self.PLACES[place]} at step {step}"


def data_parallel(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device, parallel: str,
                  dtype: str = "float32") -> nn.Module:
    """The model with its gradients averaged over the ranks after backward.

    "ddp": every rank holds all of the model. "fsdp": each rank holds 1/W of every parameter, gradient and moment and
    fetches a block's parameters when it is their turn; the model is changed in place. With dtype bfloat16 it fetches a
    block's parameters and averages all gradients in bfloat16; parameters, sums over micro-steps and moments stay
    float32.
    """
    if not dist.is_initialized():
        return model
    if parallel == "fsdp":
        low = torch.bfloat16 if dtype == "bfloat16" else None
        for block in blocks:  # what goes from block to block, and the embeddings, keep their float32
            fully_shard(block, mp_policy=MixedPrecisionPolicy(low, low, cast_forward_inputs=False))
        return fully_shard(model, mp_policy=MixedPrecisionPolicy(None, low, cast_forward_inputs=False))
    # No static_graph: the steps are not one graph. Its first pass would be one without gradients or without an average.
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                   gradient_as_bucket_view=True)


def no_sync(model: nn.Module, skip: bool):
    """Skip the average of gradients inside this context; must hold for the forward *and* the backward pass.

    FSDP averages in every micro-step all the same: the sum of averages is the average of sums, and holding the
    gradients back would need room for all of them on every rank.
    """
    return model.no_sync() if skip and isinstance(model, DistributedDataParallel) else nullcontext()


def full(value: Tensor) -> Tensor:
    """The whole of a tensor that FSDP has spread over the ranks; any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def get_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """A copy of the whole model and optimizer state by parameter name on the CPU of rank 0, empty elsewhere.

    All ranks call it.
    """
    state = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return tree_map_only(Tensor, copied, state) if next(model.parameters()).device.type == "cpu" else state


def copied(value: Tensor) -> Tensor:
    """What offloading to the CPU leaves out where a tensor is there already: the next step must not change it."""
    return value.detach().clone()


def set_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: tuple[dict, dict]) -> None:
    """Put what get_state gave on rank 0 into this rank's model and optimizer, whatever the number of ranks."""
    gradients = [parameter.grad for parameter in model.parameters()]
    optimizer.zero_grad()  # torch makes no room for the moments where there are gradients
    set_state_dict(model, optimizer, model_state_dict=state[0], optim_state_dict=state[1],
                   options=StateDictOptions(full_state_dict=True))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient


def gather(values: Tensor) -> Tensor:
    """(n,) of each rank -> (W * n,) of all ranks in the order of their ranks, on every rank."""
    if not dist.is_initialized():
        return values
    out = values.new_empty(dist.get_world_size() * len(values))
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    all_gather(out, values.contiguous())
    return out


def reduce_sum(values: Tensor) -> Tensor:
    """The sum over all ranks, on every rank; in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def barrier(device: torch.device) -> None:
    """Wait for all work of this rank's device and for all ranks; for timing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if dist.is_initialized():
        dist.barrier()


def print0(*args, **kwargs) -> None:
    """print on rank 0 only."""
    if ranks().rank == 0:
        print(*args, **kwargs, flush=True)
