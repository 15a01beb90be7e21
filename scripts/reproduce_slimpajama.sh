#!/usr/bin/env bash
# The main table: perplexity per domain and few-shot scores of four strategies and three sizes, on
# all seven domains. First, once, the data (with --revision COMMIT always the same):
#   python prepare_slimpajama.py --source hub --dataset DKYoon/SlimPajama-6B --out data/slimpajama
#   bash scripts/reproduce_slimpajama.sh
# Runs: 3 sizes x 4 strategies x 3 seeds (36).
# Hardware: 1 GPU of 24 GB for 124m, 4 GPUs of 40 GB for 684m.
# Tokens: 328M a run at 124m, 492M at 210m and 684m; 15.7 billion in all.
# Time: 102 A100 hours of training (estimate, as in config/), the few-shot scores come on top.
# Disk: 49 GB, and 24 bytes per parameter of each run that trains. KEEP_OPTIMIZER=1: 293 GB.
[ -z "${SMOKE:-}" ] || SEEDS=${SEEDS:-42 43}
source "$(dirname "$0")/reproduce.sh"
add "${SIZES:-124m 210m 684m}" "${STRATEGIES:-uniform linupper quadratic extremes}"
finish
