"""Steps of every strategy on this rank as train.py does them, in all layouts of W ranks; rank 0 saves what came out.

    torchrun --nproc_per_node W tests/layout_worker.py OUT.pt

OUT.pt: {(parallel, B, scope, dropout): {strategy: gradient, norm, losses, weights}}, under (parallel, B, "train") the
losses of 20 steps and what a step with a NaN on the last rank did; both for B = 4 and each way of saving memory under
(parallel, way, dropout) and (parallel, way, "train"), and one step in bfloat16 under (parallel, "bfloat16").
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import distributed
import train
from model import GPT, GPTConfig
from reweight import STRATEGIES

G, T, V = 16, 24, 64
# (B, scope, dropout); B must divide G / W
CASES = [(16, "global", 0.0), (8, "global", 0.0), (4, "global", 0.0), (2, "global", 0.0), (4, "micro", 0.0),
         (4, "global", 0.2)]
# strategy -> settings; the last one has all that changes the weights of a batch
VARIANTS = {**{name: {"reweight": name} for name in STRATEGIES},
            "robust": {"reweight": "linupper", "reweight_norm": "quantile", "max_weight": 1.2, "r_start": 2.0,
                       "r_steps": 10}}

WAYS = {"loss_chunk": {"loss_chunk": 7}, "full": {"recompute": "full"},
        "selective, loss_chunk": {"recompute": "selective", "loss_chunk": 40}}


class Recorder(torch.optim.SGD):
    """Keeps the gradients of its last step and changes nothing."""

    def step(self, closure=None):
        self.gradients = [distributed.full(p.grad).clone() for group in self.param_groups for p in group["params"]]


def global_batch(step: int = 0) -> torch.Tensor:
    """(G, T + 1) tokens; rows of different entropy, so that their losses differ."""
    rng = np.random.default_rng(step)
    return torch.from_numpy(np.stack([rng.integers(0, 2 + 60 * i // G, T + 1) for i in range(G)]))


def expected_losses() -> torch.Tensor:
    """(G,) of the variant "robust", as running means of domains would be."""
    return torch.arange(G) % 3 * 0.5


def small_model(dropout: float, loss_chunk: int = 0, recompute: str = "none") -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=T, vocab_size=V, dropout=dropout))
    with torch.no_grad():
        model.wte.weight.mul_(20)  # far from the uniform prediction of a fresh model
    model.loss_chunk, model.recompute = loss_chunk, recompute
    return model


def config_of(B: int, W: int, **settings) -> train.TrainConfig:
    base = train.TrainConfig(device="cpu", global_batch_size=G, micro_batch_size=B, reweight_warmup_steps=0,
                             warmup_steps=1, max_steps=20, learning_rate=1e-3)
    return train.settle(replace(base, **settings), W)


def one_step(model: torch.nn.Module, variant: str, B: int, scope: str, dtype: str = "float32") -> dict:
    rank, _, W = distributed.ranks()
    mine = slice(rank * G // W, (rank + 1) * G // W)
    config = config_of(B, W, reweight_scope=scope, grad_clip=0.0, dtype=dtype, **VARIANTS[variant])
    optimizer, rows = Recorder(model.parameters(), lr=1.0), global_batch()[mine]
    expected = expected_losses()[mine] if variant == "robust" else None
    losses, weights, norm = train.train_step(model, optimizer, rows[:, :-1], rows[:, 1:], 3, config, expected)
    return {"gradient": torch.cat([g.flatten() for g in optimizer.gradients]), "norm": norm,
            "losses": distributed.gather(losses), "weights": distributed.gather(weights)}


def twenty_steps(raw: GPT, model: torch.nn.Module, B: int) -> dict:
    """Losses of 20 AdamW steps, then a step whose last sample has a NaN loss: did it change anything on this rank?"""
    rank, _, W = distributed.ranks()
    config, mine = config_of(B, W, reweight="linupper"), slice(rank * G // W, (rank + 1) * G // W)
    optimizer, losses = train.make_optimizer(raw, config), []
    for step in range(20):
        rows = global_batch(step)[mine]
        losses.append(train.train_step(model, optimizer, rows[:, :-1], rows[:, 1:], step, config)[0])
    before = snapshot(raw, optimizer)
    for strategy in ("linupper", "uniform"):
        poisoned = replace(config, reweight=strategy)
        forward = raw.forward
        raw.forward = lambda *args, forward=forward: forward(*args) + (
            torch.tensor([0.0] * (B - 1) + [float("nan") if rank == W - 1 else 0.0])[:, None])
        _, _, norm = train.train_step(model, optimizer, rows[:, :-1], rows[:, 1:], 19, poisoned)
        raw.forward = forward
        assert not norm.isfinite()
    after = snapshot(raw, optimizer)
    return {"losses": torch.stack([distributed.gather(row) for row in losses]),
            "unchanged": all(torch.equal(a, b) for a, b in zip(before, after, strict=True))}


def snapshot(raw: GPT, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """This rank's parameters, moments and step counts."""
    tensors = [*raw.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    return [getattr(t, "_local_tensor", t).detach().clone() for t in tensors]


def main() -> None:
    _, _, W = distributed.ranks()
    device, results = distributed.setup("cpu"), {}
    for parallel in ("ddp", "fsdp") if W > 1 else ("ddp",):
        for B, scope, dropout in CASES:
            if G % (B * W):
                continue
            raw = small_model(dropout)
            model = distributed.data_parallel(raw, raw.h, device, parallel)
            results[parallel, B, scope, dropout] = {v: one_step(model, v, B, scope) for v in VARIANTS}
            if (scope, dropout) == ("global", 0.0):
                results[parallel, B, "train"] = twenty_steps(raw, model, B)
            del model, raw
        for way, settings in WAYS.items() if W <= 2 else ():
            for dropout in (0.0, 0.2):
                raw = small_model(dropout, **settings)
                model = distributed.data_parallel(raw, raw.h, device, parallel)
                results[parallel, way, dropout] = {v: one_step(model, v, 4, "global") for v in VARIANTS}
            results[parallel, way, "train"] = twenty_steps(raw, model, 4)
            del model, raw
        raw = small_model(0.0)
        model = distributed.data_parallel(raw, raw.h, device, parallel, "bfloat16")
        results[parallel, "bfloat16"] = one_step(model, "linupper", 4, "global", "bfloat16")
        assert all(distributed.full(p).dtype == torch.float32 for p in raw.parameters())
        del model, raw
    if distributed.ranks().rank == 0:
        torch.save(results, sys.argv[1])
    distributed.cleanup()


if __name__ == "__main__":
    main()
