"""A step that does not log never waits for the device: it reads no tensor's value on the host."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from corpus.manifest import DOMAINS
from data import Batch
from model import GPT, GPTConfig
from recipe import TrainConfig, settle
from reweight import NORMS, STRATEGIES
from runtime.telemetry import Telemetry
from step import WINDOW, Trainer

G, T = 8, 16
PAIRS = np.stack([np.arange(G) % len(DOMAINS), np.arange(G)], axis=1)


@pytest.fixture
def no_values(monkeypatch):
    """Tensors with a shape but without values: item, tolist, bool, nonzero and masks raise; so do
    moves to the host.
    """

    def refuse(*args, **kwargs):
        raise DataDependentOutputException("a move to the host")

    for name in ("cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    # Fake parameters cannot be moved, and they are where they should be.
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    with FakeTensorMode():
        yield


def one_step(tmp_path, **settings) -> Telemetry:
    """A step and what the main loop does with it."""
    config = TrainConfig(
        block_size=T,
        device="cpu",
        global_batch_size=G,
        reweight_warmup_steps=0,
        skip_grad_norm=5.0,
        on_nonfinite="stop",
        loss_chunk=0,
        **settings,
    )
    shape = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=T, vocab_size=64, dropout=0.1)
    device = torch.device("cpu")
    trainer = Trainer(GPT(shape), settle(config, 1), len(DOMAINS), device, torch.ones(64))
    tokens = torch.zeros(G, T, dtype=torch.long)
    batch = Batch(tokens, tokens, torch.zeros(G, dtype=torch.long), PAIRS)
    telemetry = Telemetry(SimpleNamespace(domains=DOMAINS, kinds=()), tmp_path, 0, 0)
    telemetry.add(WINDOW + 1, batch.pairs, trainer.step(WINDOW, batch))
    return telemetry


WEIGHTED = {"reweight": "linupper"}
CASES = [
    *({"reweight": strategy} for strategy in STRATEGIES),
    *({**WEIGHTED, "reweight_norm": norm} for norm in NORMS),
    *(
        {**WEIGHTED, "micro_batch_size": 2, "reweight_scope": scope}
        for scope in ("global", "micro")
    ),
    {**WEIGHTED, "max_weight": 1.5, "r_start": 2.0, "r_steps": 9},
    {**WEIGHTED, "reweight_unit": "byte", "reweight_control": "shuffled"},
    {**WEIGHTED, "reweight_control": "within"},
    {"grad_clip": 0.0},
    {"dtype": "bfloat16"},
    {"optimizer": "muon"},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_a_step_waits_for_nothing(no_values, tmp_path, settings):
    one_step(tmp_path, **settings)


def test_a_log_line_waits(no_values, tmp_path):
    """So the step before would have been caught."""
    with pytest.raises(DataDependentOutputException):
        one_step(tmp_path).flush()
    for wait in (
        lambda t: t.item(),
        lambda t: t.tolist(),
        lambda t: bool(t),
        lambda t: t[None][t[None] > 0],
    ):
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            wait(torch.zeros(()))
