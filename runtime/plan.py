"""What a run is going to do, settled and checked before anything is started."""

from typing import NamedTuple

import data
from corpus.manifest import data_hash
from data import RunData
from families import Shape
from recipe import TrainConfig, identity
from runtime import checkpoint, distributed, init_from, reference
from runtime.distributed import print0
from runtime.memory import describe, settle_loss_chunk


class Plan(NamedTuple):
    config: TrainConfig
    data: RunData
    shape: Shape
    identity: dict  # what must stay the same for the run to be resumed (recipe.identity)
    found: checkpoint.Found  # where it continues


def open_data(config: TrainConfig) -> RunData:
    """The data of a run, as its config asks for it."""
    return data.open_data(
        config.data_dir,
        config.block_size,
        config.mixture,
        config.global_batch_size,
        config.seed,
        config.eval_windows,
        config.data_order,
    )


def make_plan(config: TrainConfig, run_data: RunData) -> Plan:
    """Print and return the plan of a settled config; UserError where something does not fit."""
    world_size = distributed.ranks().world_size
    hash_of_data = data_hash(run_data.manifest)
    about = reference.look_at(config, run_data, hash_of_data)
    run_identity = identity(
        config, run_data.manifest, world_size, about.model_sha256 if about else None
    )
    found = checkpoint.find_resumable(
        config.out_dir,
        run_identity,
        config.resume,
        config.max_steps,
        accept=["data"] if config.allow_data_change else [],
    )
    shape = init_from.starting_shape(config, run_data.manifest, found.folder)
    config = settle_loss_chunk(config, shape, world_size)
    print0(describe(config, shape, run_data, world_size))
    if about:
        print0(f"reference  {about.describe(config.reweight_ref, hash_of_data)}")
    return Plan(config, run_data, shape, run_identity, found)
