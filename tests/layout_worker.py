"""Steps of every strategy as train.py does them, in all layouts of W ranks; rank 0 saves them.

The file OUT.pt holds a dictionary. Its keys and values, for every layout of W ranks:

    (parallel, B, scope, dropout)    {variant: gradient, norm, losses, weights of one step}
    (parallel, way, dropout)         the same for each way of saving memory, with B = 4
    (parallel, B or way, "train")    what several steps do, and whether a NaN changes anything
    (parallel, B, "muon")            the same with Muon
    (parallel, B, "llama")           one step of some variants of a Llama with grouped queries
    (parallel, way, "llama")         the same for each way of saving memory, with B = 4
    (parallel, B, "llama, train")    what several steps of it do
    (parallel, "bfloat16")           one step in bfloat16

tests/test_distributed.py starts this file with W ranks and the argument OUT.pt.
"""

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from data import Batch
from eval import score_windows
from families import build
from llama import LlamaConfig
from model import GPTConfig, LanguageModel
from recipe import TrainConfig, settle
from reweight import STRATEGIES
from runtime import checkpoint, distributed, reference
from step import Trainer, View

G, T, V = 16, 24, 64
STEPS, BATCHES = 4, 2  # of a training; each batch comes twice, so that its loss can fall
# (W, parallel, B); the number of micro-steps is A = G / (W * B).
LAYOUTS = [
    (1, "ddp", 16),
    (1, "ddp", 4),
    (1, "ddp", 2),
    (2, "ddp", 8),
    (2, "ddp", 4),
    (2, "fsdp", 8),
    (2, "fsdp", 4),
    (2, "zero2", 4),
    (4, "ddp", 4),
    (4, "ddp", 2),
    (4, "fsdp", 4),
    (4, "fsdp", 2),
    (4, "hsdp", 2),  # two nodes of two ranks
]
MICRO_LAYOUTS = [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "ddp")]  # with B = 4
# Settings by variant: every strategy, and all at once that changes the weights of a batch.
ROBUST = {
    "reweight": "linupper",
    "reweight_norm": "quantile",
    "max_weight": 1.2,
    "r_start": 2.0,
    "r_steps": 10,
}
VARIANTS = {name: {"reweight": name} for name in STRATEGIES}
VARIANTS["robust"] = ROBUST
CONTROLS = ("shuffled", "within")
for control in CONTROLS:
    VARIANTS[control] = {
        "reweight": "linupper",
        "reweight_unit": "byte",
        "reweight_control": control,
    }
REFERENCES = ("reference run", "reference file")
for form in REFERENCES:
    VARIANTS[form] = {"reweight": "linupper", "reweight_unit": "byte"}
# Dropout and the ways of saving memory do not depend on the strategy, so three are enough.
FEW_VARIANTS = ("uniform", "linupper", "robust")
LLAMA_VARIANTS = (*FEW_VARIANTS, "shuffled", "within", "reference file")
WAYS = {
    "loss_chunk": {"loss_chunk": 7},
    "full": {"recompute": "full"},
    "selective, loss_chunk": {"recompute": "selective", "loss_chunk": 40},
}


BYTE_LENGTHS = torch.arange(V) % 7  # of the tokens
DOMAINS = ("a", "b", "c")


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
    """(G,) of the variant "robust": the running mean loss of each sample's domain."""
    return domains() * 0.5


def domains() -> torch.Tensor:
    """(G,) domain of each sample of the global batch, in another pattern in each micro-batch."""
    return torch.arange(G) ** 2 // 5 % 3


def batch_of(step: int) -> Batch:
    """This rank's part of a step's global batch."""
    rank, _, W = distributed.ranks()
    rows = global_batch(step)[rank * G // W : (rank + 1) * G // W]
    pairs = np.stack([domains(), np.arange(G)], axis=1)
    return Batch(rows[:, :-1], rows[:, 1:], domains(), pairs)


def small_model(dropout: float, family: str = "gpt2") -> LanguageModel:
    shapes = {
        "gpt2": GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=T, vocab_size=V),
        "llama": LlamaConfig(2, 4, 32, n_kv_head=2, n_ffn=80, block_size=T, vocab_size=V),
    }
    torch.manual_seed(1)
    model = build(replace(shapes[family], dropout=dropout))
    with torch.no_grad():
        model.head.mul_(20)  # far from the uniform prediction of a fresh model
    return model


