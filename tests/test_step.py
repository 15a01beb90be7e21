"""A whole Trainer against the formulas, in float64: weights, clipping, AdamW, schedule."""

import math

import pytest
import torch

from corpus.manifest import DOMAINS
from data import Batch
from model import GPT, GPTConfig
from recipe import TrainConfig
from step import Trainer, seed_noise

G, T, V, STEPS = 8, 12, 32, 5
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=T, vocab_size=V, dropout=0.0)
SETTINGS = dict(
    block_size=T,
    global_batch_size=G,
    micro_batch_size=4,
    max_steps=6,
    warmup_steps=2,
    learning_rate=3e-3,
    min_lr=1e-3,
    weight_decay=0.1,
    beta1=0.8,
    beta2=0.97,
    grad_clip=0.7,
    reweight="linupper",
    reweight_warmup_steps=1,
    r=0.3,
    dtype="float32",
    compile="off",
    loss_chunk=0,
)


def batch_of(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(V, (G, T + 1), generator=generator)
    # Some sequences are easy, so that the losses and the weights differ.
    tokens[: G // 2] = tokens[: G // 2, :1]
    domain = torch.arange(G) % len(DOMAINS)
    return Batch(tokens[:, :-1], tokens[:, 1:], domain, None)


def trained(**settings) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The parameters before, and those after each of STEPS steps of a Trainer, all as one row."""
    torch.manual_seed(0)
    model = GPT(SHAPE)
    for parameter in model.parameters():  # biases and gains that are not 0 and 1
        parameter.data += 0.05 * torch.randn_like(parameter)
    start = [parameter.detach().double() for parameter in model.parameters()]
    config = TrainConfig(**{**SETTINGS, **settings})
    trainer = Trainer(model, config, len(DOMAINS), torch.device("cpu"))
    rows = []
    for step in range(STEPS):
        trainer.step(step, batch_of(step))
        rows.append(torch.cat([p.detach().flatten().double() for p in model.parameters()]))
    return start, rows


# 1e-7 to 3e-3 over 2 steps, then half a cosine to 1e-3 at step 6.
LEARNING_RATES = [1e-7, 0.00150005, 3e-3, 2e-3 + 1e-3 * math.cos(math.pi / 4), 2e-3]


def linupper(losses: torch.Tensor, r: float) -> torch.Tensor:
    """Equations of the paper, delta = 1: h in [-1, 1], f = min(h + 1, 1), w = softmax(f / r)."""
    low, high = losses.min(), losses.max()
    h = 2 * (losses - low) / (high - low) - 1
    scores = torch.clamp(h + 1, max=1.0) / r
    exponentials = torch.exp(scores - scores.max())
    return exponentials / exponentials.sum()


def reference(start: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same steps from the formulas of AdamW and of the paper, on the whole batch at once."""
    model = GPT(SHAPE).double()
    parameters = list(model.parameters())
    for parameter, value in zip(parameters, start, strict=True):
        parameter.data.copy_(value)
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    rows = []
    for step in range(STEPS):
        x, y, *_ = batch_of(step)
        log_p = torch.log_softmax(model(x), dim=-1)
        losses = -log_p.gather(2, y.unsqueeze(2)).squeeze(2).mean(1)
        weights = torch.full((G,), 1 / G, dtype=torch.float64)
        if step >= 1:
            weights = linupper(losses.detach(), 0.3)
        gradients = torch.autograd.grad((weights * losses).sum(), parameters)
        norm = math.sqrt(sum((g**2).sum().item() for g in gradients))
        assert norm > 0.7  # or clipping would not be tested
        lr, t = LEARNING_RATES[step], step + 1
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                g = g * 0.7 / norm
                m.mul_(0.8).add_(0.2 * g)
                v.mul_(0.97).add_(0.03 * g**2)
                if p.dim() >= 2:  # no decay of biases and LayerNorm
                    p.mul_(1 - lr * 0.1)
                p -= lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.97**t)).sqrt() + 1e-8)
        rows.append(torch.cat([p.detach().flatten() for p in parameters]))
    return rows


def test_five_steps_are_those_of_the_formulas():
    start, rows = trained()
    before = torch.cat([parameter.flatten() for parameter in start])
    for step, (row, expected) in enumerate(zip(rows, reference(start), strict=True)):
        moved = (expected - before).norm()
        assert (row - expected).norm() < 1e-3 * moved + 1e-6, step
        before = expected


def test_a_domains_mean_loss_is_subtracted_before_weighting():
    """From the second step on, where the running means are known."""
    _, plain = trained(reweight_warmup_steps=0)
    _, by_domain = trained(reweight_warmup_steps=0, reweight_norm="domain")
    assert not torch.allclose(plain[1], by_domain[1], atol=1e-6)
    start, _ = trained()
    trainer = Trainer(GPT(SHAPE), TrainConfig(**SETTINGS), len(DOMAINS), torch.device("cpu"))
    trainer.domain_losses[:] = torch.tensor([[3.0] * 6 + [1.0], [1.0] * 7])
    domain = torch.arange(G) % len(DOMAINS)
    assert trainer.expected_losses(domain, G).tolist() == [3, 3, 3, 3, 3, 3, 1, 3]


def test_noise_is_that_of_manual_seed():
    seed_noise(torch.device("cpu"), 2**62 + 5)
    ours = torch.rand(9)
    torch.manual_seed(2**62 + 5)
    assert torch.equal(ours, torch.rand(9))


@pytest.mark.parametrize("compile, recompute", [("on", "full"), ("on", "none"), ("graphs", "full")])
def test_recomputed_noise_repeats(monkeypatch, compile, recompute):
    from torch._functorch import config as functorch

    monkeypatch.setattr(GPT, "compile", lambda self, mode=None: None)
    settings = {**SETTINGS, "compile": compile, "recompute": recompute, "dropout": 0.1}
    with functorch.patch(graphsafe_rng_functionalization=True):
        Trainer(GPT(SHAPE), TrainConfig(**settings), len(DOMAINS), torch.device("cpu"))
        is_changed = not functorch.graphsafe_rng_functionalization
    assert is_changed == (compile == "on" and recompute == "full")


@pytest.mark.parametrize("optimizer_key, value", [("betas", (0.9, 0.999)), ("eps", 1e-8)])
def test_the_optimizers_defaults_are_the_published_ones(optimizer_key, value):
    config = TrainConfig(block_size=T, micro_batch_size=4)
    trainer = Trainer(GPT(SHAPE), config, len(DOMAINS), torch.device("cpu"))
    assert all(group[optimizer_key] == value for group in trainer.optimizer.param_groups)
