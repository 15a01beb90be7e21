"""The processes of one run: who am I, gather, reduce, print. The only file that calls collectives.

torchrun sets RANK, LOCAL_RANK and WORLD_SIZE; without it there is one process and no process group.
`rank` is global; `local_rank` only picks the device.
"""

import functools
import gc
import os
import re
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

from cli import UserError

# torchrun's variables, and their values for a single process.
SINGLE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


class Ranks(NamedTuple):
    rank: int
    local_rank: int
    world_size: int


def ranks() -> Ranks:
    """This process's place among the others, from torchrun's environment."""
    values = {name: os.environ.get(name, default) for name, default in SINGLE_PROCESS.items()}
    are_numbers = all(re.fullmatch("[0-9]{1,7}", value) for value in values.values())
    if not are_numbers or int(values["RANK"]) >= int(values["WORLD_SIZE"]):
        shown = " ".join(f"{name}={value}" for name, value in values.items())
        raise UserError(
            f"{shown} in the environment: expected numbers, RANK below WORLD_SIZE; start with "
            "torchrun, or unset them"
        )
    return Ranks(int(values["RANK"]), int(values["LOCAL_RANK"]), int(values["WORLD_SIZE"]))


def setup(device_type: str, timeout_s: float = 600) -> torch.device:
    """The device to work on; several ranks join a process group (nccl on cuda, else gloo).

    timeout_s: a collective that takes longer ends the processes that wait in it.
    """
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", ranks().local_rank)
        torch.cuda.set_device(device)
    if ranks().world_size > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(
                    f"WORLD_SIZE={ranks().world_size}, but no {name} in the environment; start "
                    "with torchrun, or unset WORLD_SIZE"
                )
        timeout = timedelta(seconds=timeout_s)
        if device_type == "cuda":
            dist.init_process_group("nccl", device_id=device, timeout=timeout)
        else:
            join_by_gloo(timeout)
    return device


def join_by_gloo(timeout: timedelta) -> None:
    """UserError where this node cannot reach the others at the address that its name stands for."""
    try:
        dist.init_process_group("gloo", timeout=timeout)
    except RuntimeError as error:
        node = socket.gethostname()
        address = address_of(node)
        if ranks().world_size == int(os.environ["LOCAL_WORLD_SIZE"]) or is_reachable(address):
            raise
        raise UserError(
            f"this node's name {node} stands for {address}, where no other node reaches it "
            f"({str(error).splitlines()[0]}); set GLOO_SOCKET_IFNAME to the network's interface "
            "on every node (ip addr lists them)"
        ) from None


def address_of(node: str) -> str:
    try:
        return socket.gethostbyname(node)
    except OSError:
        return "no address"


def is_reachable(address: str) -> bool:
    """Whether other nodes may reach an address; many systems give their own name 127.0.1.1."""
    return address[:1].isdigit() and not address.startswith("127.")


