#!/usr/bin/env bash
# Trained on C4 and Common Crawl alone (half each), evaluated on all seven domains.
#   bash scripts/reproduce_c4cc.sh       # data as for reproduce_slimpajama.sh
# Runs: 3 sizes x uniform and linupper x 3 seeds (18).
# Hardware: 1 GPU of 24 GB for 124m, 4 GPUs of 40 GB for 684m.
# Tokens: 328M a run at 124m, 492M at 210m and 684m; 7.9 billion in all.
# Time: 51 A100 hours (estimate, as in config/).
# Disk: 25 GB, and 24 bytes per parameter of each run that trains. KEEP_OPTIMIZER=1: 147 GB.
source "$(dirname "$0")/reproduce.sh"
LABEL=_c4cc
add "${SIZES:-124m 210m 684m}" "${STRATEGIES:-uniform linupper}" --mixture c4cc
finish
