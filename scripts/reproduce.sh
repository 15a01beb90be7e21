# Sourced by the reproduce_*.sh scripts. Each names its runs, `add "SIZES" "STRATEGIES" [flags of
# train.py]`, and ends with `finish`.
# Settings come from the environment; a script's header says what it runs by default:
#   SIZES="124m 210m"  SEEDS="42 43"  STRATEGIES="uniform linupper"     fewer or other runs
#   DATA=data/slimpajama    data folder
#   REVISION=COMMIT         of the hub's data set: the runs start only if DATA was prepared from it.
#                           No commit is known here, so it is not set by default.
#   GPUS=4                  processes of each run (default: one per GPU of this machine, at least 1)
#   PARALLEL=runs           one run per GPU at a time instead, for small models; each writes what it
#                           prints to RUN/output.log
#   TASKS=sciq,piqa         few-shot tasks (default: those of eval/fewshot.py; none: no scores). The
#                           names are checked before the training. Where there is internet,
#                           scripts/fetch_tasks.py fills the cache that they need.
#   KEEP_OPTIMIZER=1        keep the whole checkpoints of a run that is trained and evaluated, 24 bytes
#                           per parameter; by default only its model stays, 4 bytes per parameter
#   PUBLISHED=1             every run with config/published.py (docs/reproduction.md)
#   DRY_RUN=1   print the commands, run nothing
#   SMOKE=1     the same code in minutes on 2 CPU cores: a tiny model, synthetic text, STEPS=120
#   SLURM=1     submit an array with a task per run, and after it a job for the tables; sbatch heeds
#               SBATCH_PARTITION, SBATCH_TIMELIMIT and its other variables
# What fails does not stop the rest. The tables hold what there is, a list at the end says what is
# missing, and the exit code is then 1.
# A second start continues: finished runs are left alone, interrupted ones resume from their newest
# checkpoint. Runs that two scripts share are trained once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/runs.sh
NAME=$(basename "$0" .sh)
NAME=${NAME#reproduce_}
fail() { echo "error: $1" >&2; exit 2; }
[ $# = 0 ] || fail "$1: no arguments; settings stand before the command: TASKS=none SIZES=124m bash $0"
for name in SIZE SEED STRATEGY TASK MIXTURE; do
  plural=${name/%Y/IE}S
  [ -z "${!name:-}" ] || fail "$name=${!name}: is not read; did you mean $plural? Otherwise: unset $name"
done
for flag in DRY_RUN SMOKE SLURM PUBLISHED KEEP_OPTIMIZER; do
  [ "${!flag:-1}" = 1 ] || fail "$flag=${!flag}: must be 1, or not set"
done
[ "${PARALLEL:-runs}" = runs ] || fail "PARALLEL=$PARALLEL: must be runs (one run per GPU), or not set"
VISIBLE=${CUDA_VISIBLE_DEVICES:-}
VISIBLE=(${VISIBLE//,/ })  # these GPUs alone, where the variable is set
GPUS=${GPUS:-$(
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    echo "${#VISIBLE[@]}"
  else
    { nvidia-smi -L 2> /dev/null || true; } | wc -l
  fi
)}
[[ $GPUS =~ ^[0-9]+$ ]] || fail "GPUS=$GPUS: must be a number, such as 4"
LAUNCH=(python)
[ "$GPUS" -le 1 ] || [ -n "${PARALLEL:-}" ] || LAUNCH=(torchrun --standalone --nproc_per_node "$GPUS" --)
RUNS=runs RESULTS=results/$NAME SMOKE_FLAGS=() TASK_FLAGS=() SHOTS=()
MADE=() SIZE_OF=() SEED_OF=() FLAGS_OF=()  # of each run: its folder, size, seed and flags
if [ -n "${SMOKE:-}" ]; then
  SIZES=tiny SMOKE_PRESET=gpt2_124m DATA=data/sample RUNS=runs/smoke RESULTS=results/smoke/$NAME
  SEEDS=${SEEDS:-42}
  TASKS=${TASKS:-where,last_words}
  STEPS=${STEPS:-120}
  [[ $STEPS =~ ^[0-9]+$ && $STEPS -ge 12 ]] || fail "STEPS=$STEPS: must be a number of 12 or more"
  SMOKE_FLAGS=(--max_steps "$STEPS" --warmup_steps $((STEPS / 12)))
  SMOKE_FLAGS+=(--reweight_warmup_steps $((STEPS / 6)) --eval_interval $((STEPS / 4)))
  SMOKE_FLAGS+=(--checkpoint_interval $((STEPS / 2)))
  TASK_FLAGS=(--include_path tests/tasks) SHOTS=(--num_fewshot 0)
fi
DATA=${DATA:-data/slimpajama} DATASET=${DATASET:-DKYoon/SlimPajama-6B}
SEEDS=${SEEDS:-42 43 44}
TASKS=${TASKS:-}
TASKS=${TASKS//[[:space:]]/,}  # as in SEEDS, spaces between the names will do
KNOWN_STRATEGIES=$(sed -n '/^STRATEGIES/,/^}/s/^ *"\(.*\)":.*/\1/p' reweight.py)
ALL_TASKS=${TASKS:-$(sed -n '/^TASKS = (/,/^)/s/^ *"\(.*\)",/\1/p' eval/fewshot.py)}
[ -z "$TASKS" ] || TASK_FLAGS+=(--tasks "$TASKS")

# Run a command so that a signal reaches it, or print it.
do_() {
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@" && echo; else attend "$@"; fi
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
  local size=$1 strategy=$2 seed=$3 label=${LABEL:-} r=0.4; shift 3
  local preset=gpt2_$size
  case $size in llama_*) preset=${size}_linupper ;; esac  # --reweight comes later and wins
  [ -z "${SMOKE:-}" ] || preset=$SMOKE_PRESET  # and then config/tiny_cpu.py
  [ -e "config/$preset.py" ] ||
    fail "SIZES: no config for $size; with spaces between them: $(cd config && echo gpt2_*.py llama_*.py)"
  grep -qxF "$strategy" <<< "$KNOWN_STRATEGIES" ||
    fail "STRATEGIES: $strategy is not one of $(echo $KNOWN_STRATEGIES)"
  [[ $seed =~ ^[0-9]+$ ]] || fail "SEEDS=$SEEDS: must be numbers, such as \"42 43\""
  local flags=("config/$preset.py" ${PUBLISHED:+config/published.py} ${SMOKE:+config/tiny_cpu.py})
  flags+=(--reweight "$strategy")
  # The one published run whose temperature is not 0.4. A script's own --r comes later and wins.
  if [ "$preset $strategy" = "gpt2_124m quadratic" ]; then
    r=1.0
    flags+=(--r "$r")
  fi
  [ "$label" != "_r$r" ] || label=  # a run of the main table
  flags+=(--seed "$seed" "$@" "${SMOKE_FLAGS[@]}")
  MADE+=("$RUNS/$size${label}_${strategy}_seed$seed")
  SIZE_OF+=("$size") SEED_OF+=("$seed")
  FLAGS_OF+=("$(printf '%q ' "${flags[@]}")")
}

# Train, evaluate and score run number $1. Exit code 0; 130 or 143 if it was stopped; else it failed.
carry_out() {
  local out=${MADE[$1]} code=0
  eval "set -- ${FLAGS_OF[$1]}"
  echo "== $out"
  do_ "${LAUNCH[@]}" train.py "$@" --data_dir "$DATA" --out_dir "$out" || return
  if [ -z "${DRY_RUN:-}" ] && ! is_finished "$out"; then
    say_unfinished "$out"
    return 143
  fi
  if ! is_of_newest "$out" perplexity; then
    do_ "${LAUNCH[@]}" eval/perplexity.py --run "$out" || code=$?
    ! was_stopped "$code" || return "$code"
  fi
  [ -n "${KEEP_OPTIMIZER:-}${DRY_RUN:-}" ] || ! is_of_newest "$out" perplexity || drop_optimizer "$out"
  if [ "$TASKS" != none ] && ! has_all_scores "$out"; then
    do_ "${LAUNCH[@]}" eval/fewshot.py --run "$out" "${TASK_FLAGS[@]}" "${SHOTS[@]}" || code=$?
    [ -n "${DRY_RUN:-}" ] || [ -z "$(failed_tasks "$out")" ] || code=1
  fi
  return "$code"
}

was_stopped() {
  [ "$1" = 130 ] || [ "$1" = 143 ]
}

# Whether RUN/eval/$2.json is of the newest model of run $1.
is_of_newest() {
  local state model
  state=$(newest_state "$1")
  [ -n "$state" ] || return
  # The second is of older checkpoints.
  model=$(sed -n -e 's/^ "model_sha256": "\(.*\)",$/\1/p' -e 's/^  "model.pt": "\(.*\)",*$/\1/p' "$state")
  model=${model%%$'\n'*}
  grep -qs "^ \"model_sha256\": \"${model:-none}\"" "$1/eval/$2.json"
}

has_all_scores() {
  local task
  is_of_newest "$1" fewshot || return
  for task in ${ALL_TASKS//,/ }; do
    grep -q "^  \"$task\": {" "$1/eval/fewshot.json" || return
  done
}

# The tasks that could not be scored, for run $1.
failed_tasks() {
  sed -n '/^ "failed": {$/,/^ }/s/^  "\([^"]*\)": .*/\1/p' "$1/eval/fewshot.json" 2> /dev/null || true
}

# Of a finished run's checkpoints keep the newest, and of that one the model: an empty optimizer.pt with its
# hash passes as whole, so train.py still says that the run is finished, but cannot train it further.
drop_optimizer() {
  local newest other file name empty=e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  # sha256
  newest=$(dirname "$(newest_state "$1")")
  for file in "$newest"/optimizer*.pt; do  # several where ranks share one copy of the model
    [ -s "$file" ] || continue
    name=$(basename "$file")
    sed "s/^  \"$name\": \".*\"/  \"$name\": \"$empty\"/" "$newest/state.json" > "$newest/state.tmp"
    : > "$newest/empty.tmp"
    mv "$newest/empty.tmp" "$file"
    mv "$newest/state.tmp" "$newest/state.json"
  done
  for other in "$1"/checkpoints/step_*[0-9]; do  # the newest passes as whole: the others are not needed
    [ "$other" = "$newest" ] || rm -r "$other"
  done
}

# All runs, then their tables, figures and page; then the command in the arguments, if any.
finish() {
  local code=0
  [ -n "${DRY_RUN:-}${SMOKE:-}" ] || check_data
  if [ -n "${SLURM:-}" ]; then
    submit
    return
  fi
  if [ -z "${DRY_RUN:-}" ]; then
    heed_signals
    prepare_once
  fi
  case ${ONLY:-} in
    "")
      if [ -n "${PARALLEL:-}" ] && [ "$GPUS" -gt 1 ] && [ -z "${DRY_RUN:-}" ]; then
        all_in_parallel
      else
        one_after_another
      fi ;;
    tables) ;;  # the last job
    *)  # a task of the array
      carry_out "$ONLY" || code=$?
      exit "$code" ;;
  esac
  make_results || code=1
  [ $# = 0 ] || do_ "$@" || code=1
  [ -n "${DRY_RUN:-}" ] || list_missing || code=1
  [ "$code" = 0 ] || exit 1
}

check_data() {
  local prepare="python prepare_slimpajama.py --source hub --dataset $DATASET"
  [ -f "$DATA/manifest.json" ] ||
    fail "DATA=$DATA: no manifest.json in it; once: $prepare ${REVISION:+--revision $REVISION }--out $DATA"
  [ -z "${REVISION:-}" ] || grep -q "\"revision\": \"$REVISION\"" "$DATA/manifest.json" ||
    fail "REVISION=$REVISION: $DATA was not prepared from it; $prepare --revision $REVISION --out ANOTHER_FOLDER"
}

# What all runs need; with Slurm before the array, or its tasks would get in each other's way.
prepare_once() {
  source scripts/environment.sh requirements-eval.txt
  if [ -n "${SMOKE:-}" ] && [ -z "${ONLY:-}" ]; then
    attend python prepare_slimpajama.py --source sample --tokenizer bytes --out data/sample
  fi
  # A mistyped task would show only after the training.
  if [ -n "$TASKS" ] && [ "$TASKS" != none ] && [ -z "${ONLY:-}" ]; then
    echo "== checking the names in TASKS"
    attend python scripts/fetch_tasks.py --dry_run "${TASK_FLAGS[@]}" || exit
  fi
}

one_after_another() {
  local i code
  for i in "${!MADE[@]}"; do
    code=0
    carry_out "$i" || code=$?
    if was_stopped "$code"; then exit "$code"; fi
    [ "$code" = 0 ] || echo "failed: ${MADE[i]} (exit code $code); going on with the others" >&2
  done
}

# A worker per GPU, each with one run at a time.
all_in_parallel() {
  local workers=() i
  QUEUE=$(mktemp -d)
  trap 'rm -rf "$QUEUE"' EXIT
  for ((i = 0; i < GPUS; i++)); do
    work_on "${VISIBLE[i]:-$i}" &
    workers+=($!)
    CHILDREN=("${workers[@]}")
  done
  wait "${workers[@]}" || true
  CHILDREN=()
}

# The runs that no other worker has, on GPU $1.
work_on() {
  local i out code
  trap - EXIT
  CHILDREN=()
  heed_signals quiet
  export CUDA_VISIBLE_DEVICES=$1
  for i in "${!MADE[@]}"; do
    mkdir "$QUEUE/$i" 2> /dev/null || continue
    out=${MADE[i]} code=0
    mkdir -p "$out"
    echo "== $out on GPU $1, see $out/output.log"
    carry_out "$i" >> "$out/output.log" 2>&1 || code=$?
    if [ "$code" = 0 ]; then echo "done: $out"; else echo "failed: $out (exit code $code)" >&2; fi
  done
}

make_results() {
  local i size sizes all=() chosen folder begun=() code=0
  echo "== $RESULTS"
  for i in "${!MADE[@]}"; do  # a run that never began has no place in a table
    [ -z "${DRY_RUN:-}" ] && [ ! -e "${MADE[i]}/config.json" ] || begun+=("$i")
  done
  if [ ${#begun[@]} = 0 ]; then
    echo "no run has begun: no tables" >&2
    return 1
  fi
  for i in "${begun[@]}"; do all+=("${MADE[i]}"); done
  do_ python eval/tables.py "${all[@]}" --out "$RESULTS" || code=1
  sizes=$(printf '%s\n' "${SIZE_OF[@]}" | sort -u)
  for size in $sizes; do  # figures of a size's runs with the first seed
    chosen=()
    for i in "${begun[@]}"; do
      [ "${SIZE_OF[i]} ${SEED_OF[i]}" != "$size ${SEED_OF[0]}" ] || chosen+=("${MADE[i]}")
    done
    folder=$RESULTS
    [ "$size" = "$sizes" ] || folder+=/$size  # several sizes: a folder each
    [ ${#chosen[@]} = 0 ] || do_ python eval/plots.py "${chosen[@]}" --to "$folder" || code=1
  done
  do_ python eval/report.py "${all[@]}" --out "$RESULTS/report.html" || code=1
  return "$code"
}

# A line for each run that is not complete; the exit code says whether there is none.
list_missing() {
  local out tasks n=0 unscored="" what
  for out in "${MADE[@]}"; do
    what=
    if ! is_finished "$out"; then
      what="not trained to the end ($(progress "$out"))"
    elif ! is_of_newest "$out" perplexity; then
      what="no perplexity"
    elif [ "$TASKS" != none ] && ! is_of_newest "$out" fewshot; then
      what="no few-shot scores"
    elif [ "$TASKS" != none ] && tasks=$(failed_tasks "$out") && [ -n "$tasks" ]; then
      what="no few-shot score for $(echo $tasks)"
      unscored=1
    fi
    [ -n "$what" ] || continue
    [ $((n++)) != 0 ] || echo "== missing" >&2
    [ ! -e "$out/output.log" ] || what+=", see $out/output.log"
    echo "$out: $what" >&2
  done
  [ "$n" != 0 ] || return 0
  if [ -n "$unscored" ]; then
    echo "RUN/eval/fewshot.json says why a task has no score. Where there is internet," \
      "python scripts/fetch_tasks.py fills the cache; TASKS=none leaves the scores out." >&2
  fi
  echo "$n of ${#MADE[@]} runs are not complete; the same command tries again" >&2
  return 1
}

submit() {
  local run="env -u SLURM ONLY=" script="bash scripts/reproduce_$NAME.sh" gpus=${GPUS/#0/1} array tables job=JOB
  [ -z "${PARALLEL:-}" ] || gpus=1
  array=(sbatch --parsable --export ALL --job-name "$NAME" --nodes 1 --ntasks 1)
  tables=("${array[@]}" --cpus-per-task 4)
  # The signal gives a run the time to save before its time limit.
  array+=(--cpus-per-task $((4 * gpus)) --gpus-per-node "$gpus" --requeue --signal B:TERM@120
    --array "0-$((${#MADE[@]} - 1))" --wrap "$run\$SLURM_ARRAY_TASK_ID GPUS=$gpus $script")
  if [ -n "${DRY_RUN:-}" ]; then
    do_ "${array[@]}"
  else
    command -v sbatch > /dev/null || fail "SLURM=1: no sbatch here; submit from a login node of a Slurm cluster"
    prepare_once
    job=$("${array[@]}")
    job=${job%%;*}  # JOB;CLUSTER
    echo "$job"
  fi
  # Also after tasks that failed. It needs no GPU, and trains nothing.
  do_ "${tables[@]}" --dependency "afterany:$job" --wrap "${run}tables GPUS=1 $script"
}
