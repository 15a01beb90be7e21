"""The layout invariant: ranks and accumulation change neither batch, weights nor gradient."""

import numpy as np
import pytest
import torch
from conftest import command, expect_ok
from layout_worker import G, global_batch, small_model

import data
from reweight import STRATEGIES

LAYOUTS = [(1, 1), (1, 4), (2, 1), (2, 2)]  # (W, A)


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """step(W, A, scope, dropout) -> results of tests/layout_worker.py, each layout run once."""
    done, folder = {}, tmp_path_factory.mktemp("layouts")

    def run(W, A, scope="global", dropout=0.0):
        key = (W, A, scope, dropout)
        if key not in done:
            out = folder / f"{W}_{A}_{scope}_{dropout}.pt"
            expect_ok(command("tests/layout_worker.py", out, G // (W * A), scope, dropout, ranks=W))
            done[key] = torch.load(out)
        return done[key]
    return run


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_every_layout_gives_the_same_step(step, layout):
    one, other = step(1, 1), step(*layout)
    for strategy in STRATEGIES:
        assert relative(other[strategy]["gradient"], one[strategy]["gradient"]) < 1e-6
        torch.testing.assert_close(other[strategy]["losses"], one[strategy]["losses"], atol=1e-5, rtol=0)
        torch.testing.assert_close(other[strategy]["weights"], one[strategy]["weights"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_step_is_the_weighted_gradient_in_float64(step, strategy):
    from test_reweight import reference
    model, rows = small_model(0.0).double(), global_batch()
    logits = model(rows[:, :-1]).transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, rows[:, 1:], reduction="none").mean(1)
    weights = reference(losses.detach().numpy(), strategy, r=0.4)
    sum(w * loss for w, loss in zip(weights, losses, strict=True)).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    got = step(1, 1)[strategy]
    assert relative(got["gradient"].double(), gradient) < 1e-5
    np.testing.assert_allclose(got["weights"].numpy(), weights, atol=1e-6)
    if strategy != "uniform":  # a test of weights that are all alike would show nothing
        assert got["weights"].max() > 2 * got["weights"].min()


def test_uniform_is_the_plain_mean_bit_for_bit(step):
    model, rows = small_model(0.0).train(), global_batch()
    model(rows[:, :-1], rows[:, 1:]).mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.equal(step(1, 1)["uniform"]["gradient"], gradient)


def test_dropout_noise_does_not_depend_on_ranks(step):
    """Noise belongs to the micro-batch: the same B gives the same step for any split into ranks and micro-steps."""
    a, b = step(1, 4, dropout=0.2), step(2, 2, dropout=0.2)
    for strategy in STRATEGIES:
        assert relative(a[strategy]["gradient"], b[strategy]["gradient"]) < 1e-6
    assert relative(a["uniform"]["gradient"], step(1, 4)["uniform"]["gradient"]) > 0.01


def test_micro_scope_weights_each_micro_step_on_its_own(step):
    from test_reweight import reference
    for W, A in ((1, 4), (2, 2)):
        got, B = step(W, A, "micro"), G // (W * A)
        for strategy in STRATEGIES:
            losses, weights = (got[strategy][key].numpy().reshape(W, A, B) for key in ("losses", "weights"))
            for a in range(A):
                expected = reference(losses[:, a].ravel(), strategy, 0.4) / A
                np.testing.assert_allclose(weights[:, a].ravel(), expected, atol=1e-6)


def test_global_batches_are_identical_for_any_layout(tmp_path):
    """Each rank's slices, laid end to end in rank order, are the same global batch."""
    from conftest import write_shards

    import train
    tokens = np.arange(3000) % 250
    write_shards(tmp_path, {d: {"train": np.roll(tokens, i), "val": tokens[:50]} for i, d in enumerate(data.DOMAINS)})
    split = data.Split(tmp_path, data.read_manifest(tmp_path), "train", 16)

    def batch(W, B):
        parts = []
        for rank in range(W):
            with pytest.MonkeyPatch.context() as patch:
                for key, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", W)):
                    patch.setenv(key, str(value))
                config = train.settle(train.TrainConfig(device="cpu", global_batch_size=16, micro_batch_size=B,
                                                        max_steps=12), W)
                sampler = data.DomainSampler(data.mixture_weights("doge", split), split.n_windows, 16, 42)
                x, _, pairs = list(train.batches(split, sampler, config, 9))[2]
                parts.append(x)
        return torch.cat(parts), pairs
    x, pairs = batch(1, 16)
    for W, B in ((1, 4), (2, 8), (2, 4), (4, 2), (16, 1)):
        other_x, other_pairs = batch(W, B)
        assert torch.equal(other_x, x) and np.array_equal(other_pairs, pairs)
