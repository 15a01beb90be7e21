"""scripts/probe_utility.py: utilities against a float64 loop, verdicts on made-up samples."""

import json

import numpy as np
import pytest
import torch
from conftest import command, expect_error, expect_ok
from test_train import run

from data import read_batch
from runtime import checkpoint
from scripts.probe_utility import (
    FOLDS,
    Choice,
    Found,
    Probe,
    Samples,
    examine,
    groups,
    judge,
)

PROBE = "scripts/probe_utility.py"


@pytest.fixture(scope="module")
def trained(sample_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("probe") / "run"
    flags = (
        "--max_steps=30",
        "--learning_rate=3e-3",
        "--warmup_steps=2",
        "--checkpoint_interval=15",
    )
    expect_ok(run(sample_data, out, *flags))
    return out


@pytest.fixture(scope="module")
def probe(trained):
    return Probe(checkpoint.find_latest(trained), torch.device("cpu"), None, None)


def gradient(model, split, pairs):
    """Parameter name -> float64 gradient of the mean of the domains' mean losses."""
    x, y, domain = read_batch(split, pairs)
    losses = model(x, y).mean(1)
    means = [losses[domain == d].mean() for d in domain.unique()]
    grads = torch.autograd.grad(torch.stack(means).mean(), list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), grads, strict=True))


def test_utility_is_the_product_of_gradients_through_the_preconditioner(probe, trained):
    """Against each sample's own gradient in float64, with AdamW's formula written out."""
    samples = probe.fold(0, batches=1, windows=4)
    folder = checkpoint.find_latest(trained)
    model = checkpoint.load_model(folder).double().eval()
    state = checkpoint.load_tensors(folder, "optimizer.pt")["state"]

    val = []
    for d in range(len(probe.data.val.domains)):
        own = probe.data.val_windows[probe.data.val_windows[:, 0] == d][::FOLDS]
        val.append(own[np.linspace(0, len(own) - 1, min(4, len(own))).astype(int)])
    g = gradient(model, probe.data.val, np.concatenate(val))
    direction = {}
    for name, of_validation in g.items():
        v = 0.999 * state[name]["exp_avg_sq"].double() + 0.001 * of_validation**2
        direction[name] = of_validation / ((v / (1 - 0.999**31)).sqrt() + 1e-8)

    expected = []
    for pair in probe.data.sampler.draw(probe.step):
        own = gradient(model, probe.data.train, pair[None])
        expected.append(sum((own[name] * direction[name]).sum().item() for name in own))
    expected = np.array(expected)
    np.testing.assert_allclose(samples.utility, expected, atol=0.01 * np.abs(expected).max())
    assert np.corrcoef(samples.utility, expected)[0, 1] > 0.999


def test_the_model_is_as_before(probe, trained):
    before = checkpoint.load_tensors(checkpoint.find_latest(trained), "model.pt")
    probe.fold(1, batches=1, windows=2)
    for name, parameter in probe.model.state_dict().items():
        torch.testing.assert_close(parameter, before[name], rtol=1e-4, atol=1e-5)


def test_folds_share_no_sample(probe):
    drawn = []
    windows = set()
    for k in range(FOLDS):
        samples = probe.fold(k, batches=2, windows=1)
        drawn.append(samples.loss)
        windows.update(samples.loss.tolist())
    assert len(windows) == sum(len(losses) for losses in drawn)


def made_up(utility_of, seed=0):
    """Folds of 4 batches of 8 samples; utility is a function of the loss and of noise."""
    random = np.random.default_rng(seed)
    folds = []
    for _ in range(FOLDS):
        loss = random.uniform(1, 3, 32)
        utility = utility_of(loss, random.normal(size=32))
        domain = np.arange(32) % 2
        folds.append(Samples(domain, loss, np.zeros(32), np.ones(32), utility))
    return folds


UPPER = Choice("upper", 0.4)


