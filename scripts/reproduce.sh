# Sourced by the reproduce_*.sh scripts. Each names its runs, `add "SIZES" "STRATEGIES" [flags of
# train.py]`, and ends with `finish`.
# Settings come from the environment; a script's header says what it runs by default:
#   SIZES="124m 210m"  SEEDS="42 43"  STRATEGIES="uniform linupper"     fewer or other runs
#   DATA=data/slimpajama    data folder
#   GPUS=4                  processes of each run (default: one per GPU of this machine, at least 1)
#   TASKS=sciq,piqa         few-shot tasks (default: those of eval/fewshot.py; none: no scores)
#   DRY_RUN=1   print the commands, run nothing
#   SMOKE=1     the same code in minutes on 2 CPU cores: a tiny model, synthetic text, STEPS=120
#   SLURM=1     submit an array with a task per run, and after it a job for the tables; sbatch heeds
#               SBATCH_PARTITION, SBATCH_TIMELIMIT and its other variables
# A second start continues: finished runs are left alone, interrupted ones resume from their newest
# checkpoint. Runs that two scripts share are trained once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NAME=$(basename "$0" .sh)
NAME=${NAME#reproduce_}
for flag in DRY_RUN SMOKE SLURM; do
  if [ -n "${!flag:-}" ] && [ "${!flag}" != 1 ]; then
    echo "error: $flag=${!flag}: must be 1, or not set" >&2
    exit 2
  fi
done
GPUS=${GPUS:-$({ nvidia-smi -L 2> /dev/null || true; } | wc -l)}
if ! [[ $GPUS =~ ^[0-9]+$ ]]; then
  echo "error: GPUS=$GPUS: must be a number, such as 4" >&2
  exit 2
fi
LAUNCH=(python)
[ "$GPUS" -le 1 ] || LAUNCH=(torchrun --standalone --nproc_per_node "$GPUS" --)
RUNS=runs RESULTS=results/$NAME SMOKE_FLAGS=() FEWSHOT=()
MADE=() SIZE_OF=() SEED_OF=() FLAGS_OF=()  # of each run: its folder, size, seed and flags
if [ -n "${SMOKE:-}" ]; then
  SIZES=tiny DATA=data/sample RUNS=runs/smoke RESULTS=results/smoke/$NAME
  TASKS=${TASKS:-where,last_words}
  STEPS=${STEPS:-120}
  if ! [[ $STEPS =~ ^[0-9]+$ && $STEPS -ge 12 ]]; then
    echo "error: STEPS=$STEPS: must be a number of 12 or more" >&2
    exit 2
  fi
  SMOKE_FLAGS=(--max_steps "$STEPS" --warmup_steps $((STEPS / 12)))
  SMOKE_FLAGS+=(--reweight_warmup_steps $((STEPS / 6)) --eval_interval $((STEPS / 4)))
  SMOKE_FLAGS+=(--checkpoint_interval $((STEPS / 2)))
  FEWSHOT=(--include_path tests/tasks --num_fewshot 0)
fi
DATA=${DATA:-data/slimpajama}
KNOWN_STRATEGIES=$(sed -n '/^STRATEGIES/,/^}/s/^ *"\(.*\)":.*/\1/p' reweight.py)
[ -n "${TASKS:-}" ] && FEWSHOT+=(--tasks "$TASKS")

# Run a command, or print it.
do_() {
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@" && echo; else "$@"; fi
}

# Note the runs of all sizes, strategies and seeds. All are checked before the first one starts.
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
  if ! [[ $seed =~ ^[0-9]+$ ]]; then
    echo "error: SEEDS=$SEEDS: must be numbers, such as \"42 43\"" >&2
    exit 2
  fi
  local flags=("config/gpt2_$preset.py" ${PUBLISHED:+config/published.py} ${SMOKE:+config/tiny_cpu.py})
  flags+=(--reweight "$strategy")
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
  # A result that is older than the newest checkpoint is of an earlier one.
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
    if [ -n "${SMOKE:-}" ]; then
      python prepare_slimpajama.py --source sample --tokenizer bytes --out data/sample
    fi
  fi
  if [ -n "${ONLY:-}" ]; then  # a task of the array
    carry_out "$ONLY"
    exit
  fi
  local i size sizes chosen folder
  for i in "${!MADE[@]}"; do carry_out "$i"; done
  echo "== $RESULTS"
  do_ python eval/tables.py "${MADE[@]}" --out "$RESULTS"
  sizes=$(printf '%s\n' "${SIZE_OF[@]}" | sort -u)
  for size in $sizes; do  # figures of a size's runs with the first seed
    chosen=()
    for i in "${!MADE[@]}"; do
      [ "${SIZE_OF[i]} ${SEED_OF[i]}" != "$size ${SEED_OF[0]}" ] || chosen+=("${MADE[i]}")
    done
    folder=$RESULTS
    [ "$size" = "$sizes" ] || folder+=/$size  # several sizes: a folder each
    do_ python eval/plots.py "${chosen[@]}" --to "$folder"
  done
  do_ python eval/report.py "${MADE[@]}" --out "$RESULTS/report.html"
}

submit() {
  local again="env -u SLURM" script="bash scripts/reproduce_$NAME.sh" array job
  array=(sbatch --parsable --job-name "$NAME" --nodes 1 --gpus-per-node "${GPUS/#0/1}" --requeue
    --array "0-$((${#MADE[@]} - 1))" --wrap "$again ONLY=\$SLURM_ARRAY_TASK_ID $script")
  if [ -n "${DRY_RUN:-}" ]; then
    job=JOB
    printf '%q ' "${array[@]}" && echo
  else
    job=$("${array[@]}")
  fi
  do_ sbatch --job-name "$NAME" --nodes 1 --gpus-per-node 1 --dependency "afterok:$job" \
    --wrap "$again $script"
}
