#!/usr/bin/env bash
# How much the temperature r matters: each strategy with several r against uniform. A large r is
# close to uniform.
#   bash scripts/reproduce_r_sweep.sh    # data as for reproduce_slimpajama.sh
# Runs: uniform, and linupper with 6 values of r, x 3 seeds (21), at 124m. Those of uniform and of
# r = 0.4 are the main table's. Hardware: 1 GPU of 24 GB.
# Tokens: 328M a run, 6.9 billion in all. Time: 15 A100 hours (estimate, as in config/).
# Disk: 10 GB, and 24 bytes per parameter of each run that trains. KEEP_OPTIMIZER=1: 63 GB.
source "$(dirname "$0")/reproduce.sh"
add "${SIZES:-124m}" uniform
all_r="0.1 0.2 0.4 0.8 1.6 3.2"
[ -z "${SMOKE:-}" ] || all_r="0.4 4.0"
for r in ${R:-$all_r}; do
  [[ $r =~ ^[0-9]*\.?[0-9]+$ && $r =~ [1-9] ]] || fail "R=$R: must be numbers above 0, such as \"0.2 0.4\""
  LABEL=_r$r
  add "${SIZES:-124m}" "${STRATEGIES:-linupper}" --r "$r"
done
finish
