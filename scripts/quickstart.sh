#!/usr/bin/env bash
# From a fresh clone to a table and pictures, in under 10 minutes on 2 CPU cores, installation included:
# a tiny GPT-2 (0.8M parameters) on the synthetic sample corpus, bytes as tokens, once with uniform weights and once
# with linupper. STEPS=60 shortens the two runs. A second start continues where the first one stopped.
#   bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."
STEPS=${STEPS:-500}
if [ $# -gt 0 ] || ! [[ $STEPS =~ ^[1-9][0-9]{0,8}$ ]]; then
  echo "error: ${1:-STEPS=$STEPS}: no arguments, and STEPS is a number from 1 on: STEPS=60 bash scripts/quickstart.sh" >&2
  exit 2
fi
source scripts/environment.sh requirements.txt
source scripts/runs.sh
heed_signals
OUT=runs/quickstart_$STEPS

echo "== data: the synthetic sample corpus, bytes as tokens"
attend python prepare_slimpajama.py --source sample --tokenizer bytes --out data/sample
for strategy in uniform linupper; do
  echo "== train: tiny model, $strategy, $STEPS steps"
  attend python train.py config/tiny_cpu.py --reweight "$strategy" --max_steps "$STEPS" --out_dir "$OUT/$strategy"
  is_finished "$OUT/$strategy" || { say_unfinished "$OUT/$strategy"; exit 143; }
  attend python eval/perplexity.py --run "$OUT/$strategy"
done
echo "== perplexity per domain"
attend python eval/tables.py "$OUT/uniform" "$OUT/linupper" --what ppl,difference
echo "== pictures"
attend python eval/plots.py "$OUT/uniform" "$OUT/linupper" --to "$OUT/plots"
