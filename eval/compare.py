"""Statistics of evaluations: confidence intervals, paired tests, and the speed-up over uniform.

M validation windows of a domain, in the order of its text, in B blocks; D domains.
"""

import math
from itertools import pairwise
from statistics import fmean

import numpy as np

NOT_REACHED = "not reached"


def blocks(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(M,) -> (B,) sums and (B,) counts of about sqrt(M) blocks of about sqrt(M) windows each.

    Neighboring windows are often of one document, and then alike: taken one by one, they give
    standard errors that are 1.1 to 3.7 times too small on real text. Long blocks are nearly
    independent.
    """
    n_blocks = max(math.isqrt(len(values)), min(2, len(values)))
    parts = np.array_split(values, n_blocks)
    sums = np.array([part.sum() for part in parts])
    counts = np.array([len(part) for part in parts])
    return sums, counts


def bootstrap(windows: dict[str, np.ndarray], resamples: int = 1000) -> np.ndarray:
    """(M,) losses per domain -> (D + 1, 2): 95 % intervals of the domains' means and their average.

    It resamples blocks of windows. The interval covers the choice of validation text, not what
    another training seed would give.
    """
    rng = np.random.default_rng(0)
    means = []
    for values in windows.values():
        sums, counts = blocks(values)
        drawn = rng.integers(len(sums), size=(resamples, len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    average = np.mean(means, axis=0)
    return np.quantile([*means, average], [0.025, 0.975], axis=1).T


def paired_difference(differences: dict[str, np.ndarray]) -> tuple[float, float, float, float]:
    """(M,) loss differences of two models on the same windows, per domain -> mean, interval, p.

    Returns the mean, the two ends of its 95 % interval, and the two-sided p. The mean is the plain
    average of the domains' means. Its variance is the sum of the variances of these means,
    estimated from blocks, over D^2: a stratified z test, slightly too confident below about 20
    windows per domain; nan with one window.

    The test covers which text is in the validation set. It does not cover what other training seeds
    would give, however many seeds the differences were averaged over; the standard deviation over
    seeds covers that.
    """
    mean = fmean(values.mean() for values in differences.values())
    variance = 0.0
    for values in differences.values():
        sums, counts = blocks(values)
        n = len(sums)
        deviations = sums - values.mean() * counts
        of_sum = (deviations**2).sum()
        correction = n / (n - 1) if n > 1 else math.nan
        variance += of_sum / len(values) ** 2 * correction
    error = math.sqrt(variance) / len(differences)
    if error:
        z = abs(mean) / error
        p = math.erfc(z / math.sqrt(2))
    else:
        p = float(mean == 0)
    low = mean - 1.96 * error
    high = mean + 1.96 * error
    return mean, low, high, p


def steps_to(loss: float, evals: list[dict]) -> float | None:
    """The step at which the mean loss first falls to `loss`, interpolated; None if never."""
    points = [(record["step"], record["mean_loss"]) for record in evals]
    for (step, before), (next_step, after) in pairwise([points[0], *points]):
        if after <= loss:
            share = 0.0
            if before > loss:
                share = (before - loss) / (before - after)
            return step + (next_step - step) * share
    return None


def minutes_to(step: float | None, trained: list[dict]) -> float | None:
    """Training time up to a step, without evaluating and saving; None where it was not logged."""
    if not trained or step is None:
        return None
    steps = [0, *(record["step"] for record in trained)]
    tokens = [0, *(record["tokens"] for record in trained)]
    speeds = [record["tokens_per_s"] for record in trained]
    seconds = np.diff(tokens) / speeds
    elapsed = [0.0, *np.cumsum(seconds)]
    return float(np.interp(step, steps, elapsed)) / 60


def speedup(curve: dict, uniform: dict) -> dict[str, float | str | None]:
    """How soon a run reaches its uniform run's final loss: a value per row of the table.

    Each curve is {"max_steps", "evals", "trained"}: the records of metrics.jsonl (eval/speedup.py).
    Both are read in the same way, so that a uniform run which was lower before its end counts from
    that earlier step. The learning rate at the step in question is that of a longer run; a run
    planned to end at that step would be lower still.

    Empty where the uniform run is not finished, or the two were evaluated on different windows.
    """
    newest, final = curve["evals"][-1], uniform["evals"][-1]
    if final["step"] < uniform["max_steps"] or newest["val_hash"] != final["val_hash"]:
        return {}
    loss = final["mean_loss"]
    uniform_steps = steps_to(loss, uniform["evals"])
    uniform_minutes = minutes_to(uniform_steps, uniform["trained"])
    row = {
        "uniform's final loss": loss,
        "uniform's steps": uniform_steps,
        "uniform's minutes": uniform_minutes,
    }
    steps = steps_to(loss, curve["evals"])
    if steps is not None:
        minutes = minutes_to(steps, curve["trained"])
        row["steps"] = steps
        row["minutes"] = minutes
        row["speed-up in steps"] = uniform_steps / steps if steps else None
        row["speed-up in time"] = uniform_minutes / minutes if uniform_minutes and minutes else None
    elif newest["step"] >= curve["max_steps"]:  # an unfinished run may still get there
        for label in ("steps", "minutes", "speed-up in steps", "speed-up in time"):
            row[label] = NOT_REACHED
    return row