def test_weights_help_where_the_utility_rises_with_the_loss():
    found = judge(made_up(lambda loss, noise: loss + 0.1 * noise), 8, UPPER)
    assert found.verdict() == "helps" and found.gain > 0.05
    found = judge(made_up(lambda loss, noise: 4 - loss + 0.1 * noise), 8, UPPER)
    assert found.verdict() == "hurts" and found.gain < -0.05


def test_no_verdict_where_the_utility_is_noise():
    verdicts = []
    for seed in range(40):
        folds = made_up(lambda loss, noise: 1 + noise, seed)
        verdicts.append(judge(folds, 8, UPPER).verdict())
    assert verdicts.count("cannot tell") >= 35


def test_the_change_of_the_mean_by_hand():
    """Two batches of two samples; r so small that all weight is on the higher loss."""
    one = Samples(
        np.zeros(4, int),
        np.array([1.0, 2.0, 4.0, 3.0]),
        np.zeros(4),
        np.ones(4),
        np.array([10.0, 20.0, 50.0, 0.0]),
    )
    found = judge([one] * FOLDS, 2, Choice("upper", 0.01))
    assert found.gain == pytest.approx(((20 + 50) / 2 - 20) / 20)
    assert found.error == pytest.approx(0)
    assert found.ess == pytest.approx(1 / 2)


def test_what_the_weights_see():
    samples = Samples(
        np.zeros(2, int),
        np.array([3.0, 4.0]),
        np.array([1.0, 3.0]),
        np.array([0.5, 0.25]),
        np.ones(2),
    )
    assert samples.seen(Choice("upper", 1)).tolist() == [3, 4]
    assert samples.seen(Choice("upper", 1, "byte")).tolist() == [1.5, 1]
    assert samples.seen(Choice("upper", 1, "token", True)).tolist() == [2, 1]
    assert samples.seen(Choice("upper", 1, "byte", True)).tolist() == [1, 0.25]


def test_groups(probe):
    folds = examine(probe, batches=2)
    found = {name: (share, utility) for name, share, utility, _ in groups(probe, folds)}
    assert [name for name in found if name.startswith("quarter")] == [
        f"quarter {q} by loss" for q in (1, 2, 3, 4)
    ]
    for names in (probe.data.train.domains, [n for n in found if n.startswith("quarter")]):
        present = [found[name] for name in names if name in found]
        assert sum(share for share, _ in present) == pytest.approx(1)


def test_verdict_is_a_t_test():
    assert Found(UPPER, 0.7, gain=0.10, error=0.05).verdict() == "cannot tell"
    assert Found(UPPER, 0.7, gain=0.10, error=0.04).verdict() == "helps"
    assert Found(UPPER, 0.7, gain=-0.10, error=0.04).verdict() == "hurts"


def test_the_command(trained, tmp_path):
    path = tmp_path / "probe.json"
    args = ["--run", trained / "checkpoints/step_00000015", "--batches=1", "--to", path]
    out = expect_ok(command(PROBE, *args, "--reweight_ref", trained))
    assert "step 15:" in out and "linupper, loss minus the reference's per token" in out
    saved = json.loads(path.read_text())
    assert {row["choice"]["strategy"] for row in saved["weights"]} >= {"linupper", "band"}
    assert {row["name"] for row in saved["samples"]} >= {"github", "quarter 1 by loss"}


def test_what_the_command_refuses(trained, sample_data, tmp_path):
    expect_error(command(PROBE, "--run", tmp_path), "no checkpoint")
    expect_error(command(PROBE, "--run", trained, "--batches=0"), "--batches 0")
    expect_error(command(PROBE, "--run", trained, "--r=0"), "--r 0")
    expect_error(command(PROBE, "--run", trained, "--reweight_ref", tmp_path), "no checkpoint")
    expect_error(command(PROBE, "--run", trained, "--data_dir", tmp_path / "x"), "not found")
    muon = tmp_path / "muon"
    expect_ok(run(sample_data, muon, "--max_steps=2", "--optimizer=muon"))
    expect_error(command(PROBE, "--run", muon), "--optimizer adamw")
