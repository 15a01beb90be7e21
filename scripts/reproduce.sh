# Sourced by reproduce_*.sh, which name their runs, `add "SIZES" "STRATEGIES" [flags of train.py]`, and end with `finish`.
# Settings, all from the environment; what a script runs by default stands in its header:
#   SIZES="124m 210m"  SEEDS="42 43"  STRATEGIES="uniform linupper"     fewer or other runs
#   DATA=data/slimpajama    data folder       GPUS=4    processes of each run (default: all GPUs here, or 1)
#   TASKS=sciq,piqa         few-shot tasks (default: those of eval/fewshot.py; none: leave few-shot scores out)
#   DRY_RUN=1   print the commands, run nothing
#   SMOKE=1     minutes on 2 CPU cores, through the same code: a tiny model, the synthetic corpus, STEPS=120 steps
#   SLURM=1     submit an array, a task per run, and a job after it for the tables; sbatch's own SBATCH_PARTITION,
#               SBATCH_TIMELIMIT and so on are heeded
# A second start continues: what is finished is left alone, what was broken off goes on from its newest checkpoint.
# Runs that two scripts share are trained once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NAME=$(basename "$0" .sh)
NAME=${NAME#reproduce_}
for flag in DRY_RUN SMOKE SLURM; do
  case "${!flag:-}" in "" | 1) ;; *) echo "error: $flag=${!flag}: must be 1, or not set" >&2; exit 2 ;; esac
done
GPUS=${GPUS:-$({ nvidia-smi -L 2> /dev/null || true; } | wc -l)}
[[ $GPUS =~ ^[0-9]+$ ]] || { echo "error: GPUS=$GPUS: must be a number, such as 4" >&2; exit 2; }
[ "$GPUS" -gt 1 ] && LAUNCH=(torchrun --standalone --nproc_per_node "$GPUS" --) || LAUNCH=(python)
SMOKE_FLAGS=() FEWSHOT=() RUNS=runs RESULTS=results/$NAME MADE=() SIZE_OF=() SEED_OF=() FLAGS_OF=()
if [ -n "${SMOKE:-}" ]; then
  SIZES=tiny DATA=data/sample RUNS=runs/smoke RESULTS=results/smoke/$NAME TASKS=${TASKS:-where,last_words}
  STEPS=${STEPS:-120}
  [[ $STEPS =~ ^[0-9]+$ && $STEPS -ge 12 ]] || { echo "error: STEPS=$STEPS: must be a number of 12 or more" >&2; exit 2; }
  SMOKE_FLAGS=(--max_steps "$STEPS" --warmup_steps $((STEPS / 12)) --reweight_warmup_steps $((STEPS / 6))
    --eval_interval $((STEPS / 4)) --checkpoint_interval $((STEPS / 2)))
  FEWSHOT=(--include_path tests/tasks --num_fewshot 0)
fi
DATA=${DATA:-data/slimpajama}
KNOWN_STRATEGIES=$(sed -n '/^STRATEGIES/,/^}/s/^ *"\(.*\)":.*/\1/p' reweight.py)
[ -n "${TASKS:-}" ] && FEWSHOT+=(--tasks "$TASKS")

# Run a command, or print it.
do_() {
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@" && echo; else "$@"; fi
}

# Note the runs of all sizes, strategies and seeds; all are known and checked before the first one starts.
add() {
  local sizes=$1 strategies=$2 size strategy seed; shift 2
  for size in $sizes; do
    for strategy in $strategies; do
      for seed in $SEEDS; do add_one "$size" "$strategy" "$seed" "$@"; done
    done
  done
}

