"""Statistics worked by hand; skipped steps, histograms and sample records of a few known steps."""

import math

import numpy as np
import pytest
import torch
from conftest import write_shards

import data
from corpus.manifest import read_manifest
from runtime import telemetry
from runtime.telemetry import SAMPLE, StepResult, Telemetry, histogram, weight_statistics


@pytest.fixture
def split(tmp_path):
    folder = write_shards(
        tmp_path / "d",
        {d: {"train": np.arange(101), "val": np.arange(20)} for d in ("arxiv", "c4")},
    )
    return data.Split(folder, read_manifest(folder), "train", 10)


NO_LIMITS = torch.tensor([math.inf, math.inf])


def add(collected, step, losses, weights, norm=1.0, domain=(0, 0, 1, 1)):
    pairs = np.stack([domain, np.arange(4) + step], axis=1)
    taken = torch.tensor(math.isfinite(norm))
    result = StepResult(
        torch.tensor(losses), torch.tensor(weights), torch.tensor(norm), NO_LIMITS, taken
    )
    collected.add(step, pairs, result)


def test_statistics_by_hand():
    losses, weights = np.array([[1.0, 2.0, 3.0, 6.0]]), np.array([[0.5, 0.25, 0.25, 0.0]])
    s = weight_statistics(losses, weights, np.array([[0, 0, 2, 2]]), ("a", "b", "c"))
    assert s["loss"] == 3 and s["weighted_loss"] == 1.75 and s["max_weight"] == 2
    assert s["ess"] == pytest.approx(1 / 0.375 / 4) and s["entropy"] == pytest.approx(
        1.5 * math.log(2)
    )
    assert s["above_bound"] == 0  # exactly 2 / G is allowed
    assert s["correlation"] == pytest.approx(np.corrcoef(losses[0], weights[0])[0, 1])
    assert s["weight_by_domain"] == {"a": 0.75, "c": 0.25} and s["loss_by_domain"] == {
        "a": 1.5,
        "c": 4.5,
    }
    assert s["samples_by_domain"] == {"a": 0.5, "c": 0.5}


def test_statistics_are_means_over_the_steps(split, tmp_path):
    collected = Telemetry(split, tmp_path, 0, 0)
    add(collected, 1, [1.0, 2.0, 3.0, 4.0], [0.25] * 4, norm=1.0)
    add(collected, 2, [2.0, 2.0, 2.0, 6.0], [0.1, 0.1, 0.1, 0.7], norm=3.0)
    record, skips = collected.flush()
    assert not skips and record["loss"] == pytest.approx(2.75) and record["grad_norm"] == 2
    assert record["max_weight"] == pytest.approx(2.8) and record["ess"] == pytest.approx(
        (1 + 1 / 0.52 / 4) / 2
    )
    assert record["above_bound"] == 0.5
    assert record["weight_by_domain"] == pytest.approx({"arxiv": 0.35, "c4": 0.65})
    assert record["correlation"] == pytest.approx(0.5)  # equal weights count as 0
    histograms = collected.histograms()
    assert sum(histograms["loss"]["counts"]) == sum(histograms["weight"]["counts"]) == 8
    assert histograms["weight"]["low"] == pytest.approx(0.4) and histograms["weight"][
        "high"
    ] == pytest.approx(2.8)
    assert collected.histograms() == {}


def test_skipped_steps_name_their_samples(split, tmp_path):
    collected = Telemetry(split, tmp_path, 0, 1)
    add(collected, 1, [1.0, 2.0, 3.0, 4.0], [0.25] * 4)
    add(collected, 2, [1.0, math.nan, 3.0, math.inf], [math.nan] * 4, norm=math.nan)
    add(collected, 3, [1.0, 2.0, 3.0, 5.0], [0.25] * 4, norm=math.inf)
    record, (first, second) = collected.flush()
    assert record["loss"] == 2.5 and record["grad_norm"] == 1 and collected.skipped == [2, 3]
    assert first == {
        "kind": "skip",
        "step": 2,
        "reason": "loss",
        "samples": [
            {"domain": "arxiv", "window": 3, "loss": "nan"},
            {"domain": "c4", "window": 5, "loss": "inf"},
        ],
    }
    assert second["reason"] == "gradient" and [s["loss"] for s in second["samples"]] == [1, 2, 3, 5]
    add(collected, 4, [1.0] * 4, [0.25] * 4, norm=math.nan)
    assert collected.flush()[0] == {} and collected.skipped == [2, 3, 4]
    add(collected, 5, [1.0] * 4, [0.25] * 4)
    collected.flush()
    assert collected.skipped == []
    assert np.fromfile(tmp_path / "samples.bin", SAMPLE)["step"].tolist() == [1] * 4 + [5] * 4


def test_recorded_samples_and_resume(split, tmp_path):
    collected = Telemetry(split, tmp_path, 0, 2)
    for step in range(1, 6):
        add(collected, step, [1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4])
    collected.flush()
    rows = np.fromfile(tmp_path / "samples.bin", SAMPLE)
    assert (
        rows["step"].tolist() == [2] * 4 + [4] * 4 and rows["domain"].tolist() == [0, 0, 1, 1] * 2
    )
    assert rows["window"].tolist() == [2, 3, 4, 5, 4, 5, 6, 7] and rows["loss"][:4].tolist() == [
        1,
        2,
        3,
        4,
    ]
    assert rows["weight"][:4].tolist() == pytest.approx([0.4, 0.8, 1.2, 1.6])
    Telemetry(split, tmp_path, 3, 2)  # resumed from step 3: step 4 will come again
    assert np.fromfile(tmp_path / "samples.bin", SAMPLE)["step"].tolist() == [2] * 4


def test_histogram_covers_all_values():
    values = np.random.default_rng(0).normal(3, 1, 1000)
    h = histogram(values)
    assert sum(h["counts"]) == 1000 and len(h["counts"]) == telemetry.BINS
    assert (h["low"], h["high"]) == (values.min(), values.max())
    assert sum(histogram(np.full(5, 2.0))["counts"]) == 5


def test_kinds_of_windows(tmp_path):
    """A window counts to the kind of most of its targets; without an index there are no kinds."""
    from corpus.shards import ShardWriter

    write_shards(tmp_path, {"c4": {"train": np.zeros(1), "val": np.arange(30)}})
    writer = ShardWriter(tmp_path, "c4", "train", 45)
    for length, kind in ((12, "noise"), (9, "ordinary"), (4, ""), (40, "noise"), (12, "")):
        writer.add(np.zeros(length, dtype=np.uint16), length, kind)
    manifest = read_manifest(tmp_path)
    manifest["domains"]["c4"]["train"] = writer.close()
    split = data.Split(tmp_path, manifest, "train", 10)
    assert split.kinds == ("noise", "ordinary") and split.n_windows.tolist() == [4 + 3]
    # first shard: noise 0-11, ordinary 12-20, none 21-24, noise 25-44; targets of window i: 10 i +
    # 1 to 10 i + 10 second shard: noise 0-19, none 20-31
    kinds = split.kind_of(np.array([[0, w] for w in range(7)]))
    assert kinds.tolist() == [0, 1, 0, 0, 0, 0, -1]
    plain = write_shards(tmp_path / "plain", {"c4": {"train": np.arange(50), "val": np.arange(20)}})
    assert data.Split(plain, read_manifest(plain), "train", 10).kinds == ()
    assert not list(plain.rglob("*.kinds.npy"))