def reference_model() -> LanguageModel:
    """Another model of the same shape."""
    model = small_model(0.0)
    torch.manual_seed(2)
    with torch.no_grad():
        model.wte.weight.add_(torch.randn_like(model.wte.weight), alpha=0.2)
    return model.eval()


def write_references(folder: Path) -> None:
    """The checkpoint of the reference model, and the file of its losses on the first batch."""
    model, rows = reference_model(), global_batch()
    state = {"gpt": asdict(model.config), "max_steps": 1, "identity": {}}
    checkpoint.save(folder, 1, (model.state_dict(), {}), state, keep=1)
    with torch.no_grad():
        losses = model(rows[:, :-1], rows[:, 1:]).mean(1).numpy()
    about = {
        "domains": DOMAINS,
        "model_sha256": "x",
        "trained_on": None,
        "data": "",
        "block_size": T,
    }
    of_domain = {}
    for d, name in enumerate(DOMAINS):
        windows = np.flatnonzero(domains() == d)
        of_domain[name] = (windows, losses[windows])
    score_windows.write(folder / "file.npz", about, of_domain)


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


def references_folder() -> Path:
    """Of this rank's own copy of the references."""
    return Path(f"{sys.argv[1]}.{distributed.ranks().rank}")


def one_step(trainer: Trainer, variant: str) -> dict:
    """A step of a variant whose optimizer changes nothing."""
    trainer.config = replace(trainer.config, grad_clip=0.0, **VARIANTS[variant])
    trainer.optimizer = Recorder(trainer.model.parameters(), lr=1.0)
    batch = batch_of(0)
    backward = trainer.backward
    trainer.reference = None
    if variant == "reference run":
        folder = checkpoint.find_latest(references_folder())
        trainer.reference = reference.FromRun(folder, trainer.config, trainer.device)
    elif variant == "reference file":
        path = references_folder() / "file.npz"
        trainer.reference = reference.FromFile(path, DOMAINS, trainer.device)
    if variant == "robust":
        view = View(offset=trainer.expected_losses(batch.domain, len(batch.x)))
        trainer.backward = lambda step, x, y, _, pairs: backward(step, x, y, view, pairs)
    result = trainer.step(3, batch)
    trainer.backward = backward
    return {
        "gradient": torch.cat([g.flatten() for g in trainer.optimizer.gradients]),
        "norm": result.grad_norm,
        "losses": distributed.gather(result.losses),
        "weights": distributed.gather(result.weights),
    }


def one_step_of_each(
    variants, dropout: float, B: int, parallel: str, family: str = "gpt2", **settings
) -> dict:
    """{variant: one_step}, each from the same model."""
    trainer = trainer_of(dropout, B, parallel, family, **settings)
    original = trainer.config
    results = {}
    for variant in variants:
        trainer.config = original
        results[variant] = one_step(trainer, variant)
    return results


def trainer_of(dropout: float, B: int, parallel: str, family: str = "gpt2", **settings) -> Trainer:
    config = config_of(B, parallel=parallel, **settings)
    raw = small_model(dropout, family)
    trainer = Trainer(raw, config, 3, torch.device("cpu"), BYTE_LENGTHS)
    # Means of 0, 0.5 and 1 for the three domains: expected_losses() for their samples.
    trainer.domain_losses = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]])
    return trainer


