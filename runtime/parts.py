"""What a rank holds of a model that several ranks share, and how it gets it from whole tensors.

"ddp" gives every rank all of the model, in one part. The others spread each parameter, gradient and
moment over n ranks by rows, as torch.chunk does: part i has the rows from i * ceil(rows / n) on.
Parts laid end to end are the whole, so a run continues with any number of ranks: each takes its own
rows from those that another number of ranks has written.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from cli import UserError
from runtime import distributed

State = tuple[dict, dict]  # tensors of the model and of the optimizer, by parameter name
Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer]
Weights = Iterable[tuple[str, list[Tensor]]]  # names, and the rows of each part


class Share(NamedTuple):
    """Part i of n."""

    i: int
    n: int


ALL = Share(0, 1)


def share_of_rank(parallel: str) -> Share:
    """The part that this rank holds; with hsdp the ranks of other nodes hold the same ones."""
    rank, _, world_size = distributed.ranks()
    n = distributed.n_shards(parallel, world_size)
    return Share(rank % n, n)


def own_state(model: nn.Module, optimizer: Optimizers) -> State:
    """This rank's rows of the state: the very tensors that the steps change, not copies."""
    from torch.distributed.checkpoint.state_dict import get_state_dict  # half a second

    # torch makes the moments of a new optimizer here, but not where there are gradients.
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    state = get_state_dict(model, optimizer)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    return tree_map_only(Tensor, own_rows, state)


def own_rows(value: Tensor) -> Tensor:
    """What this rank has of a tensor that FSDP has spread; any other tensor unchanged."""
    return value.detach().to_local() if hasattr(value, "to_local") else value.detach()


def joined(of_parts: list[dict]) -> dict:
    """The whole of what the parts hold."""

    def join(*values):
        is_spread = isinstance(values[0], Tensor) and values[0].dim() > 0
        return torch.cat(values) if is_spread else values[0]

    return tree_map(join, *of_parts)


def copy_to_host(state: State) -> State:
    """A copy that the next steps do not change."""
    return tree_map_only(Tensor, lambda value: value.to("cpu", copy=True), state)


@torch.no_grad()
def load(model: nn.Module, optimizer: Optimizers, parts: list[State], share: Share) -> None:
    """Take this rank's rows from the parts of a checkpoint."""
    of_model, of_optimizer = own_state(model, optimizer)
    take_rows(of_model, [weights for weights, _ in parts], share)
    take_rows(of_optimizer["state"], [moments["state"] for _, moments in parts], share)
    _, first = parts[0]
    for group, saved in zip(optimizer.param_groups, first["param_groups"], strict=True):
        group["lr"] = saved["lr"]  # so that to save it again gives the same file


def take_rows(own: dict, parts: list[dict], share: Share) -> None:
    """`load` for nested dictionaries."""
    for name, value in own.items():
        if any(name not in part for part in parts):
            raise UserError(f"the checkpoint is of another model or optimizer: it lacks {name}")
        of_parts = [part[name] for part in parts]
        if isinstance(value, dict):
            take_rows(value, of_parts, share)
        else:
            copy_rows(value, of_parts, share, name)


@torch.no_grad()
def fill(model: nn.Module, weights: Weights, share: Share = ALL) -> None:
    """Give all parameters of a model their values; this rank takes its rows of each."""
    parameters = dict(model.named_parameters())
    for name, of_parts in weights:
        copy_rows(own_rows(parameters.pop(name)), of_parts, share, name)
    assert not parameters, f"no values for {', '.join(parameters)}"


def copy_rows(own: Tensor, parts: list[Tensor], share: Share, name: str) -> None:
    """Rows of the whole, which the parts are, into this rank's tensor."""
    if own.dim() == 0:  # a step count, the same in all parts
        own.copy_(parts[0])
        return
    n_rows = sum(len(part) for part in parts)
    chunk = math.ceil(n_rows / share.n)
    first = min(share.i * chunk, n_rows)
    expected = (min(chunk, n_rows - first), *parts[0].shape[1:])
    if own.shape != expected:
        raise UserError(
            f"the checkpoint is of another model: {name} has {expected} there, {tuple(own.shape)} "
            "here"
        )
    start = 0  # the part's first row in the whole
    for part in parts:
        a, b = max(first, start), min(first + len(own), start + len(part))
        if a < b:
            own[a - first : b - first].copy_(part[a - start : b - start])
        start += len(part)