def cleanup() -> None:
    """Leave the process group. The caller must have dropped the data-parallel model before."""
    if dist.is_initialized():
        # The wrapper is part of a cycle, and with it alive some processes abort at exit.
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def reported(main: Callable[[], None]) -> Callable[[], None]:
    """`main` with its error in torchrun's report, where the rank that died first is named.

    A rank's death breaks the collectives of the others, often before torchrun sees it. So the
    others wait before they fail; torchrun takes the first failure for the cause and stops all.
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
    """The largest of all ranks' numbers, without waiting for the device.

    It uses a process group of the CPUs beside the main one. Each call gives what the ranks offered
    in their previous call, so that the exchange has a step's time.
    """

    def __init__(self, timeout_s: float):
        self.group = None
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self.largest = torch.zeros(1, dtype=torch.int64)
        self.work = None

    def __call__(self, value: int) -> int:
        if self.group is None:
            return value
        agreed = 0
        if self.work:
            self.work.wait()
            agreed = self.largest.item()
        self.largest.fill_(value)
        self.work = dist.all_reduce(
            self.largest, dist.ReduceOp.MAX, group=self.group, async_op=True
        )
        return agreed


def data_parallel(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    device: torch.device,
    parallel: str,
    dtype: str = "float32",
) -> nn.Module:
    """The model on the device, with its gradients averaged over the ranks after backward.

    A model on "meta" gets its memory here, of each rank's share alone; its weights are undefined.

    "ddp": every rank holds all of the model. The other three change the model in place. "fsdp":
    each rank holds 1/W of every parameter, gradient and moment, and fetches a block's parameters
    when it is their turn. "zero2": parameters that were fetched stay until backward has used them.
    "hsdp": as fsdp, but W is the ranks of a node, and the nodes have copies of each other.
    """
    if parallel != "ddp" and dist.is_initialized():
        return place(sharded(model, blocks, device, parallel, dtype), device)
    place(model, device)
    if not dist.is_initialized():
        return model
    device_ids = [device.index] if device.type == "cuda" else None
    # No static_graph: passes without gradients and passes without an average are other graphs.
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """The model moved to the device; one on "meta" gets memory there, with undefined numbers."""
    if next(model.parameters()).is_meta:
        return model.to_empty(device=device)
    return model.to(device)


def sharded(
    model: nn.Module, blocks: Iterable[nn.Module], device: torch.device, parallel: str, dtype: str
) -> nn.Module:
    """The model by torch's FSDP2, for all `parallel` but "ddp".

    With dtype bfloat16 parameters are fetched and gradients averaged in bfloat16; parameters, sums
    over micro-steps and moments stay float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # half a second

    low = torch.bfloat16 if dtype == "bfloat16" else None
    # Activations between blocks, and the embeddings, stay float32.
    block_policy = MixedPrecisionPolicy(low, low, cast_forward_inputs=False)
    model_policy = MixedPrecisionPolicy(None, low, cast_forward_inputs=False)
    settings = {"reshard_after_forward": parallel != "zero2"}
    if parallel == "hsdp":
        n = n_shards(parallel, dist.get_world_size())
        settings["mesh"] = dist.init_device_mesh(
            device.type, (dist.get_world_size() // n, n), mesh_dim_names=("node", "rank")
        )
    for block in blocks:
        fully_shard(block, mp_policy=block_policy, **settings)
    return fully_shard(model, mp_policy=model_policy, **settings)


def n_shards(parallel: str, world_size: int) -> int:
    """The number of ranks that share one copy of the model."""
    if parallel == "ddp":
        return 1
    if parallel == "hsdp":  # those of a node
        return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return world_size


def no_sync(model: nn.Module, skip: bool):
    """A context in which gradients are not averaged; for the forward *and* the backward pass.

    FSDP averages in every micro-step all the same: the sum of averages is the average of sums, and
    to hold the gradients back would need room for all of them on every rank.
    """
    if skip and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def to_host(tensors: list[Tensor]) -> tuple[list[Tensor], torch.cuda.Event | None]:
    """Copies on the CPU, and what to wait for before they are read; None: nothing."""
    if tensors[0].device.type != "cuda":
        return [tensor.cpu() for tensor in tensors], None
    copies = []
    for tensor in tensors:
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copies.append(pinned.copy_(tensor, non_blocking=True))
    arrived = torch.cuda.Event()
    arrived.record()
    return copies, arrived


def full(value: Tensor) -> Tensor:
    """The whole of a tensor that FSDP has spread over the ranks; any other tensor unchanged."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def gather(values: Tensor) -> Tensor:
    """(n,) of each rank -> (W * n,) of all ranks in the order of their ranks, on every rank."""
    if not dist.is_initialized():
        return values
    gathered = values.new_empty(dist.get_world_size() * len(values))
    # Renamed in torch 2.13.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered, values.contiguous())
    return gathered


def gather_objects(value: Any) -> list:
    """A picklable value of each rank, in the order of their ranks, on every rank; waits for all."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


class Team:
    """Ranks 0 to n - 1, by a process group of their CPUs: a thread of each may call gather.

    All ranks make it together.
    """

    def __init__(self, n: int, timeout_s: float = 600):
        self.rank, self.n, self.group = ranks().rank, n, None
        if n > 1:
            timeout = timedelta(seconds=timeout_s)
            self.group = dist.new_group(list(range(n)), timeout, backend="gloo")

    def gather(self, value: Any) -> list:
        """A picklable value of each member, on every one of them; waits for all."""
        gathered = [value] * self.n
        if self.group is not None:
            dist.all_gather_object(gathered, value, group=self.group)
        return gathered


def does_for_node() -> bool:
    """Whether this rank does what one rank of each node does for all of them; rank 0 always is."""
    return ranks().rank == 0 or ranks().local_rank == 0


def do_for_others(work: Callable[[], Any], is_worker: bool) -> Any:
    """The result of `work`, done by some ranks, on all: their own, and for the others rank 0's.

    A UserError of any rank is raised on all. All ranks call it; rank 0 must be a worker. Without a
    process group every process does its own work.
    """
    if not dist.is_initialized():
        return work()
    result, error = None, ""
    if is_worker:
        try:
            result = work()
        except UserError as mistake:
            error = str(mistake)
    of_all = gather_objects((result, error))
    errors = [error for _, error in of_all if error]
    if errors:
        raise UserError(errors[0])
    return result if is_worker else of_all[0][0]


def reduce_sum(values: Tensor) -> Tensor:
    """The sum over all ranks, on every rank; in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def reduce_max(values: Tensor) -> Tensor:
    """The maximum over all ranks, on every rank; in place."""
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def barrier(device: torch.device) -> None:
    """Wait for all work of this rank's device and for all ranks; for timing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wait_for_all()


def wait_for_all() -> None:
    """Wait until every rank has come to this call."""
    if dist.is_initialized():
        dist.barrier()


def backend() -> str:
    """nccl or gloo."""
    return dist.get_backend()


def shared_store(name: str) -> dist.Store | None:
    """The key-value store of all ranks, under a prefix; None for one process."""
    if not dist.is_initialized():
        return None
    return dist.PrefixStore(name, dist.distributed_c10d._get_default_store())


def print0(*args, **kwargs) -> None:
    """print on rank 0 only."""
    if ranks().rank == 0:
        print(*args, **kwargs, flush=True)