def train(B: int, parallel: str, dropout: float = 0.0, family: str = "gpt2", **settings) -> dict:
    """Losses of a few steps, the optimizer's state after the first of them, whether the ranks have
    the same parameters (with FSDP: shares of them) in the end, and whether NaN losses change them.
    """
    rank, _, W = distributed.ranks()
    trainer = trainer_of(dropout, B, parallel, family, reweight="linupper", **settings)
    losses = []
    for step in range(STEPS):
        result = trainer.step(step, batch_of(step % BATCHES))
        losses.append(distributed.gather(result.losses))
        if step == 0:
            (_, first), _ = trainer.state_dict()
    before = snapshot(trainer)
    forward = trainer.raw.forward
    addend = torch.zeros(B, 1)
    if rank == W - 1:
        addend[-1] = float("nan")
    trainer.raw.forward = lambda *args: forward(*args) + addend
    for strategy in ("linupper", "uniform"):
        trainer.config = replace(trainer.config, reweight=strategy)
        result = trainer.step(STEPS, batch_of(0))
        assert not result.grad_norm.isfinite() and not result.taken
    pairs = zip(before, snapshot(trainer), strict=True)
    unchanged = all(torch.equal(a, b) for a, b in pairs)
    parameters = torch.cat([tensor.flatten() for tensor in before])
    of_ranks = distributed.gather_objects((unchanged, parameters))
    return {
        "losses": torch.stack(losses),
        "first": first,
        "unchanged": all(unchanged for unchanged, _ in of_ranks),
        "same on all ranks": all(torch.equal(own, parameters) for _, own in of_ranks),
    }


def snapshot(trainer: Trainer) -> list[torch.Tensor]:
    """This rank's parameters, moments and step counts."""
    tensors = list(trainer.raw.parameters())
    optimizer = trainer.optimizer
    for part in [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer:
        for state in part.state.values():
            tensors += state.values()
    return [getattr(t, "_local_tensor", t).detach().clone() for t in tensors]


def main() -> None:
    W = distributed.ranks().world_size
    distributed.setup("cpu")
    os.environ["LOCAL_WORLD_SIZE"] = str(min(W, 2))  # four ranks are two nodes
    write_references(references_folder())
    results = {}
    for ranks, parallel, B in LAYOUTS:
        if ranks == W:
            results[parallel, B, "global", 0.0] = one_step_of_each(VARIANTS, 0.0, B, parallel)
            results[parallel, B, "train"] = train(B, parallel)
            steps = one_step_of_each(LLAMA_VARIANTS, 0.0, B, parallel, "llama")
            results[parallel, B, "llama"] = steps
            results[parallel, B, "llama, train"] = train(B, parallel, family="llama")
            if parallel == "ddp":
                results[parallel, B, "muon"] = train(B, parallel, optimizer="muon")
    for parallel in ("ddp", "fsdp") if W > 1 else ("ddp",):
        results[parallel, 4, "global", 0.2] = one_step_of_each(FEW_VARIANTS, 0.2, 4, parallel)
        if (W, parallel) in MICRO_LAYOUTS:
            variants = [*STRATEGIES, *CONTROLS]
            micro = one_step_of_each(variants, 0.0, 4, parallel, reweight_scope="micro")
            results[parallel, 4, "micro", 0.0] = micro
        if W > 2:
            continue
        for way, settings in WAYS.items():
            for dropout in (0.0, 0.2):
                steps = one_step_of_each(FEW_VARIANTS, dropout, 4, parallel, **settings)
                results[parallel, way, dropout] = steps
            results[parallel, way, "train"] = train(4, parallel, 0.2, **settings)
            steps = one_step_of_each(FEW_VARIANTS, 0.0, 4, parallel, "llama", **settings)
            results[parallel, way, "llama"] = steps
        trainer = trainer_of(0.0, 4, parallel, dtype="bfloat16")
        results[parallel, "bfloat16"] = one_step(trainer, "linupper")
        assert all(distributed.full(p).dtype == torch.float32 for p in trainer.raw.parameters())
        del trainer
    if distributed.ranks().rank == 0:
        torch.save(results, sys.argv[1])
    distributed.cleanup()


if __name__ == "__main__":
    main()
