"""A step that does not log never waits for the device: it asks for no tensor's value on the host."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

import train
from data import DOMAINS
from model import GPT, GPTConfig
from reweight import NORMS, STRATEGIES
from telemetry import WINDOW, Guard, Telemetry

G, T = 8, 16
PAIRS = np.stack([np.arange(G) % len(DOMAINS), np.arange(G)], axis=1)


@pytest.fixture
def no_values(monkeypatch):
    """Tensors with a shape but without values: item, tolist, bool, nonzero and masks raise; so do moves to the host."""
    def refuse(*args, **kwargs):
        raise DataDependentOutputException("a move to the host")
    for name in ("cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    with FakeTensorMode():
        yield


def one_step(tmp_path, **settings) -> Telemetry:
    """A step and what the main loop does with it, on every tensor that it would have."""
    config = train.settle(train.TrainConfig(block_size=T, device="cpu", global_batch_size=G, reweight_warmup_steps=0,
                                            **settings), 1)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=T, vocab_size=64, dropout=0.1))
    x, domain, tracked = torch.zeros(G, T, dtype=torch.long), torch.zeros(G, dtype=torch.long), torch.zeros(2, 7)
    expected = train.domain_means(tracked)[domain]
    telemetry = Telemetry(SimpleNamespace(domains=DOMAINS, kinds=()), tmp_path, 0, 0)
    guard, optimizer = Guard(torch.device("cpu"), 5.0, "stop"), train.make_optimizer(model, config)
    limits = guard.limits(WINDOW)
    losses, weights, norm = train.train_step(model, optimizer, x, x, WINDOW, config, expected, limits[0])
    guard.add(WINDOW, norm, optimizer.found_inf == 0)
    train.track_domain_losses(tracked, losses, domain)
    telemetry.add(WINDOW + 1, PAIRS, losses, weights, norm, limits)
    return telemetry


WEIGHTED = {"reweight": "linupper"}
CASES = [*({"reweight": strategy} for strategy in STRATEGIES), *({**WEIGHTED, "reweight_norm": norm} for norm in NORMS),
         *({**WEIGHTED, "micro_batch_size": 2, "reweight_scope": scope} for scope in ("global", "micro")),
         {**WEIGHTED, "max_weight": 1.5, "r_start": 2.0, "r_steps": 9}, {"grad_clip": 0.0}, {"dtype": "bfloat16"}]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_a_step_waits_for_nothing(no_values, tmp_path, settings):
    one_step(tmp_path, **settings)


def test_a_log_line_waits(no_values, tmp_path):
    """So the step before would have been caught."""
    with pytest.raises(DataDependentOutputException):
        one_step(tmp_path).flush()
    for wait in (lambda t: t.item(), lambda t: t.tolist(), lambda t: bool(t), lambda t: t[None][t[None] > 0]):
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            wait(torch.zeros(()))
