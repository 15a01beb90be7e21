"""A whole Trainer against the formulas, in float64: weights, clipping, AdamW, schedule."""

import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from corpus.manifest import DOMAINS
from data import Batch
from model import GPT, GPTConfig
from recipe import CONTROLS, TrainConfig
from reweight import STRATEGIES, domain_means, sample_weights
from step import Guard, Trainer, View, seed_noise

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


@pytest.mark.parametrize("rank, expected", [(0, [0, 1, 2, 3]), (1, [4, 5, 6, 0])])
def test_a_rank_expects_the_losses_of_its_own_samples(monkeypatch, rank, expected):
    """The running mean loss of domain d is d here."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    trainer = new_trainer()
    trainer.domain_losses[0] = torch.arange(7)
    trainer.domain_losses[1] = 1
    assert trainer.expected_losses(torch.arange(G) % 7, G // 2).tolist() == expected


def test_a_sequence_without_bytes_counts_as_one_of_a_byte():
    """The scale is in tokens per byte; tokens 0, 1 and 2 have as many bytes."""
    config = TrainConfig(**SETTINGS, reweight_unit="byte")
    byte_lengths = torch.arange(V)
    trainer = Trainer(GPT(SHAPE), config, len(DOMAINS), torch.device("cpu"), byte_lengths)
    y = torch.zeros(3, T, dtype=torch.long)
    y[1, 0] = 1
    y[2] = 2
    view = trainer.view(Batch(y, y, None, None), y, y)
    assert view.scale.tolist() == [T, T, 0.5]


def test_noise_is_that_of_manual_seed():
    seed_noise(torch.device("cpu"), 2**62 + 5)
    ours = torch.rand(9)
    torch.manual_seed(2**62 + 5)
    assert torch.equal(ours, torch.rand(9))


@pytest.mark.parametrize("compile, recompute", [("on", "full"), ("on", "none"), ("graphs", "full")])
def test_recomputed_noise_repeats(monkeypatch, compile, recompute):
    from torch._functorch import config as functorch

    monkeypatch.setattr(GPT, "compile", lambda self, **how: None)
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


# Parts of a step, each on its own: clipping hides a wrong scale of the weights from the test above


def new_trainer(shape: GPTConfig = SHAPE, **settings) -> Trainer:
    torch.manual_seed(0)
    config = TrainConfig(**{**SETTINGS, "reweight_warmup_steps": 0, **settings})
    return Trainer(GPT(shape), config, len(DOMAINS), torch.device("cpu"))


@pytest.mark.parametrize("B, scope", [(8, "global"), (4, "global"), (4, "micro"), (2, "micro")])
@pytest.mark.parametrize("norm", ["minmax", "domain"])
def test_weights_are_those_of_the_samples_that_are_weighted_together(B, scope, norm):
    """All of the batch, or one micro-batch; their losses minus the domains' means, if so asked."""
    trainer = new_trainer(micro_batch_size=B, reweight_scope=scope, reweight_norm=norm)
    trainer.domain_losses[:] = torch.tensor([[3.0] * 3 + [1.0] * 4, [1.0] * len(DOMAINS)])
    result = trainer.step(0, batch_of(0))
    losses = result.losses
    if norm == "domain":
        losses = losses - torch.tensor([3.0, 3, 3, 1, 1, 1, 1, 3])
    together = B if scope == "micro" else G
    expected = torch.cat([linupper(part, 0.3) for part in losses.split(together)])
    torch.testing.assert_close(result.weights, expected * together / G)


def test_the_uniform_step_is_the_gradient_of_the_mean_loss():
    result = new_trainer(reweight="uniform").step(0, batch_of(0))
    assert result.weights.tolist() == [1 / G] * G
    model = new_trainer().raw
    x, y, *_ = batch_of(0)
    model(x, y).mean().backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    torch.testing.assert_close(result.grad_norm, norm)


@pytest.mark.parametrize(
    "settings, passes",
    [
        ({"reweight": "uniform"}, 2),
        ({}, 4),  # linupper
        ({"micro_batch_size": G}, 1),
        ({"reweight_scope": "micro"}, 2),
    ],
)
def test_only_weights_over_several_micro_batches_need_a_second_forward_pass(settings, passes):
    trainer, calls = new_trainer(**settings), []
    trainer.raw.register_forward_hook(lambda *_: calls.append(1))
    trainer.step(0, batch_of(0))
    assert len(calls) == passes


