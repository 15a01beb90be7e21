#!/usr/bin/env bash
# The paper's Llamas on FineWeb: four strategies at 1.4B and 7B, perplexity on the held-out part and
# few-shot scores at 5 examples. First, once, the data:
#   python prepare_slimpajama.py --source hub --dataset HuggingFaceFW/fineweb --tokenizer FOLDER \
#     --out data/fineweb
#   bash scripts/reproduce_llama.sh      # SIZES=llama_1.4b for the smaller one alone
# The paper leaves open: the tokenizer (FOLDER holds a tokenizer.json), r, how many tokens were
# seen, the evaluation and the seeds. The headers of config/llama_*.py say what stands there instead.
# Runs: 2 sizes x 4 strategies x 1 seed (8).
# Hardware: 8 GPUs of 80 GB for 1.4B and 64 for 7B. A run has the GPUs of one node; for several, start
#   the commands that DRY_RUN=1 prints as scripts/slurm/train.sbatch does.
# Tokens: 26 billion a run at 1.4B, 131 billion at 7B; 629 billion in all.
# Time: 17,700 H100 hours of training (estimate, as in config/), the few-shot scores come on top.
# Disk: 129 GB, and 24 bytes per parameter of each run that trains: 161 GB at 7B.
if [ -z "${SMOKE:-}" ]; then
  SEEDS=${SEEDS:-42} DATA=${DATA:-data/fineweb} DATASET="HuggingFaceFW/fineweb --tokenizer FOLDER"
  # The tasks of SETS: the paper's and a wider set.
  TASKS=${TASKS:-$(sed -n '/^SETS = {/,/^}/s/^ *"\([a-z0-9_]*\)",$/\1/p' "$(dirname "$0")/../eval/fewshot.py")}
fi
source "$(dirname "$0")/reproduce.sh"
if [ -n "${SMOKE:-}" ]; then
  SIZES=llama_tiny SMOKE_PRESET=llama_1.4b_linupper
  SMOKE_FLAGS+=(--model llama_tiny --parallel ddp --global_batch_size 32 --micro_batch_size 0)
fi
add "${SIZES:-llama_1.4b llama_7b}" "${STRATEGIES:-uniform linupper quadratic extremes}"
finish