add_one() {
  local size=$1 strategy=$2 seed=$3; shift 3
  local preset=${SMOKE:+124m}  # a smoke run is the smallest preset, then config/tiny_cpu.py
  preset=${preset:-$size}
  if [ ! -e "config/gpt2_$preset.py" ]; then
    echo "error: SIZES: no config for $size; there are: $(cd config && echo gpt2_*.py)" >&2
    exit 2
  fi
  if ! grep -qxF "$strategy" <<< "$KNOWN_STRATEGIES"; then
    echo "error: STRATEGIES: $strategy is not one of" $KNOWN_STRATEGIES >&2
    exit 2
  fi
  [[ $seed =~ ^[0-9]+$ ]] || { echo "error: SEEDS=$SEEDS: must be numbers, such as \"42 43\"" >&2; exit 2; }
  local flags=("config/gpt2_$preset.py" ${SMOKE:+config/tiny_cpu.py} --reweight "$strategy")
  # The one published run whose temperature is not 0.4. A script's own --r comes later and wins.
  [ "$preset $strategy" != "124m quadratic" ] || flags+=(--r 1.0)
  flags+=(--seed "$seed" "$@" "${SMOKE_FLAGS[@]}")
  MADE+=("$RUNS/$size${LABEL:-}_${strategy}_seed$seed")
  SIZE_OF+=("$size") SEED_OF+=("$seed")
  FLAGS_OF+=("$(printf '%q ' "${flags[@]}")")
}

# Train, evaluate and score run number $1.
carry_out() {
  local out=${MADE[$1]}
  eval "set -- ${FLAGS_OF[$1]}"
  echo "== $out"
  do_ "${LAUNCH[@]}" train.py "$@" --data_dir "$DATA" --out_dir "$out"
  # a result that is older than the newest checkpoint is of an earlier one
  if [ ! "$out/eval/perplexity.json" -nt "$out/checkpoints" ]; then
    do_ "${LAUNCH[@]}" eval/perplexity.py --run "$out"
  fi
  if [ "${TASKS:-}" != none ] && [ ! "$out/eval/fewshot.json" -nt "$out/checkpoints" ]; then
    do_ "${LAUNCH[@]}" eval/fewshot.py --run "$out" "${FEWSHOT[@]}"
  fi
}

# All runs, then their tables, figures and page.
finish() {
  if [ -n "${SLURM:-}" ]; then
    submit
    return
  fi
  if [ -z "${DRY_RUN:-}" ]; then
    source scripts/environment.sh requirements-eval.txt
    [ -z "${SMOKE:-}" ] || python prepare_slimpajama.py --source sample --tokenizer bytes --out data/sample
  fi
  if [ -n "${ONLY:-}" ]; then  # a task of the array
    carry_out "$ONLY"
    exit
  fi
  local i size sizes chosen
  for i in "${!MADE[@]}"; do carry_out "$i"; done
  echo "== $RESULTS"
  do_ python eval/tables.py "${MADE[@]}" --out "$RESULTS"
  sizes=$(printf '%s\n' "${SIZE_OF[@]}" | sort -u)
  for size in $sizes; do  # figures of a size's runs with the first seed
    chosen=()
    for i in "${!MADE[@]}"; do
      [ "${SIZE_OF[i]} ${SEED_OF[i]}" != "$size ${SEED_OF[0]}" ] || chosen+=("${MADE[i]}")
    done
    do_ python eval/plots.py "${chosen[@]}" --to "$RESULTS$([ "$size" = "$sizes" ] || echo "/$size")"
  done
  do_ python eval/report.py "${MADE[@]}" --out "$RESULTS/report.html"
}

submit() {
  local again="env -u SLURM" array job
  array=(sbatch --parsable --job-name "$NAME" --nodes 1 --gpus-per-node "${GPUS/#0/1}" --requeue
    --array "0-$((${#MADE[@]} - 1))" --wrap "$again ONLY=\$SLURM_ARRAY_TASK_ID bash scripts/reproduce_$NAME.sh")
  if [ -n "${DRY_RUN:-}" ]; then
    job=JOB
    printf '%q ' "${array[@]}" && echo
  else
    job=$("${array[@]}")
  fi
  do_ sbatch --job-name "$NAME" --nodes 1 --gpus-per-node 1 --dependency "afterok:$job" \
    --wrap "$again bash scripts/reproduce_$NAME.sh"
}