def test_the_first_step_sets_the_domains_mean_losses():
    """Eight samples of seven domains: the last one is of the first domain again."""
    trainer = new_trainer(reweight_norm="domain")
    losses = trainer.step(0, batch_of(0)).losses.tolist()
    expected = [(losses[0] + losses[7]) / 2, *losses[1:7]]
    assert domain_means(trainer.domain_losses).tolist() == pytest.approx(expected)


def test_no_result_keeps_the_graph_of_its_step():
    trainer = new_trainer(reweight_norm="domain")
    result = trainer.step(0, batch_of(0))
    tensors = [*result, trainer.domain_losses, trainer.guard.norms]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_a_trainer_continues_from_the_state_of_another():
    settings = {"reweight_norm": "domain", "skip_grad_norm": 5.0}
    trainer, resumed = new_trainer(**settings), new_trainer(**settings)
    for step in range(3):
        trainer.step(step, batch_of(step))
    tensors, numbers = trainer.state_dict()
    resumed.load_state([tensors], numbers)
    assert torch.equal(resumed.guard.norms, trainer.guard.norms)
    for expected, got in zip(
        trainer.step(3, batch_of(3)), resumed.step(3, batch_of(3)), strict=True
    ):
        assert torch.equal(got, expected)
    assert torch.equal(resumed.domain_losses, trainer.domain_losses)


def assert_skipped(trainer: Trainer) -> None:
    """The next step is not taken, and it changes neither parameters nor running losses."""
    before = [p.detach().clone() for p in trainer.raw.parameters()]
    domain_losses = trainer.domain_losses.clone()
    assert not trainer.step(1, batch_of(1)).taken
    assert all(map(torch.equal, before, trainer.raw.parameters()))
    assert torch.equal(trainer.domain_losses, domain_losses)


