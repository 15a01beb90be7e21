#!/usr/bin/env bash
# Domain weights and sample weights together: the mixtures of DoGE and DoReMi, each with uniform and
# linupper.
#   bash scripts/reproduce_mixtures.sh   # data as for reproduce_slimpajama.sh
# Runs: 2 mixtures x 3 sizes x 2 strategies x 3 seeds (36).
# Hardware: 1 GPU of 24 GB for 124m, 4 GPUs of 40 GB for 684m.
# Tokens: 328M a run at 124m, 492M at 210m and 684m; 15.7 billion in all.
# Time: 102 A100 hours (estimate, as in config/).
# Disk: 49 GB, and 24 bytes per parameter of each run that trains. KEEP_OPTIMIZER=1: 293 GB.
source "$(dirname "$0")/reproduce.sh"
known=$(sed -n '/^MIXTURES/,/^}/s/^    "\([^"]*\)":.*/\1/p' data.py)
for mixture in ${MIXTURES:-doge doremi}; do
  [[ $mixture == *=* ]] || grep -qxF "$mixture" <<< "$known" ||
    fail "MIXTURES: $mixture is not one of $(echo $known), nor numbers of domains, such as cc=0.5,c4=0.5"
  LABEL=_$mixture
  add "${SIZES:-124m 210m 684m}" "${STRATEGIES:-uniform linupper}" --mixture "$mixture"
done
finish
