"""The layout invariant: ranks, accumulation, DDP and FSDP change no batch, weight or step."""

import numpy as np
import pytest
import torch
from conftest import command, expect_ok, write_shards
from layout_worker import (
    BATCHES,
    BYTE_LENGTHS,
    CONTROLS,
    FEW_VARIANTS,
    LAYOUTS,
    LLAMA_VARIANTS,
    MICRO_LAYOUTS,
    REFERENCES,
    VARIANTS,
    WAYS,
    G,
    T,
    domains,
    expected_losses,
    global_batch,
    reference_model,
    small_model,
)
from test_reweight import FORMULAS, reference

import data
from corpus.manifest import DOMAINS
from reweight import shuffled_order

layouts = pytest.mark.parametrize("W, parallel, B", LAYOUTS)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results(W) -> what tests/layout_worker.py saved with W ranks; each W is run once."""
    folder = tmp_path_factory.mktemp("layouts")
    loaded = {}

    def run(W):
        if W not in loaded:
            expect_ok(command("tests/layout_worker.py", folder / f"{W}.pt", ranks=W))
            loaded[W] = torch.load(folder / f"{W}.pt")
        return loaded[W]

    return run


@pytest.fixture(scope="module")
def one(results):
    """One step of each variant in one process without accumulation."""
    return results(1)["ddp", G, "global", 0.0]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def assert_same_steps(got, expected, variants):
    for variant in variants:
        a, b = got[variant], expected[variant]
        assert relative(a["gradient"], b["gradient"]) < 1e-6
        torch.testing.assert_close(a["norm"], b["norm"], atol=0, rtol=1e-6)
        torch.testing.assert_close(a["losses"], b["losses"], atol=1e-5, rtol=0)
        torch.testing.assert_close(a["weights"], b["weights"], atol=1e-6, rtol=0)


@layouts
def test_every_layout_gives_the_same_step(results, one, W, parallel, B):
    assert_same_steps(results(W)[parallel, B, "global", 0.0], one, VARIANTS)


@layouts
def test_every_layout_gives_the_same_step_of_a_llama(results, W, parallel, B):
    expected = results(1)["ddp", G, "llama"]
    assert_same_steps(results(W)[parallel, B, "llama"], expected, LLAMA_VARIANTS)


families = pytest.mark.parametrize("name", ["train", "llama, train"])


@families
@layouts
def test_every_layout_trains_alike(results, W, parallel, B, name):
    """Losses, not parameters: AdamW magnifies rounding where a gradient is almost zero."""
    expected = results(1)["ddp", G, name]["losses"]
    assert expected[:BATCHES].mean() - expected[BATCHES:].mean() > 0.1  # it learns
    got = results(W)[parallel, B, name]["losses"]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@families
@layouts
def test_a_nan_on_one_rank_skips_the_step_on_all(results, W, parallel, B, name):
    assert results(W)[parallel, B, name]["unchanged"]


@pytest.mark.parametrize("W, B", [(W, B) for W, parallel, B in LAYOUTS if parallel == "ddp"])
def test_every_layout_trains_alike_with_muon(results, W, B):
    """The moments after a step are that step's gradient. From then on Muon's bfloat16 magnifies
    rounding: parameters are the same bits on all ranks, but not in all layouts.
    """
    expected, got = results(1)["ddp", G, "muon"], results(W)["ddp", B, "muon"]
    assert relative(gradient_of(got["first"]), gradient_of(expected["first"])) < 1e-6
    losses = expected["losses"]
    assert losses[:BATCHES].mean() - losses[BATCHES:].mean() > 0.05  # it learns
    torch.testing.assert_close(got["losses"], losses, atol=1e-4, rtol=0)
    assert got["unchanged"] and got["same on all ranks"]


def gradient_of(optimizer: dict) -> torch.Tensor:
    """The gradient, all as one row, of which Muon keeps 0.05 and AdamW 0.1 after one step."""
    parts = []
    for state in optimizer["state"].values():
        of_muon = "momentum_buffer" in state
        part = state["momentum_buffer"] / 0.05 if of_muon else state["exp_avg"] / 0.1
        parts.append(part.flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("W, parallel", [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
@pytest.mark.parametrize("way", WAYS)
def test_ways_of_saving_memory_change_no_step(results, way, W, parallel):
    """Against the plain step with the same B, with and without dropout; a NaN skips it too."""
    for dropout in (0.0, 0.2):
        expected = results(1)["ddp", 4, "global", dropout]
        got = results(W)[parallel, way, dropout]
        assert_same_steps(got, expected, FEW_VARIANTS)
        if W == 1 and "loss_chunk" not in way:
            for variant in FEW_VARIANTS:
                assert torch.equal(got[variant]["gradient"], expected[variant]["gradient"])
    assert_same_steps(
        results(W)[parallel, way, "llama"], results(1)["ddp", 4, "llama"], FEW_VARIANTS
    )
    train = results(W)[parallel, way, "train"]
    assert train["unchanged"]
    # With dropout: the same B gives the same noise.
    expected = results(1)["ddp", way, "train"]["losses"]
    torch.testing.assert_close(train["losses"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("W, parallel", [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_a_step_in_bfloat16_is_near_the_one_in_float32(results, one, W, parallel):
    got, expected = results(W)[parallel, "bfloat16"], one["linupper"]
    assert 1e-4 < relative(got["gradient"], expected["gradient"]) < 1e-2
    torch.testing.assert_close(got["weights"], expected["weights"], atol=2e-3, rtol=0)


def reference_weights(losses, variant):
    """Float64 weights of a variant at step 3 of tests/layout_worker.py."""
    if variant in CONTROLS:
        return control_weights(losses, variant, np.arange(G), 0)
    if variant in REFERENCES:
        rows = global_batch()
        of_reference = sample_losses(reference_model().double(), rows).detach().numpy()
        n_bytes = BYTE_LENGTHS[rows[:, 1:]].sum(1).numpy()
        return reference((losses - of_reference) * T / n_bytes, "linupper", r=0.4)
    if variant != "robust":
        return reference(losses, variant, r=0.4)
    losses = losses - expected_losses().numpy()
    clipped = np.clip(losses, *np.sort(losses)[[2, -3]])  # a tenth of 16 samples at each end
    return reference(clipped, "linupper", r=2.0 - 1.6 * 0.3, cap=1.2)


def control_weights(losses, control, samples, first):
    """Those of linupper per byte, weighted together, on other samples of them."""
    n_bytes = BYTE_LENGTHS[global_batch()[samples, 1:]].sum(1).numpy()
    weights = reference(losses * T / n_bytes, "linupper", r=0.4)
    order = shuffled_order(len(samples), 42, 3, first).tolist()
    if control == "shuffled":
        return weights[order]
    domain = domains()[samples].tolist()
    of_domain = [[i for i in order if domain[i] == d] for d in range(3)]
    return weights[[of_domain[d].pop(0) for d in domain]]


def sample_losses(model, rows):
    """(G, T + 1) tokens -> (G,) losses, from the logits."""
    logits = model(rows[:, :-1]).transpose(1, 2)
    return torch.nn.functional.cross_entropy(logits, rows[:, 1:], reduction="none").mean(1)


STEPS_IN_FLOAT64 = [("gpt2", name) for name in (*FORMULAS, "robust", *CONTROLS, *REFERENCES)]
STEPS_IN_FLOAT64 += [("llama", name) for name in LLAMA_VARIANTS]


@pytest.mark.parametrize("family, variant", STEPS_IN_FLOAT64)
def test_the_step_is_the_weighted_gradient_in_float64(results, one, family, variant):
    model, rows = small_model(0.0, family).double(), global_batch()
    losses = sample_losses(model, rows)
    weights = reference_weights(losses.detach().numpy(), variant)
    sum(w * loss for w, loss in zip(weights, losses, strict=True)).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    got = one[variant] if family == "gpt2" else results(1)["ddp", G, "llama"][variant]
    assert relative(got["gradient"].double(), gradient) < 1e-5
    np.testing.assert_allclose(got["weights"].numpy(), weights, atol=1e-6)
    if variant not in ("uniform", "robust"):  # equal weights would show nothing
        assert got["weights"].max() > 2 * got["weights"].min()


def test_uniform_is_the_plain_mean_bit_for_bit(one):
    model, rows = small_model(0.0).train(), global_batch()
    model(rows[:, :-1], rows[:, 1:]).mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.equal(one["uniform"]["gradient"], gradient)


@pytest.mark.parametrize("W, parallel", [(2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")])
def test_dropout_noise_does_not_depend_on_ranks(results, W, parallel):
    """Noise belongs to the micro-batch: with one B, any split into ranks gives one step."""
    expected = results(1)["ddp", 4, "global", 0.2]
    got = results(W)[parallel, 4, "global", 0.2]
    for variant in FEW_VARIANTS:
        assert relative(got[variant]["gradient"], expected[variant]["gradient"]) < 1e-6
    without_noise = results(1)["ddp", 4, "global", 0.0]["uniform"]["gradient"]
    assert relative(expected["uniform"]["gradient"], without_noise) > 0.01


@pytest.mark.parametrize("W, parallel", MICRO_LAYOUTS)
def test_micro_scope_weights_each_micro_step_on_its_own(results, W, parallel):
    got = results(W)[parallel, 4, "micro", 0.0]
    B = 4
    A = G // (W * B)
    for strategy in FORMULAS:
        losses = got[strategy]["losses"].numpy().reshape(W, A, B)
        weights = got[strategy]["weights"].numpy().reshape(W, A, B)
        for a in range(A):
            expected = reference(losses[:, a].ravel(), strategy, 0.4) / A
            np.testing.assert_allclose(weights[:, a].ravel(), expected, atol=1e-6)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("W, parallel", MICRO_LAYOUTS)
def test_a_control_moves_weights_within_its_micro_step(results, W, parallel, control):
    got = results(W)[parallel, 4, "micro", 0.0][control]
    B = 4
    A = G // (W * B)
    samples, losses, weights = (
        values.reshape(W, A, B)
        for values in (np.arange(G), got["losses"].numpy(), got["weights"].numpy())
    )
    for a in range(A):
        expected = control_weights(losses[:, a].ravel(), control, samples[:, a].ravel(), a * B)
        np.testing.assert_allclose(weights[:, a].ravel(), expected / A, atol=1e-6)


def test_global_batches_are_identical_for_any_layout(tmp_path):
    """Each rank's slices, laid end to end in rank order, are the same global batch."""
    tokens = np.arange(3000) % 250
    domains = {}
    for i, name in enumerate(DOMAINS):
        domains[name] = {"train": np.roll(tokens, i), "val": tokens[:50]}
    write_shards(tmp_path, domains)
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