@pytest.mark.parametrize("strategy", ["uniform", "linupper"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_skips_the_step(strategy, bad):
    """Even where its own gradient is finite."""
    trainer = new_trainer(reweight=strategy, reweight_norm="domain")
    assert trainer.step(0, batch_of(0)).taken
    forward = trainer.raw.forward
    addend = torch.tensor([0.0, bad, 0.0, 0.0])[:, None]
    trainer.raw.forward = lambda *args: forward(*args) + addend
    assert_skipped(trainer)


def test_a_gradient_that_overflows_skips_the_step():
    trainer = new_trainer(reweight_norm="domain")
    assert trainer.step(0, batch_of(0)).taken
    gain = trainer.raw.ln_f.weight
    gain.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    assert_skipped(trainer)


def test_noise_differs_between_steps_and_micro_batches():
    """And is the same again where both are the same; also with the largest seed."""
    for seed in (42, 2**63 - 1):
        trainer = new_trainer(replace(SHAPE, dropout=0.5), seed=seed)
        row = torch.arange(T + 1).expand(G, -1)
        x, y = row[:, :-1], row[:, 1:]

        def losses(step, first, trainer=trainer, x=x, y=y):
            return tuple(trainer.sample_losses(step, x, y, first).tolist())

        places = [(step, first) for step in range(4) for first in range(0, G, 4)]
        noisy = [losses(*place) for place in places]
        assert len(set(noisy)) == len(places)
        assert [losses(*place) for place in places] == noisy


@pytest.mark.parametrize("n_layer", [2, 25])
@pytest.mark.parametrize("compile", ["off", "on", "graphs"])
def test_the_model_is_compiled_as_asked(monkeypatch, compile, n_layer):
    """As a whole, or block by block and the losses: with static shapes, and CUDA graphs or not."""
    seen = []

    def note(module, **how):
        seen.append((type(module).__name__, how))
        return module

    monkeypatch.setattr(nn.Module, "compile", note)
    monkeypatch.setattr(torch, "compile", lambda function, **how: note(function, **how))
    new_trainer(replace(SHAPE, n_layer=n_layer), compile=compile)
    how = {"dynamic": False, "options": {"triton.cudagraphs": compile == "graphs"}}
    expected = [("GPT", how)]
    if compile == "off":
        expected = []
    elif compile == "on" and n_layer == 25:
        expected = [("Block", how)] * 25 + [("function", how)]
    assert seen == expected


def test_nothing_is_compiled_again_after_the_first_steps(monkeypatch):
    """Over uniform and weighted steps with accumulation, and evaluations between them."""
    monkeypatch.setattr(
        "step.compile_model", lambda model, *_: model.compile(backend="eager", dynamic=False)
    )
    torch._dynamo.reset()
    trainer = new_trainer(compile="on", reweight_warmup_steps=3, max_steps=30)
    graphs = []
    for step in range(20):
        batch = batch_of(step)
        x, y = batch.x.contiguous(), batch.y.contiguous()  # as read_batch gives them
        trainer.step(step, batch._replace(x=x, y=y))
        if step % 5 == 0:
            trainer.raw.eval()
            with torch.no_grad():
                trainer.raw(x[:4], y[:4])
            trainer.raw.train()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs == [graphs[0]] * 20


class Counter(TorchDispatchMode):
    """Counts the operators inside that compute something."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += not function.is_view and function.namespace == "aten"
        return function(*args, **(kwargs or {}))


def test_a_step_has_few_operators_beside_the_model():
    """On a GPU each one is a kernel, or several, that waits for the host to start it."""
    trainer = new_trainer(micro_batch_size=G)
    trainer.raw.forward = lambda x, y: trainer.raw.ln_f.bias[0] * y  # in place of the model
    for parameter in trainer.raw.parameters():
        parameter.requires_grad_(parameter is trainer.raw.ln_f.bias)
        parameter.grad = torch.zeros_like(parameter)
    batch = batch_of(0)
    trainer.step(60, batch)  # makes the optimizer's moments
    with Counter() as counter:
        trainer.step(61, batch)
    assert counter.n <= 62


def test_ways_of_saving_memory_reach_the_model():
    model = new_trainer(loss_chunk=7, recompute="full").raw
    assert (model.loss_chunk, model.recompute) == (7, "full")


@pytest.mark.parametrize("device, seeded", [("cpu", []), ("cuda", ["cuda"]), ("mps", ["mps"])])
def test_the_noise_of_the_device_in_use_is_seeded_too(monkeypatch, device, seeded):
    seen, generator = [], torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: seen.append("mps"))
    generator.manual_seed(1)
    seed_noise(torch.device(device), 5)
    if generator.initial_seed() == 5:
        seen.append("cuda")
    assert seen == seeded and torch.default_generator.initial_seed() == 5


class NoUpdate(torch.optim.SGD):
    def step(self, closure=None):
        pass


@pytest.mark.parametrize("step", [0, 200])  # before and after the guard can tell a spike
@pytest.mark.parametrize(
    "settings", [{"reweight": "uniform"}, {"reweight_norm": "domain", "max_weight": 1.5}], ids=str
)
def test_all_tensors_of_a_step_are_on_its_device(monkeypatch, settings, step):
    """The meta device stands for a GPU: its tensors have no values, and do not mix with others."""
    monkeypatch.setattr("step.make_optimizer", lambda model, _: NoUpdate(model.parameters()))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    config = TrainConfig(
        **{**SETTINGS, "reweight_warmup_steps": 0, "skip_grad_norm": 5, **settings}
    )
    trainer = Trainer(GPT(SHAPE), config, len(DOMAINS), torch.device("meta"))
    result = trainer.step(step, batch_of(0))
    tensors = [*result, trainer.domain_losses, trainer.guard.norms, trainer.guard.halted]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


# The guard


def guard_after(norms: list[float], skip_grad_norm: float = 0.0, on_nonfinite="skip") -> Guard:
    """A guard that has seen a step with each of these gradient norms."""
    guard = Guard(torch.device("cpu"), skip_grad_norm, on_nonfinite)
    for step, norm in enumerate(torch.tensor(norms)):
        taken = norm.isfinite() & (norm <= guard.limits(step)[0])
        guard.add(step, norm, taken)
    return guard


@pytest.mark.parametrize(
    "steps, median",
    [
        (0, math.inf),
        (49, math.inf),  # too few to tell
        (50, 125),  # of 150 to 101
        (51, 125),
        (100, 100),  # of 150 to 51
        (150, 50),  # of the newest hundred, 100 to 1
    ],
)
def test_a_spike_is_a_norm_above_ten_medians_of_the_newest_hundred(steps, median):
    falling = [150.0 - step for step in range(steps)]
    assert guard_after(falling).limits(steps).tolist() == [math.inf, 10 * median]
    assert guard_after(falling, skip_grad_norm=5.0).limits(steps).tolist() == [5 * median] * 2


@pytest.mark.parametrize(
    "skip_grad_norm, median, taken",
    [
        (2.0, 0.5, True),  # at the limit
        (2.0, 0.49, False),
        (0.0, 0.01, True),  # a spike, but no limit
    ],
)
def test_a_step_is_taken_up_to_the_limit(skip_grad_norm, median, taken):
    """median: of the gradient norms before, as a multiple of this step's."""
    norm = new_trainer().step(50, batch_of(0)).grad_norm
    trainer = new_trainer(skip_grad_norm=skip_grad_norm)
    trainer.guard.norms[:] = median * norm
    assert trainer.step(50, batch_of(0)).taken == taken


def test_the_guard_records_the_norm_of_a_step():
    trainer = new_trainer()
    norm = trainer.step(3, batch_of(3)).grad_norm
    assert trainer.guard.norms[3] == norm


def test_norms_of_skipped_steps_do_not_count():
    """Nor are they taken for norms of 0: each leaves the norm of the step a hundred before."""
    norms = [150.0 - step for step in range(100)]
    expected = guard_after(norms, skip_grad_norm=5.0).limits(200).tolist()
    skipped = guard_after([*norms, math.nan, math.inf, 1e6], skip_grad_norm=5.0)
    assert skipped.limits(200).tolist() == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_after_a_norm_that_is_not_finite_no_step_is_taken_if_so_asked(bad):
    stopping = guard_after([1.0, bad, 0.0, 1.0], on_nonfinite="stop")
    assert stopping.limits(4)[0] < 0
    assert guard_after([1.0, 1.0], on_nonfinite="stop").limits(2)[0] == math.inf
    assert guard_after([1.0, bad], on_nonfinite="skip").limits(2)[0] == math.inf


# Controls and units: properties for all strategies


@pytest.fixture(scope="module")
def trainer():
    return Trainer(GPT(SHAPE), TrainConfig(**SETTINGS), len(DOMAINS), torch.device("cpu"))


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=30, deadline=None)
@given(
    losses=st.lists(st.floats(0.0625, 16, width=32), min_size=G, max_size=G),
    n_bytes=st.lists(st.integers(1, 80), min_size=G, max_size=G),
    unit=st.sampled_from(["token", "byte"]),
    step=st.integers(0, 10**6),
    seed=st.integers(0, 2**40),
)
def test_controls_and_units_of_every_strategy(trainer, strategy, losses, n_bytes, unit, step, seed):
    """A control has the strategy's weights, so its effective sample size, on other samples; within,
    on samples of the same domain. Per token, the weights are those of the losses, bit for bit.
    """
    losses, n_bytes = torch.tensor(losses), torch.tensor(n_bytes)
    domain = np.arange(G) * 5 % 3
    pairs = np.stack([domain, np.arange(G)], axis=1)
    view = View(T / n_bytes) if unit == "byte" else View()
    found = {}
    for control in CONTROLS:
        trainer.config = TrainConfig(**{**SETTINGS, "seed": seed, "reweight_control": control})
        found[control] = trainer.own_weights(step, strategy, view.of(losses), pairs)
    seen = losses * (T / n_bytes) if unit == "byte" else losses
    assert torch.equal(found["none"], sample_weights(seen, strategy, SETTINGS["r"]))
    for control in ("shuffled", "within"):
        assert torch.equal(found[control].sort().values, found["none"].sort().values)
    for d in range(3):
        of_domain = torch.from_numpy(domain == d)
        own, moved = found["none"][of_domain], found["within"][of_domain]
        assert torch.equal(moved.sort().values, own.sort().values)
