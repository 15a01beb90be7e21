"""Samples with most and least weight, from a real run and from a made-up record."""

import numpy as np
from conftest import command, expect_error, expect_ok

import data
from corpus import tokenizer
from corpus.manifest import read_manifest
from runtime.telemetry import SAMPLE


def inspect(run, *flags):
    return command("eval/inspect_samples.py", "--run", run, *flags)


def test_the_text_of_the_ends_is_printed(sample_data, tmp_path):
    expect_ok(
        command(
            "train.py",
            "config/tiny_cpu.py",
            "--data_dir",
            sample_data,
            "--out_dir",
            tmp_path / "run",
            "--block_size=64",
            "--global_batch_size=16",
            "--max_steps=8",
            "--reweight_warmup_steps=0",
            "--eval_windows=2",
            "--reweight=linupper",
            "--record_samples=2",
            "--device=cpu",
        )
    )
    rows = np.fromfile(tmp_path / "run" / "samples.bin", SAMPLE)
    assert len(rows) == 4 * 16 and np.allclose(rows["weight"].reshape(4, 16).mean(1), 1, atol=1e-5)
    text = expect_ok(inspect(tmp_path / "run", "--top", "1", "--from_step", "4"))
    assert "48 samples of steps 4 to 8" in text
    split = data.Split(sample_data, read_manifest(sample_data), "train", 64)
    for d, name in enumerate(split.domains):
        mine = rows[(rows["domain"] == d) & (rows["step"] >= 4)]
        if len(mine):
            most = np.sort(mine, order=["weight", "loss"])[-1]
            start = tokenizer.load("bytes").decode(split.window(d, most["window"])[:20].tolist())
            assert (
                f"== {name}: {len(mine)} samples" in text
                and f"weight {most['weight']:.3f} x 1/G" in text
            )
            assert start.replace("\n", "\\n") in text


def test_what_is_wrong_is_told(sample_data, tmp_path):
    expect_error(inspect(tmp_path), "no config.json")
    (tmp_path / "config.json").write_text(
        f'{{"data_dir": "{sample_data}", "block_size": 64, "reweight": "upper"}}'
    )
    expect_error(inspect(tmp_path), "--record_samples")
    np.array([(5, 0, 10**6, 1, 1)], SAMPLE).tofile(tmp_path / "samples.bin")
    expect_error(inspect(tmp_path, "--from_step", "6"), "no sample from step 6")
    expect_error(inspect(tmp_path), "does not hold the samples")
    expect_error(inspect(tmp_path, "--top", "0"), "--top 0")
    expect_error(inspect(tmp_path, "--data_dir", tmp_path / "none"), "not found")
