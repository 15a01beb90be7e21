"""Several nodes: two torchrun agents on this machine, joined as two machines would be.

A worker dies there, too, and is started again.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, expect_ok, free_port
from ranks import torchrun

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


def two_nodes(tmp_path, script, *flags):
    """One worker on each of two agents that find each other by c10d; the text that both printed."""
    args = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=localhost:{free_port()}",
        "--rdzv_id=test",
        "--local_addr=localhost",
        "--max_restarts=3",
        "--",
        script,
        *flags,
    ]
    # As scripts/slurm/train.sbatch sets it.
    patch = 'os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"'
    agents = [torchrun(tmp_path / name, *args, patch=patch) for name in ("one", "two")]
    codes = [agent.wait(280) for agent in agents]
    text = "".join(agent.output() for agent in agents)
    assert codes == [[0], [0]], text
    return text


def outcome(out):
    """Parameters at the end, and the lines of the log without their times."""
    model = torch.load(out / "checkpoints" / "step_00000008" / "model.pt", weights_only=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_s", None)
    # A histogram after a resume covers only the steps since it.
    return model, [line for line in lines if line["kind"] != "histogram"]


@pytest.fixture(scope="module")
def one_node(sample_data, tmp_path_factory):
    """Two ranks on one node."""
    out = tmp_path_factory.mktemp("one") / "run"
    expect_ok(command("train.py", *FLAGS, "--data_dir", sample_data, "--out_dir", out, ranks=2))
    return outcome(out)


def test_two_nodes_with_a_killed_worker_do_what_one_node_does(one_node, sample_data, tmp_path):
    """All workers start again and continue from the last checkpoint; the result is the same."""
    out = tmp_path / "run"
    flags = (*FLAGS, "--data_dir", sample_data, "--out_dir", out)
    text = two_nodes(tmp_path, "tests/dying_worker.py", *flags)
    assert re.search("resumed from .*step_00000004", text)
    model, lines = outcome(out)
    expected_model, expected_lines = one_node
    assert model.keys() == expected_model.keys()
    assert all(torch.equal(model[key], expected_model[key]) for key in model)
    assert lines == expected_lines


def test_the_doctor_measures_the_network_between_nodes(sample_data, tmp_path):
    doctor = ["train.py", "--doctor", "--model=tiny", "--device=cpu", "--data_dir", sample_data]
    doctor += ["--out_dir", tmp_path / "run"]
    speeds = r", .* ms for one number, \d+\.\d\d GB/s through each rank"
    no_report = "import torch.utils.collect_env as c; c.get_pretty_env_info = str; "
    one = expect_ok(command(*doctor, ranks=2, patch=no_report))
    assert re.search(f"network    gloo, 1 node{speeds}", one)
    assert one.count("network  ") == 1
    one_rank_each = 'os.environ["LOCAL_WORLD_SIZE"] = "1"'
    two = expect_ok(command(*doctor, ranks=2, patch=no_report + one_rank_each))
    assert re.search(f"network    gloo, 2 nodes{speeds}", two)


def test_the_job_of_several_nodes_says_what_it_would_run():
    def dry(**variables):
        done = subprocess.run(
            ["bash", "scripts/slurm/train.sbatch", "config/tiny_cpu.py", "--r", "0.5"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "DRY_RUN": "1", **variables},
        )
        return expect_ok(done).strip()

    text = dry(NODES="4")
    assert "sbatch" in text and "--nodes 4" in text
    assert text.endswith("train.sbatch config/tiny_cpu.py --r 0.5")
    text = dry(SLURM_JOB_ID="17", SLURM_NNODES="4", SLURMD_NODENAME="gpu3", GPUS="2")
    assert "--nnodes 4 --nproc_per_node 2" in text and "--rdzv_endpoint gpu3:" in text
    assert text.endswith("-- train.py config/tiny_cpu.py --r 0.5")


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, "none"),
        ({"NCCL_SOCKET_IFNAME": "lo"}, "lo"),
        ({"NCCL_SOCKET_IFNAME": "=lo"}, "lo"),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, "none"),  # gloo takes only names
        ({"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "eth7"}, "eth7"),
    ],
)
def test_gloo_uses_the_network_interface_of_nccl(tmp_path, variables, expected):
    (tmp_path / "srun").write_text('#!/bin/sh\necho "gloo ${GLOO_SOCKET_IFNAME:-none} $*"\n')
    (tmp_path / "srun").chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    active = {"VIRTUAL_ENV": str(tmp_path)}  # never the checkout's own .venv, which would be filled
    env = {"PATH": path, **active, "SLURM_JOB_ID": "17", **variables}
    env |= {"SLURM_NNODES": "2", "SLURMD_NODENAME": "gpu3"}
    process = ["bash", "scripts/slurm/train.sbatch", "config/tiny_cpu.py", "--out_dir", "a b"]
    done = subprocess.run(process, cwd=ROOT, capture_output=True, text=True, env=env)
    said = expect_ok(done)
    assert said.startswith(f"gloo {expected} torchrun --nnodes 2 ")
    assert said.endswith("-- train.py config/tiny_cpu.py --out_dir a b\n")
