"""How sure a mean over validation windows is; a run against its uniform run: paired test, and how soon it is as far.

M validation windows of a domain, in the order of its text, in B blocks; D domains.
"""

import math
from itertools import pairwise
from statistics import fmean

import numpy as np

NOT_REACHED = "not reached"


def blocks(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(M,) -> (B,) sums and (B,) counts of about sqrt(M) blocks of about sqrt(M) neighbours.

    Neighbouring windows are often of one document and alike: taken one by one, standard errors on real text come out
    1.1 to 3.7 times too small. Long blocks hardly hang together.
    """
    parts = np.array_split(values, max(math.isqrt(len(values)), min(2, len(values))))
    return np.array([part.sum() for part in parts]), np.array([len(part) for part in parts])


def bootstrap(windows: dict[str, np.ndarray], resamples: int = 1000) -> np.ndarray:
    """(M,) losses per domain -> (D + 1, 2) ends of the 95 % interval of each domain's mean, then of their average.

    Resamples blocks of windows. It says how much hangs on which text the validation set has, not what another training
    seed would give.
    """
    rng, means = np.random.default_rng(0), []
    for values in windows.values():
        sums, counts = blocks(values)
        drawn = rng.integers(len(sums), size=(resamples, len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.quantile([*means, np.mean(means, axis=0)], [0.025, 0.975], axis=1).T


def paired_difference(differences: dict[str, np.ndarray]) -> tuple[float, float, float, float]:
    """(M,) differences of two models' losses on the same windows, per domain -> mean, 95 % interval, two-sided p.

    The mean is the plain average of the domains' means; its variance is the sum of the variances of these means, taken
    from blocks, over D^2 (a stratified z test, somewhat too sure below about 20 windows a domain; nan with one).
    It covers which text happens to be in the validation set. It does not cover what other training seeds would give,
    however many seeds the differences were averaged over: that is what the standard deviation over seeds is for.
    """
    mean, variance = fmean(d.mean() for d in differences.values()), 0.0
    for values in differences.values():
        sums, counts = blocks(values)
        off = sums - values.mean() * counts
        variance += (off**2).sum() / len(values)**2 * (len(off) / (len(off) - 1) if len(off) > 1 else math.nan)
    error = math.sqrt(variance) / len(differences)
    p = math.erfc(abs(mean) / error / math.sqrt(2)) if error else float(mean == 0)
    return mean, mean - 1.96 * error, mean + 1.96 * error, p


def steps_to(loss: float, evals: list[dict]) -> float | None:
    """The step at which the mean loss of the evaluations first comes down to `loss`, interpolated; None if never."""
    points = [(r["step"], r["mean_loss"]) for r in evals]
    for (step, before), (later, after) in pairwise([points[0], *points]):
        if after <= loss:
            return step + (later - step) * ((before - loss) / (before - after) if before > loss else 0.0)
    return None


def minutes_to(step: float | None, records: list[dict]) -> float | None:
    """Training time up to a step, evaluation and saving left out; None where it was not logged."""
    lines = [r for r in records if r["kind"] == "train"]
    if not lines or step is None:
        return None
    seconds = np.diff([0, *(r["tokens"] for r in lines)]) / [r["tokens_per_s"] for r in lines]
    return float(np.interp(step, [0, *(r["step"] for r in lines)], [0.0, *np.cumsum(seconds)])) / 60


def speedup(records: list[dict], max_steps: int, uniforms: list[dict], its_max_steps: int) -> dict[str, float | str]:
    """How soon a run comes down to its uniform run's final loss, from their metrics.jsonl: a value per row of a table.

    Both curves are read in the same way, so a uniform run that was lower before its end counts from there. The learning
    rate at the step that is found is that of a longer run: one that was planned to end there would be lower still.
    Empty where the uniform run has not finished or the two were evaluated on different windows.
    """
    evals, its_evals = ([r for r in lines if r["kind"] == "eval"] for lines in (records, uniforms))
    if not evals or not its_evals or its_evals[-1]["step"] < its_max_steps or (
            evals[-1]["val_hash"] != its_evals[-1]["val_hash"]):
        return {}
    loss = its_evals[-1]["mean_loss"]
    steps, its_steps = steps_to(loss, evals), steps_to(loss, its_evals)
    minutes, its_minutes = minutes_to(steps, records), minutes_to(its_steps, uniforms)
    row = {"uniform's final loss": loss, "uniform's steps": its_steps, "uniform's minutes": its_minutes}
    if steps is None and evals[-1]["step"] >= max_steps:  # an unfinished run may still get there
        row |= dict.fromkeys(("steps", "minutes", "speed-up in steps", "speed-up in time"), NOT_REACHED)
    if steps is not None:
        row |= {"steps": steps, "minutes": minutes, "speed-up in steps": its_steps / steps if steps else None}
        row["speed-up in time"] = its_minutes / minutes if its_minutes and minutes else None
    return row
