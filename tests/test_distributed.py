"""The layout invariant: ranks, accumulation, DDP and FSDP change neither batch, weights nor gradient."""

import numpy as np
import pytest
import torch
from conftest import command, expect_ok
from layout_worker import VARIANTS, WAYS, G, expected_losses, global_batch, small_model
from test_reweight import FORMULAS, reference

import data

# (W, parallel, B); A = G / (W * B), G = 16
LAYOUTS = [
    (1, "ddp", 4),
    (1, "ddp", 2),
    (2, "ddp", 8),
    (2, "ddp", 4),
    (2, "fsdp", 8),
    (2, "fsdp", 4),
    (4, "ddp", 4),
    (4, "ddp", 2),
    (4, "fsdp", 4),
    (4, "fsdp", 2),
]
layouts = pytest.mark.parametrize("W, parallel, B", LAYOUTS)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results(W) -> what tests/layout_worker.py saved with W ranks; each W is run once."""
    done, folder = {}, tmp_path_factory.mktemp("layouts")

    def run(W):
        if W not in done:
            expect_ok(command("tests/layout_worker.py", folder / f"{W}.pt", ranks=W))
            done[W] = torch.load(folder / f"{W}.pt")
        return done[W]

    return run


@pytest.fixture(scope="module")
def one(results):
    """One step of each variant in one process without accumulation."""
    return results(1)["ddp", G, "global", 0.0]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@layouts
def test_every_layout_gives_the_same_step(results, one, W, parallel, B):
    other = results(W)[parallel, B, "global", 0.0]
    for variant in VARIANTS:
        assert relative(other[variant]["gradient"], one[variant]["gradient"]) < 1e-6
        torch.testing.assert_close(other[variant]["norm"], one[variant]["norm"], atol=0, rtol=1e-6)
        torch.testing.assert_close(
            other[variant]["losses"], one[variant]["losses"], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            other[variant]["weights"], one[variant]["weights"], atol=1e-6, rtol=0
        )


@layouts
def test_every_layout_trains_alike(results, W, parallel, B):
    """Losses of 20 steps; not the parameters: AdamW magnifies rounding where a gradient is almost zero."""
    expected, got = (
        results(1)["ddp", G, "train"]["losses"],
        results(W)[parallel, B, "train"]["losses"],
    )
    assert expected[0].mean() - expected[-1].mean() > 0.1  # it learns
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@layouts
def test_a_nan_on_one_rank_skips_the_step_on_all(results, W, parallel, B):
    assert results(W)[parallel, B, "train"]["unchanged"]


@pytest.mark.parametrize("W, parallel", [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
@pytest.mark.parametrize("way", WAYS)
def test_ways_of_saving_memory_change_no_step(results, way, W, parallel):
    """Against the plain step with the same B, with and without dropout; a NaN skips the step there as well."""
    for dropout in (0.0, 0.2):
        expected, got = results(1)["ddp", 4, "global", dropout], results(W)[parallel, way, dropout]
        for variant in VARIANTS:
            assert relative(got[variant]["gradient"], expected[variant]["gradient"]) < 1e-6
            torch.testing.assert_close(
                got[variant]["losses"], expected[variant]["losses"], atol=1e-5, rtol=0
            )
            torch.testing.assert_close(
                got[variant]["weights"], expected[variant]["weights"], atol=1e-6, rtol=0
            )
            if W == 1 and "loss_chunk" not in way:
                assert torch.equal(got[variant]["gradient"], expected[variant]["gradient"])
    train = results(W)[parallel, way, "train"]
    assert train["unchanged"]
    # 20 steps with dropout noise: the same B gives the same noise
    torch.testing.assert_close(
        train["losses"], results(1)["ddp", way, "train"]["losses"], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("W, parallel", [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_a_step_in_bfloat16_is_near_the_one_in_float32(results, one, W, parallel):
    got, expected = results(W)[parallel, "bfloat16"], one["linupper"]
    assert 1e-4 < relative(got["gradient"], expected["gradient"]) < 1e-2
    torch.testing.assert_close(got["weights"], expected["weights"], atol=2e-3, rtol=0)


def reference_weights(losses, variant):
    """Float64 weights of a variant at step 3 of tests/layout_worker.py."""
    if variant != "robust":
        return reference(losses, variant, r=0.4)
    losses = losses - expected_losses().numpy()
    clipped = np.clip(losses, *np.sort(losses)[[2, -3]])  # a tenth of 16 samples at each end
    return reference(clipped, "linupper", r=2.0 - 1.6 * 0.3, cap=1.2)


@pytest.mark.parametrize("variant", [*FORMULAS, "robust"])
def test_the_step_is_the_weighted_gradient_in_float64(one, variant):
    model, rows = small_model(0.0).double(), global_batch()
    logits = model(rows[:, :-1]).transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, rows[:, 1:], reduction="none").mean(1)
    weights = reference_weights(losses.detach().numpy(), variant)
    sum(w * loss for w, loss in zip(weights, losses, strict=True)).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    got = one[variant]
    assert relative(got["gradient"].double(), gradient) < 1e-5
    np.testing.assert_allclose(got["weights"].numpy(), weights, atol=1e-6)
    if variant not in (
        "uniform",
        "robust",
    ):  # a test of weights that are all alike would show nothing
        assert got["weights"].max() > 2 * got["weights"].min()


def test_uniform_is_the_plain_mean_bit_for_bit(one):
    model, rows = small_model(0.0).train(), global_batch()
    model(rows[:, :-1], rows[:, 1:]).mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.equal(one["uniform"]["gradient"], gradient)


@pytest.mark.parametrize("W, parallel", [(2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")])
def test_dropout_noise_does_not_depend_on_ranks(results, W, parallel):
    """Noise belongs to the micro-batch: the same B gives the same step for any split into ranks and micro-steps."""
    a, b = results(1)["ddp", 4, "global", 0.2], results(W)[parallel, 4, "global", 0.2]
    for variant in VARIANTS:
        assert relative(a[variant]["gradient"], b[variant]["gradient"]) < 1e-6
    assert (
        relative(
            a["uniform"]["gradient"], results(1)["ddp", 4, "global", 0.0]["uniform"]["gradient"]
        )
        > 0.01
    )


@pytest.mark.parametrize("W, parallel", [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "ddp")])
def test_micro_scope_weights_each_micro_step_on_its_own(results, W, parallel):
    got, B, A = results(W)[parallel, 4, "micro", 0.0], 4, G // (W * 4)
    for strategy in FORMULAS:
        losses, weights = (
            got[strategy][key].numpy().reshape(W, A, B) for key in ("losses", "weights")
        )
        for a in range(A):
            expected = reference(losses[:, a].ravel(), strategy, 0.4) / A
            np.testing.assert_allclose(weights[:, a].ravel(), expected, atol=1e-6)


def test_global_batches_are_identical_for_any_layout(tmp_path):
    """Each rank's slices, laid end to end in rank order, are the same global batch."""
    from conftest import write_shards

    tokens = np.arange(3000) % 250
    write_shards(
        tmp_path,
        {d: {"train": np.roll(tokens, i), "val": tokens[:50]} for i, d in enumerate(data.DOMAINS)},
    )
    run_data = data.open_data(str(tmp_path), 16, "doge", 16, 42, 1)

    def batch(W):
        parts = []
        for rank in range(W):
            step = list(data.batches(run_data, 9, 12, rank, W))[2]
            assert torch.equal(step.domain, torch.from_numpy(step.pairs[:, 0]))
            parts.append(step.x)
        return torch.cat(parts), step.pairs

    x, pairs = batch(1)
    for W in (2, 4, 16):
        other_x, other_pairs = batch(W)
        assert torch.equal(other_x, x) and np.array_equal(other_pairs, pairs)
