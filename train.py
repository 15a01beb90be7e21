"""Pretrain GPT-2 or Llama with loss-based sample reweighting (Sow et al., ICLR 2025).

    python train.py config/tiny_cpu.py --reweight linupper                   # on a laptop
    torchrun --nproc_per_node 8 -- train.py config/gpt2_124m_linupper.py     # on a node with 8 GPUs
    python train.py config/gpt2_124m_linupper.py --dry_run                   # print the plan
    python train.py --doctor                                                 # for a bug report

Arguments are config files (their assignments) and flags. Later files win over earlier ones, and
flags win over files. Giving the same command again continues the run.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for PYTHONSAFEPATH

import torch

from cli import parse, run
from data import batches
from eval.perplexity import evaluate
from families import build_empty
from recipe import TrainConfig, settle
from runtime import checkpoint, distributed, doctor, init_from, reference
from runtime.distributed import print0
from runtime.plan import make_plan, open_data
from runtime.run import FolderLock, Run
from runtime.telemetry import Telemetry
from runtime.watch import COMPUTING, EVALUATING, READING
from step import Trainer


def main() -> None:
    """Check everything, then set up, then train."""
    config = parse(TrainConfig, __doc__, sys.argv[1:])
    if config.doctor:
        return doctor.examine(config)
    config = settle(config, distributed.ranks().world_size)
    data = open_data(config)
    if config.dry_run:
        if distributed.ranks().rank == 0:
            make_plan(config, data)
        return
    device = distributed.setup(config.device, config.timeout_s)
    with FolderLock(config.out_dir) as lock:
        plan = make_plan(config, data)
        if checkpoint.already_finished(plan.found, plan.config):
            distributed.cleanup()
            return
        torch.set_float32_matmul_precision("high" if config.dtype == "tf32" else "highest")
        torch.manual_seed(config.seed)
        with Run(plan, device, lock) as training:
            train(training)
    print0(training.outcome())


def train(run: Run) -> None:
    """All steps of a run; one more round evaluates and saves after the last step."""
    config, data, found, shape = run.config, run.data, run.found, run.shape
    seen = reference.what_weights_see(config, data, run.device)
    trainer = Trainer(build_empty(shape), config, len(data.train.domains), run.device, *seen)
    if found.folder:
        trainer.load_state(checkpoint.read_parts(found.folder, shape), found.state)
        data.sampler.load_state(found.state.get("sampler"))
        print0(f"resumed from {found.folder}")
    else:
        trainer.set_weights(init_from.starting_weights(config, shape))
    telemetry = Telemetry(
        data.train, config.out_dir, found.step, config.record_samples, config.on_nonfinite
    )
    run.open_files(telemetry)
    rank, _, world_size = distributed.ranks()
    pin = run.device.type == "cuda"
    stream = batches(data, found.step, config.max_steps, rank, world_size, pin)

    for step in range(found.step, config.max_steps + 1):
        first, last = step == found.step, step == config.max_steps
        checkpoint_due = last or step % config.checkpoint_interval == 0
        run.watchdog.at(step, EVALUATING)

        # Log, then agree on whether any rank must stop; all ranks ask in every round.
        if checkpoint_due or step % config.log_interval == 0:
            run.log_steps(telemetry, wait=checkpoint_due)
        halt = run.stop()
        if halt or telemetry.too_many_skipped:
            run.log_steps(telemetry)
        if telemetry.too_many_skipped:
            # A skipped step changes nothing, so this is the state before the first of them.
            run.save(telemetry.skipped[0] - 1, trainer.state_dict)
            run.fail(telemetry.why_stopped())
            break

        # Evaluate and save. A resumed run makes up for the evaluation that a signal prevented.
        with run.clock_stopped():
            eval_due = last or step % config.eval_interval == 0
            if first and found.evaluated:
                eval_due = False
            if eval_due and not halt:
                record = evaluate(
                    trainer.raw,
                    data.val,
                    data.val_windows,
                    config.micro_batch_size,
                    config.dtype,
                    run.stop,
                )
                halt = run.stop.agreed
                if record:  # empty where a signal came
                    run.log_eval(step, record, telemetry.histograms())
                    eval_due = False
            makes_up = first and found.folder and not found.evaluated and not eval_due
            save_due = last or halt or (checkpoint_due and not telemetry.skipped)
            if save_due and (makes_up or not first):
                run.save(step, trainer.state_dict, evaluated=not eval_due)
        if last or halt:
            run.end(step, finished=last and not eval_due)
            break

        # One step on the global batch.
        run.watchdog.at(step, READING)
        batch = next(stream)
        run.watchdog.at(step, COMPUTING)
        telemetry.add(step + 1, batch.pairs, trainer.step(step, batch))
        if telemetry.sent:
            run.log_steps(telemetry)  # now that the GPU has this step to work on


if __name__ == "__main__":
    run(distributed.reported(main))
