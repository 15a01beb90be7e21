"""Statistics of evaluations: confidence intervals, paired tests, and the speed-up over uniform."""

import math
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

NOT_REACHED = "not reached"
TOO_FEW = "too few to tell"  # documents, for an interval


class Estimate(NamedTuple):
    """A mean with its 95 % interval and the two-sided p of the hypothesis that it is zero.

    The ends and p are nan where there are too few documents to tell.
    """

    mean: float
    low: float
    high: float
    p: float


def estimate(domains: list[np.ndarray]) -> Estimate:
    """(K, 2) nats and targets of the documents of each domain -> average of the domains' means.

    Nats may be a model's, or the difference of two models on the same documents. A domain's mean is
    per target. The interval is Student's t with Satterthwaite's degrees of freedom over domains.

    It holds where documents are independent draws and none outweighs the others in what it adds;
    rare documents with extreme losses make it too narrow (EXPERIMENTS.md has its coverage on real
    text). It covers the choice of validation text. It does not cover what other training seeds
    would give, however many seeds the nats were averaged over: the standard deviation over seeds
    covers that.
    """
    means, variances, dfs = zip(*map(mean_of_documents, domains), strict=True)
    mean = fmean(means)
    variance, df = sum(variances), math.nan
    if variance > 0:
        df = variance**2 / sum(v**2 / df for v, df in zip(variances, dfs, strict=True))
    elif variance == 0:
        df = min(dfs)
    if not df >= 1:  # also where it is nan
        return Estimate(mean, math.nan, math.nan, math.nan)
    error = math.sqrt(variance) / len(domains)
    if error == 0:
        return Estimate(mean, mean, mean, float(mean == 0))
    half = stdtrit(df, 0.975) * error
    p = 2 * stdtr(df, -abs(mean) / error)
    return Estimate(mean, mean - half, mean + half, float(p))


def mean_of_documents(documents: np.ndarray) -> tuple[float, float, float]:
    """(K, 2) nats and targets -> mean per target, its variance, and the variance's freedom.

    The tokens of one document are alike, and a long one fills many windows: so whole documents are
    left out, one at a time (jackknife). With documents of different lengths, the variance rests
    on the long ones: its degrees of freedom are those of as many equal ones, less 1. A variance of
    nan or 0 degrees says that one document has all of the text, or nearly all.
    """
    nats, targets = documents.T.astype(np.float64)
    total = targets.sum()
    mean = nats.sum() / total
    if len(targets) < 2:
        return mean, math.nan, math.nan
    shifts = (nats - mean * targets) / (total - targets)  # mean minus the mean without a document
    variance = (len(targets) - 1) / len(targets) * (shifts**2).sum()
    df = (targets**2).sum() ** 2 / (targets**4).sum() - 1
    return mean, variance, max(df, 1e-3)


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
