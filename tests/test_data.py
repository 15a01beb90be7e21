"""Windows, sampler and batches, on shards of known numbers."""

import gc
import itertools
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_shards

import data
from cli import UserError
from corpus.manifest import DOMAINS, kinds_path, read_manifest
from corpus.shards import ShardWriter


@pytest.fixture
def folder(tmp_path):
    return write_shards(
        tmp_path,
        {
            "arxiv": {"train": np.arange(0, 101), "val": np.arange(0, 50)},
            "wikipedia": {"train": np.arange(1000, 1055), "val": np.arange(0, 50)},
        },
    )


def open_split(folder, split="train", block_size=10):
    return data.Split(folder, read_manifest(folder), split, block_size)


@pytest.mark.filterwarnings("error")
def test_open_shards_are_closed_without_a_warning(folder, monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    split = open_split(folder)
    split.window(0, 0)
    file = split.open(split.paths[0][0])
    number = file.fileno()
    del split, file
    gc.collect()
    assert not unraisable
    with pytest.raises(OSError):
        os.fstat(number)


def test_windows_make_each_token_a_target_once(folder):
    split = open_split(folder)
    assert split.domains == ("arxiv", "wikipedia") and split.n_windows.tolist() == [10, 5]
    targets = np.concatenate([split.window(0, i)[1:] for i in range(10)])
    assert targets.tolist() == list(range(1, 101))
    assert split.window(1, 0).tolist() == list(range(1000, 1011))


def test_a_window_needs_all_of_its_targets(tmp_path):
    """Of 20 tokens, 19 can be targets."""
    folder = write_shards(tmp_path, {"c4": {"train": np.arange(20), "val": np.arange(21)}})
    assert open_split(folder).n_windows.tolist() == [1]
    assert open_split(folder, "val").n_windows.tolist() == [2]


@pytest.mark.parametrize("tokens, windows", [(0, 0), (1, 0), (2, 1)])
def test_windows_of_one_target(tmp_path, tokens, windows):
    folder = write_shards(tmp_path, {"c4": {"train": np.arange(9), "val": np.arange(9)}})
    manifest = read_manifest(folder)
    writer = ShardWriter(folder, "c4", "train", 10)
    writer.write(np.arange(tokens, dtype=np.uint16))
    manifest["domains"]["c4"]["train"] = writer.close()
    split = data.Split(folder, manifest, "train", 1)
    assert split.n_windows.tolist() == [windows]


def test_windows_do_not_cross_shards(tmp_path):
    write_shards(tmp_path, {"c4": {"train": np.zeros(1), "val": np.arange(30)}})
    writer = ShardWriter(tmp_path, "c4", "train", 25)
    for start in range(0, 70, 7):
        writer.add(np.arange(start, start + 7, dtype=np.uint16), 7)
    manifest = read_manifest(tmp_path)
    manifest["domains"]["c4"]["train"] = shards = writer.close()
    assert [s["tokens"] for s in shards] == [25, 25, 20] and sum(
        s["documents"] for s in shards
    ) == 10
    split = data.Split(tmp_path, manifest, "train", 8)
    assert split.n_windows.tolist() == [3 + 3 + 2]
    starts = [split.window(0, i)[0] for i in range(8)]
    assert starts == [0, 8, 16, 25, 33, 41, 50, 58]
    assert all(np.diff(split.window(0, i)).tolist() == [1] * 8 for i in range(8))


def test_read_batch(folder):
    x, y, domain = data.read_batch(open_split(folder), np.array([[1, 2], [0, 0]]))
    assert x.dtype == y.dtype == torch.int64 and domain.tolist() == [1, 0]
    assert x[0].tolist() == list(range(1020, 1030)) and y[0].tolist() == list(range(1021, 1031))


def test_permutation_is_one(n_values=(1, 2, 3, 5, 64, 1000, 4097)):
    for n in n_values:
        out = data.permute(np.arange(n), n, 1, 2, 3)
        assert sorted(out.tolist()) == list(range(n))
    a, b = (data.permute(np.arange(1000), 1000, 42, 0, epoch) for epoch in (0, 1))
    assert (a != b).mean() > 0.9 and (a != np.arange(1000)).mean() > 0.9
    assert abs(np.corrcoef(a, np.arange(1000))[0, 1]) < 0.1


@pytest.mark.parametrize("n", [16, 17, 64, 65])
def test_no_window_has_a_place_of_its_own(n):
    """Around the sizes at which the permutation changes its form."""
    orders = [data.permute(np.arange(n), n, seed, 0, 0).tolist() for seed in range(99)]
    assert len({order.index(n - 1) for order in orders}) > 10


def test_permutations_are_stable():
    """A resumed or repeated run sees the windows in the order that it saw before."""
    first_four = {n: data.permute(np.arange(4), n, 1, 2, 3).tolist() for n in (16, 17, 64, 65)}
    assert first_four == {
        16: [13, 12, 11, 6],
        17: [14, 0, 3, 13],
        64: [44, 61, 33, 13],
        65: [28, 18, 47, 49],
    }


def test_few_windows_come_in_every_order():
    """All 24 orders of four windows, each about as often as the others."""
    orders = [tuple(data.permute(np.arange(4), 4, seed, 0, 0)) for seed in range(2400)]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert sum(counts) == 2400 and 60 < min(counts) and max(counts) < 140


def test_permutation_of_ten_billion_needs_no_table():
    n = 10**10
    out = data.permute(np.arange(n - 1000, n), n, 7, 0, 0)
    assert len(set(out.tolist())) == 1000 and 0 <= out.min() and out.max() < n


def test_sampler_draws_every_window_once_an_epoch():
    sampler = data.DomainSampler(np.array([0.7, 0.3]), np.array([20, 50]), 8, seed=3)
    drawn = np.concatenate([sampler.draw(step) for step in range(60)])
    first = drawn[drawn[:, 0] == 0][:, 1]
    assert len(first) > 60
    for epoch in range(len(first) // 20):
        assert sorted(first[epoch * 20 : (epoch + 1) * 20].tolist()) == list(range(20))
    assert first[:20].tolist() != first[20:40].tolist()


def test_sampler_is_a_function_of_the_step():
    weights, windows = np.full(7, 1 / 7), np.arange(3, 10)
    ordered = data.DomainSampler(weights, windows, 16, seed=42)
    expected = [ordered.draw(step) for step in range(30)]
    jumping = data.DomainSampler(weights, windows, 16, seed=42)
    for step in (17, 3, 29, 0, 17):
        assert np.array_equal(jumping.draw(step), expected[step])
    other = data.DomainSampler(weights, windows, 16, seed=43)
    assert not np.array_equal(other.draw(0), expected[0])


def test_file_order_takes_windows_one_after_the_other():
    weights, windows = np.full(7, 1 / 7), np.arange(3, 10)
    shuffled = data.DomainSampler(weights, windows, 16, seed=42)
    in_turn = data.DomainSampler(weights, windows, 16, seed=42, order="file")
    drawn = [in_turn.draw(step) for step in range(30)]
    for step in (17, 3):  # a function of the step
        assert np.array_equal(in_turn.draw(step), drawn[step])
    for step in range(30):
        assert np.array_equal(drawn[step][:, 0], shuffled.draw(step)[:, 0])
    drawn = np.concatenate(drawn)
    for domain, n in enumerate(windows):
        numbers = drawn[drawn[:, 0] == domain][:, 1]
        assert np.array_equal(numbers, np.arange(len(numbers)) % n)


def new_sampler(seed=42, weights=(0.5, 0.3, 0.2), global_batch_size=16):
    return data.DomainSampler(np.array(weights), np.arange(3, 6), global_batch_size, seed)


def counted_steps(monkeypatch) -> list[int]:
    """The steps whose domains are drawn from now on."""
    steps = []
    real = data.DomainSampler.domains_of

    def noting(self, step):
        steps.append(step)
        return real(self, step)

    monkeypatch.setattr(data.DomainSampler, "domains_of", noting)
    return steps


def test_saved_counts_give_the_same_draws_without_a_replay(monkeypatch):
    unbroken = new_sampler()
    expected = [unbroken.draw(step) for step in range(60)]
    # Batches are read ahead of the step that is saved, or the run goes back to an earlier one.
    saved = {step: json.loads(json.dumps(unbroken.state(step))) for step in (57, 50, 20)}
    for step, state in saved.items():
        drawn = np.concatenate(expected[:step])[:, 0]
        assert state["step"] == step and state["drawn"] == np.bincount(drawn).tolist()
        resumed = new_sampler()
        resumed.load_state(state)
        with monkeypatch.context() as patch:
            steps = counted_steps(patch)
            for later in range(step, 60):
                assert np.array_equal(resumed.draw(later), expected[later])
        assert min(steps) == step


WRONG_COUNTS = {
    "absent": lambda state: None,
    "no object": lambda state: [1, 2, 3],
    "empty": lambda state: {},
    "another step": lambda state: {**state, "step": 8},
    "no step": lambda state: {**state, "step": None},
    "negative": lambda state: {**state, "drawn": [-n for n in state["drawn"]]},
    "too long": lambda state: {**state, "drawn": [*state["drawn"], 0]},
    "swapped": lambda state: {**state, "drawn": state["drawn"][::-1]},
    "text": lambda state: {**state, "drawn": "abc"},
    "of another seed": lambda state: new_sampler(seed=43).state(9),
    "of another mixture": lambda state: new_sampler(weights=(0.2, 0.3, 0.5)).state(9),
    "of another batch": lambda state: new_sampler(global_batch_size=8).state(9),
}


@pytest.mark.parametrize("case", WRONG_COUNTS)
def test_wrong_counts_are_not_used(case, monkeypatch):
    expected = new_sampler().draw(9)
    saved = new_sampler().state(9)
    resumed = new_sampler()
    resumed.load_state(WRONG_COUNTS[case](saved))
    steps = counted_steps(monkeypatch)
    assert np.array_equal(resumed.draw(9), expected)
    assert min(steps) == 0  # counted again from the start


def test_the_next_step_counts_on_from_the_last_one(monkeypatch):
    sampler = new_sampler()
    sampler.draw(50)
    steps = counted_steps(monkeypatch)
    sampler.draw(51)
    assert steps == [50, 51]


@pytest.mark.parametrize("raw, domain", [(0, 1), (2**64 - 1, 10)])
def test_no_random_number_draws_a_domain_without_weight(monkeypatch, raw, domain):
    """The smallest one draws the first domain in use; the largest one the last, although ten
    times 0.1 adds up to less than 1.
    """
    generator = SimpleNamespace(random_raw=lambda n: np.full(n, raw, dtype=np.uint64))
    monkeypatch.setattr(np.random, "Philox", lambda key: generator)
    weights = np.array([0.0, *[0.1] * 10, 0.0])
    sampler = data.DomainSampler(weights, np.full(12, 3), 4, seed=1)
    assert sampler.draw(0)[:, 0].tolist() == [domain] * 4


def test_sampler_is_stable_across_versions_of_numpy():
    sampler = data.DomainSampler(np.full(7, 1 / 7), np.full(7, 1000), 6, seed=42)
    assert sampler.draw(5).tolist() == [[2, 525], [3, 322], [1, 371], [1, 217], [6, 243], [6, 606]]


@pytest.mark.parametrize("name", data.MIXTURES)
def test_mixtures_are_drawn_as_stated(name, tmp_path):
    shards = {
        d: {"train": np.arange(100 * (i + 1)), "val": np.arange(20)} for i, d in enumerate(DOMAINS)
    }
    split = open_split(write_shards(tmp_path, shards))
    p = data.mixture_weights(name, split)
    assert p.sum() == pytest.approx(1)
    of_the_data = {
        "uniform": dict.fromkeys(DOMAINS, 1.0),
        "natural": {d: 100.0 * (i + 1) for i, d in enumerate(DOMAINS)},
    }
    row = data.MIXTURES[name] or of_the_data[name]
    total = sum(row.values())
    assert dict(zip(split.domains, p, strict=True)) == pytest.approx(
        {d: row.get(d, 0) / total for d in DOMAINS}
    )
    sampler = data.DomainSampler(p, split.n_windows, 4000, seed=1)
    counted = np.bincount(sampler.draw(0)[:, 0], minlength=7) / 4000
    assert np.abs(counted - p).max() < 0.03 and not counted[p == 0].any()


def test_uniform_means_the_domains_of_the_data(tmp_path):
    tokens = {d: {"train": np.arange(200), "val": np.arange(20)} for d in ("c4", "code", "web")}
    split = open_split(write_shards(tmp_path, tokens))
    assert data.mixture_weights("uniform", split).tolist() == [1 / 3] * 3
    assert data.mixture_weights("web=3,c4=1", split).tolist() == [0.25, 0, 0.75]
    assert data.probabilities("web=3,c4=1") == {"web": 0.75, "c4": 0.25}


def test_numbers_of_a_mixture_may_be_0_and_stand_apart():
    assert data.probabilities("cc = 0.5, c4 = 0.5") == {"cc": 0.5, "c4": 0.5}
    assert data.probabilities("c4=0,cc=2") == {"c4": 0, "cc": 1}
    assert data.probabilities("natural") is None and data.probabilities("uniform") is None


@pytest.mark.parametrize(
    "text",
    [
        "c4=-1,cc=2",
        "",
        "c4",
        "c4=",
        "=1",
        "c4=-1",
        "c4=nan",
        "c4=inf",
        "c4=0",
        "c4=1,,cc=1",
        "unifrom",
    ],
)
def test_mixtures_that_are_none(text):
    with pytest.raises(UserError, match="expected uniform, natural, doge.*such as cc=0.5,c4=0.5"):
        data.probabilities(text)


def test_empty_domain_of_a_mixture(folder):
    with pytest.raises(UserError, match="'c4cc' asks for cc, c4.*it has: arxiv, wikipedia"):
        data.mixture_weights("c4cc", open_split(folder))


def test_a_domain_too_short_for_a_window(tmp_path):
    """It is not drawn: "natural" takes what there is, the others want all that they name."""
    tokens = {"c4": 200, "cc": 8, "book": 100}
    shards = {d: {"train": np.arange(n), "val": np.arange(20)} for d, n in tokens.items()}
    split = open_split(write_shards(tmp_path, shards))
    assert split.domains == ("book", "cc", "c4")
    assert data.mixture_weights("natural", split) == pytest.approx([1 / 3, 0, 2 / 3])
    assert data.mixture_weights("c4=1,cc=0,web=0", split).tolist() == [0, 0, 1]
    with pytest.raises(UserError, match="'c4cc' asks for cc, but"):
        data.mixture_weights("c4cc", split)


def test_a_domain_that_is_held_out_is_not_asked_for(tmp_path):
    tokens = {"c4": {"train": np.arange(50), "val": np.arange(20)}, "cc": {"val": np.arange(20)}}
    folder = write_shards(tmp_path, tokens)
    manifest = read_manifest(folder)
    manifest["source"]["holdout"] = ["cc"]
    split = data.Split(folder, manifest, "train", 10)
    assert data.mixture_weights("c4cc", split).tolist() == [1]


def test_tokens_beyond_the_vocabulary_are_refused(folder):
    manifest = read_manifest(folder)
    manifest["tokenizer"]["n_vocab"] = 101
    assert data.Split(folder, manifest, "train", 10).window(0, 9).max() == 100
    manifest["tokenizer"]["n_vocab"] = 100
    split = data.Split(folder, manifest, "train", 10)
    assert split.window(0, 8).max() == 90
    with pytest.raises(UserError, match="expected tokens 90 to 100, each below 100"):
        split.window(0, 9)


def test_shards_that_are_cut_short_or_removed_during_the_run(folder):
    split = open_split(folder)
    shard = folder / "arxiv" / "train_00000.npy"
    os.truncate(shard, shard.stat().st_size - 2)
    assert split.window(0, 8).tolist() == list(range(80, 91))
    with pytest.raises(UserError, match="arxiv/train_00000.npy was changed: expected tokens 90"):
        split.window(0, 9)
    (folder / "wikipedia" / "train_00000.npy").unlink()
    with pytest.raises(UserError, match="wikipedia/train_00000.npy cannot be read"):
        split.window(1, 0)


@pytest.mark.parametrize("dtype, shape", [("<i2", (101,)), (">u2", (101,)), ("<u2", (1, 101))])
def test_a_shard_is_a_row_of_uint16(folder, dtype, shape):
    """Files of the right size with other numbers in them."""
    shard = folder / "arxiv" / "train_00000.npy"
    size = shard.stat().st_size
    np.save(shard, np.zeros(shape, dtype=dtype))
    assert shard.stat().st_size == size
    with pytest.raises(UserError, match="arxiv/train_00000.npy holds .* not a row of uint16"):
        open_split(folder).window(0, 0)


def test_the_index_of_the_kinds_is_missing(tmp_path):
    write_shards(tmp_path, {"c4": {"train": np.zeros(1), "val": np.arange(30)}})
    writer = ShardWriter(tmp_path, "c4", "train", 45)
    writer.add(np.arange(40, dtype=np.uint16), 40, "noise")
    manifest = read_manifest(tmp_path)
    manifest["domains"]["c4"]["train"] = writer.close()
    assert data.Split(tmp_path, manifest, "train", 10).kinds == ("noise",)
    kinds_path(tmp_path / "c4" / "train_00000.npy").unlink()
    with pytest.raises(UserError, match="kinds.npy is missing"):
        data.Split(tmp_path, manifest, "train", 10)


def labelled_split(folder, documents, shard_tokens=10**9):
    """Windows of 5 tokens: of c4 with (tokens, label) of its documents, of cc without labels."""
    tokens = {"train": np.arange(20), "val": np.arange(20)}
    write_shards(folder, {"cc": tokens, "c4": tokens})
    writer = ShardWriter(folder, "c4", "train", shard_tokens)
    for n, label in documents:
        writer.add(np.zeros(n, dtype=np.uint16), n, label)
    manifest = read_manifest(folder)
    manifest["domains"]["c4"]["train"] = writer.close()
    split = data.Split(folder, manifest, "train", 5)
    assert split.domains == ("cc", "c4")
    return split


def test_a_window_has_the_label_of_most_of_its_targets(tmp_path):
    """Targets 1 to 5: three of a. Targets 6 to 10: three of a again, after two of b."""
    split = labelled_split(tmp_path, [(4, "a"), (4, "b"), (3, "a")])
    assert split.kind_of(np.array([[1, 0], [1, 1]])).tolist() == [0, 0]


@pytest.mark.parametrize("n, windows", [(10, 1), (11, 2)])
def test_every_window_of_a_shard_has_the_shards_label(tmp_path, n, windows):
    """Two shards of n tokens each."""
    split = labelled_split(tmp_path, [(n, "a"), (n, "b")], shard_tokens=n)
    pairs = np.array([[1, i] for i in range(2 * windows)])
    assert split.kind_of(pairs).tolist() == [0] * windows + [1] * windows


def test_labels_are_sorted_and_a_domain_may_have_none(tmp_path):
    """Every process lists them in the same order."""
    split = labelled_split(tmp_path, [(6, label) for label in "hgfedcba"])
    assert split.kinds == tuple("abcdefgh")
    pairs = np.array([[0, 0], [0, 1], [1, 0], [1, 2]])
    assert split.kind_of(pairs).tolist() == [-1, -1, 7, 5]


def test_missing_and_short_shards(folder):
    shard = folder / "arxiv" / "train_00000.npy"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    with pytest.raises(
        UserError, match=r"arxiv/train_00000.npy has 328 bytes, the manifest says 330"
    ):
        open_split(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"arxiv/train_00000.npy is missing"):
        open_split(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="did not finish"):
        read_manifest(folder)


def test_a_validation_split_without_a_window(folder):
    split = open_split(folder, "val", block_size=60)
    with pytest.raises(UserError, match="the validation split has no window of 60 tokens"):
        data.validation_windows(split, 5)


def test_a_split_describes_its_data(folder):
    """What evaluations and the identity of a run take from it."""
    manifest = read_manifest(folder)
    split = open_split(folder)
    (shard,) = manifest["domains"]["arxiv"]["train"]
    assert split.tokens["arxiv"] == 101
    assert split.bytes["arxiv"] == shard["bytes"]
    assert split.sha256["arxiv"] == [shard["sha256"]]
    assert split.eot_token == manifest["tokenizer"]["eot_token"]
    assert split.tokenizer_sha256 == manifest["tokenizer"]["sha256"]


def test_prefetch_is_two_steps_ahead_to_the_end():
    asked = []
    steps = (asked.append(step) or step for step in range(20))
    for done, step in enumerate(data.prefetch(lambda step: step, steps), 1):
        assert step == done - 1
        assert len(asked) == min(done + 2, 20)


def test_prefetch_keeps_order_and_raises():
    assert list(data.prefetch(lambda step: step * step, range(7))) == [s * s for s in range(7)]
    with pytest.raises(ZeroDivisionError):
        list(data.prefetch(lambda step: 1 // (3 - step), range(7)))
