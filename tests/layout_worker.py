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

from data import Batch
from model import GPT, GPTConfig
from recipe import TrainConfig, settle
from reweight import STRATEGIES
from runtime import distributed
from step import Trainer

G, T, V = 16, 24, 64
# (B, scope, dropout); B must divide G / W
CASES = [
    (16, "global", 0.0),
    (8, "global", 0.0),
    (4, "global", 0.0),
    (2, "global", 0.0),
    (4, "micro", 0.0),
    (4, "global", 0.2),
]
# strategy -> settings; the last one has all that changes the weights of a batch
VARIANTS = {
    **{name: {"reweight": name} for name in STRATEGIES},
    "robust": {
        "reweight": "linupper",
        "reweight_norm": "quantile",
        "max_weight": 1.2,
        "r_start": 2.0,
        "r_steps": 10,
    },
}

WAYS = {
    "loss_chunk": {"loss_chunk": 7},
    "full": {"recompute": "full"},
    "selective, loss_chunk": {"recompute": "selective", "loss_chunk": 40},
}


class Recorder(torch.optim.SGD):
    """Keeps the gradients of its last step and changes nothing."""

    def step(self, closure=None):
        parameters = self.param_groups[0]["params"]
        self.gradients = [distributed.full(p.grad).clone() for p in parameters]


def global_batch(step: int = 0) -> torch.Tensor:
    """(G, T + 1) tokens; rows of different entropy, so that their losses differ."""
    rng = np.random.default_rng(step)
    return torch.from_numpy(np.stack([rng.integers(0, 2 + 60 * i // G, T + 1) for i in range(G)]))


def expected_losses() -> torch.Tensor:
    """(G,) of the variant "robust", as running means of domains would be."""
    return domains() * 0.5


def domains() -> torch.Tensor:
    """(G,) domain of each sample of the global batch."""
    return torch.arange(G) % 3


def batch_of(step: int) -> Batch:
    """This rank's part of a step's global batch."""
    rank, _, W = distributed.ranks()
    rows = global_batch(step)[rank * G // W : (rank + 1) * G // W]
    return Batch(rows[:, :-1], rows[:, 1:], domains(), None)


def small_model(dropout: float) -> GPT:
    torch.manual_seed(1)
    model = GPT(
        GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=T, vocab_size=V, dropout=dropout)
    )
    with torch.no_grad():
        model.wte.weight.mul_(20)  # far from the uniform prediction of a fresh model
    return model


def config_of(B: int, **settings) -> TrainConfig:
    base = TrainConfig(
        device="cpu",
        global_batch_size=G,
        micro_batch_size=B,
        reweight_warmup_steps=0,
        warmup_steps=1,
        max_steps=20,
        learning_rate=1e-3,
        loss_chunk=0,
    )
    return settle(replace(base, **settings), distributed.ranks().world_size)


def one_step(trainer: Trainer, variant: str) -> dict:
    """A step of a variant whose optimizer changes nothing."""
    trainer.config = replace(trainer.config, grad_clip=0.0, **VARIANTS[variant])
    trainer.optimizer = Recorder(trainer.model.parameters(), lr=1.0)
    batch = batch_of(0)
    expected = None
    if variant == "robust":
        expected = trainer.expected_losses(batch.domain, len(batch.x))
    backward = trainer.backward
    trainer.backward = lambda step, x, y, _: backward(step, x, y, expected)
    result = trainer.step(3, batch)
    trainer.backward = backward
    return {
        "gradient": torch.cat([g.flatten() for g in trainer.optimizer.gradients]),
        "norm": result.grad_norm,
        "losses": distributed.gather(result.losses),
        "weights": distributed.gather(result.weights),
    }


def all_variants(dropout: float, B: int, parallel: str, **settings) -> dict[str, dict]:
    """one_step of every variant, each from the same model."""
    trainer = trainer_of(dropout, B, parallel, **settings)
    original = trainer.config
    results = {}
    for variant in VARIANTS:
        trainer.config = original
        results[variant] = one_step(trainer, variant)
    return results


def trainer_of(dropout: float, B: int, parallel: str, **settings) -> Trainer:
    config = config_of(B, parallel=parallel, **settings)
    trainer = Trainer(small_model(dropout), config, 3, torch.device("cpu"))
    # Means of 0, 0.5 and 1 for the three domains: expected_losses() for their samples.
    trainer.domain_losses = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]])
    return trainer


def twenty_steps(B: int, parallel: str, dropout: float = 0.0, **settings) -> dict:
    """Losses of 20 AdamW steps, and whether steps with a NaN loss changed anything."""
    rank, _, W = distributed.ranks()
    trainer = trainer_of(dropout, B, parallel, reweight="linupper", **settings)
    losses = [trainer.step(step, batch_of(step)).losses for step in range(20)]
    before = snapshot(trainer)
    forward = trainer.raw.forward
    last = torch.tensor([0.0] * (B - 1) + [float("nan") if rank == W - 1 else 0.0])[:, None]
    trainer.raw.forward = lambda *args: forward(*args) + last
    for strategy in ("linupper", "uniform"):
        trainer.config = replace(trainer.config, reweight=strategy)
        result = trainer.step(19, batch_of(19))
        assert not result.grad_norm.isfinite() and not result.taken
    return {
        "losses": torch.stack([distributed.gather(row) for row in losses]),
        "unchanged": all(
            torch.equal(a, b) for a, b in zip(before, snapshot(trainer), strict=True)
        ),
    }


def snapshot(trainer: Trainer) -> list[torch.Tensor]:
    """This rank's parameters, moments and step counts."""
    tensors = list(trainer.raw.parameters())
    for state in trainer.optimizer.state.values():
        tensors += state.values()
    return [getattr(t, "_local_tensor", t).detach().clone() for t in tensors]


def main() -> None:
    W = distributed.ranks().world_size
    distributed.setup("cpu")
    results = {}
    for parallel in ("ddp", "fsdp") if W > 1 else ("ddp",):
        for B, scope, dropout in CASES:
            if G % (B * W):
                continue
            case = all_variants(dropout, B, parallel, reweight_scope=scope)
            results[parallel, B, scope, dropout] = case
            if (scope, dropout) == ("global", 0.0):
                results[parallel, B, "train"] = twenty_steps(B, parallel)
        for way, settings in WAYS.items() if W <= 2 else ():
            for dropout in (0.0, 0.2):
                results[parallel, way, dropout] = all_variants(dropout, 4, parallel, **settings)
            results[parallel, way, "train"] = twenty_steps(4, parallel, 0.2, **settings)
        trainer = trainer_of(0.0, 4, parallel, dtype="bfloat16")
        results[parallel, "bfloat16"] = one_step(trainer, "linupper")
        assert all(distributed.full(p).dtype == torch.float32 for p in trainer.raw.parameters())
        del trainer
    if distributed.ranks().rank == 0:
        torch.save(results, sys.argv[1])
    distributed.cleanup()


if __name__ == "__main__":
    main()
