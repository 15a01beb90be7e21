#!/usr/bin/env bash
# The figures: the toy regression; loss curves, weights and perplexities of four strategies at 124m.
#   bash scripts/reproduce_figures.sh
# Data as for reproduce_slimpajama.sh, with which it shares its runs.
# Runs: 4 strategies x 3 seeds at 124m (12), and the regression on a CPU. Hardware: 1 GPU of 24 GB.
# Tokens: 328M a run, 3.9 billion in all. Time: 9 A100 hours (estimate, as in config/) and a minute.
# Disk: 6 GB, and 24 bytes per parameter of each run that trains. KEEP_OPTIMIZER=1: 36 GB.
source "$(dirname "$0")/reproduce.sh"
add "${SIZES:-124m}" "${STRATEGIES:-uniform linupper quadratic extremes}"
finish python scripts/reproduce_linear_regression.py --to "$RESULTS/linear_regression" ${SMOKE:+--seeds 2}
