#!/usr/bin/env bash
# The paper's Llamas on FineWeb: four strategies at 1.4B and 7B, perplexity on the held-out part and
# few-shot scores at 5 examples. First, once, the data:
#   python prepare_slimpajama.py --source hub --dataset HuggingFaceFW/fineweb --tokenizer FOLDER \
#     --out data/fineweb
#   bash scripts/reproduce_llama.sh      # SIZES=llama_1.4b for the smaller one alone
# The paper leaves open: the tokenizer (FOLDER holds a tokenizer.json), the temperature (the public
# branch's r is 100, with which no weight exceeds another by more than 1 %; here it is 0.4), how many
# tokens were seen, the evaluation and the seeds. That branch has upper, mid and extremes, and no
# uniform run. So these runs show what the method does, and are not the paper's numbers.
# Runs: 2 sizes x 4 strategies x 1 seed (8).
# Hardware: 8 GPUs of 80 GB as one node (predicted peak 24 GB for 1.4B, 67 GB for 7B; not measured).
#   There a step has 8 micro-steps, and a first pass for the losses: a third more compute than below.
#   The paper's 64 GPUs take a batch at once; several nodes: scripts/slurm/train.sbatch.
# Tokens: 26 billion a run at 1.4B, 131 billion at 7B; 629 billion in all.
# Time: 17,700 H100 hours of training (estimate, as in config/), the few-shot scores come on top.
# Disk: 262 GB of shards; 130 GB of models, and 24 bytes per parameter of each run that trains.
if [ -z "${SMOKE:-}" ]; then
  SEEDS=${SEEDS:-42} DATA=${DATA:-data/fineweb} DATASET="HuggingFaceFW/fineweb --tokenizer FOLDER"
  # The tasks of SETS: the paper's and a wider set.
  TASKS=${TASKS:-$(sed -n '/^SETS = {/,/^}/s/^ *"\([a-z0-9_]*\)",$/\1/p' "$(dirname "$0")/../eval/fewshot.py")}
fi
source "$(dirname "$0")/reproduce.sh"
[ -z "${PUBLISHED:-}" ] || fail "PUBLISHED=1: config/published.py is GPT-2's recipe; unset PUBLISHED"
if [ -n "${SMOKE:-}" ]; then
  SIZES=llama_tiny SMOKE_PRESET=llama_1.4b_linupper
  SMOKE_FLAGS+=(--model llama_tiny --parallel ddp --global_batch_size 32 --micro_batch_size 0)
fi
add "${SIZES:-llama_1.4b llama_7b}" "${STRATEGIES:-uniform linupper quadratic extremes}"
finish
