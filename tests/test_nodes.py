"""Several nodes: two torchrun agents on this machine, joined as two machines would be, and a
worker that dies.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, command, expect_ok, free_port

FLAGS = (
    "config/tiny_cpu.py",
    "--block_size=32",
    "--global_batch_size=8",
    "--warmup_steps=2",
    "--eval_windows=4",
    "--reweight_warmup_steps=3",
    "--reweight=linupper",
    "--log_interval=1",
    "--device=cpu",
    "--max_steps=8",
    "--checkpoint_interval=4",
    "--eval_interval=8",
)


def two_nodes(script, *flags):
    """One worker on each of two agents that find each other by c10d; the text that both printed."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=localhost:{free_port()}",
        "--rdzv_id=test",
        "--local_addr=localhost",
        "--max_restarts=3",
        "--",
        script,
        *map(str, flags),
    ]
    environment = {
        **os.environ,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # as scripts/slurm/train.sbatch has it
    agents = [
        subprocess.Popen(
            launcher,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    try:
        texts = [agent.communicate(timeout=280)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(texts)
    return "".join(texts)


def outcome(out):
    """Parameters at the end and the lines of the log without their times."""
    model = torch.load(out / "checkpoints" / "step_00000008" / "model.pt", weights_only=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return model, [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


def same(a, b):
    assert a[0].keys() == b[0].keys() and all(torch.equal(a[0][key], b[0][key]) for key in a[0])
    # a histogram after a resume is of the steps since it
    a, b = ([line for line in records if line["kind"] != "histogram"] for _, records in (a, b))
    assert a == b


@pytest.fixture(scope="module")
def one_node(sample_data, tmp_path_factory):
    """Two workers of one agent."""
    out = tmp_path_factory.mktemp("one") / "run"
    expect_ok(command("train.py", *FLAGS, "--data_dir", sample_data, "--out_dir", out, ranks=2))
    return outcome(out)


def test_the_doctor_measures_the_network_between_nodes(sample_data, tmp_path):
    flags = ["--doctor", "--model=tiny", "--device=cpu", "--data_dir", sample_data]
    flags += ["--out_dir", tmp_path / "run"]
    speeds = r", .* ms for one number, \d+\.\d\d GB/s through each rank"
    one = expect_ok(command("train.py", *flags, ranks=2))
    assert re.search(f"network    gloo, 1 node{speeds}", one) and one.count("network  ") == 1
    assert re.search(f"network    gloo, 2 nodes{speeds}", two_nodes("train.py", *flags))


def test_two_nodes_are_two_workers_of_one(one_node, sample_data, tmp_path):
    two_nodes("train.py", *FLAGS, "--data_dir", sample_data, "--out_dir", tmp_path / "run")
    same(outcome(tmp_path / "run"), one_node)


def test_a_killed_worker_is_started_again_and_the_run_goes_on(one_node, sample_data, tmp_path):
    text = two_nodes(
        "tests/dying_worker.py", *FLAGS, "--data_dir", sample_data, "--out_dir", tmp_path / "run"
    )
    assert re.search("resumed from .*step_00000004", text)
    same(outcome(tmp_path / "run"), one_node)


def test_the_job_of_several_nodes_says_what_it_would_run():
    def dry(**variables):
        return expect_ok(
            subprocess.run(
                ["bash", "scripts/slurm/train.sbatch", "config/tiny_cpu.py", "--r", "0.5"],
                cwd=ROOT,
                capture_output=True,
                text=True,
                env={**os.environ, "DRY_RUN": "1", **variables},
            )
        )

    text = dry(NODES="4")
    assert (
        "sbatch" in text
        and "--nodes 4" in text
        and text.strip().endswith("train.sbatch config/tiny_cpu.py --r 0.5")
    )
    text = dry(SLURM_JOB_ID="17", SLURM_NNODES="4", SLURMD_NODENAME="gpu3", GPUS="2")
    assert "--nnodes 4 --nproc_per_node 2" in text and "--rdzv_endpoint gpu3:" in text
    assert text.strip().endswith("-- train.py config/tiny_cpu.py --r 0.5")
