#!/usr/bin/env bash
# The figures: the toy regression; loss curves, weights and perplexities of four strategies at 124m.
#   bash scripts/reproduce_figures.sh
# Data as for reproduce_slimpajama.sh, with which it shares its runs.
# Runs: 4 strategies x 1 seed at 124m (4), and the regression on a CPU. Hardware: 1 GPU of 24 GB.
# Tokens: 328M a run, 1.3 billion in all. Time: 3 A100 hours (estimate, as in config/) and a minute.
source "$(dirname "$0")/reproduce.sh"
SEEDS=${SEEDS:-42}
add "${SIZES:-124m}" "${STRATEGIES:-uniform linupper quadratic extremes}"
finish
if [ -z "${SLURM:-}" ]; then
  do_ python scripts/reproduce_linear_regression.py --to "$RESULTS/linear_regression" \
    ${SMOKE:+--seeds 2}
fi
