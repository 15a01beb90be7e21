# Sourced by quickstart.sh and reproduce.sh: commands that end in good order when the script is stopped, and what a
# run folder holds.
#
# A command runs in the background while the script waits, so that Ctrl-C, SIGTERM or SIGHUP stops the script at once
# and not after hours. They go on to the command as SIGTERM: train.py saves and ends with exit code 0, and so a signal
# to train.py alone is told only by its run folder, which is_finished reads.
GO_ON="the same command goes on where it was"
CHILDREN=()  # processes that a signal is passed on to

# Run a command; its exit code.
attend() {
  local code=0
  "$@" &
  CHILDREN=($!)
  wait "${CHILDREN[0]}" || code=$?
  CHILDREN=()
  return "$code"
}

# End after signal $1, number $2, once the children have ended; the script's own line follows, unless $3 is "quiet".
stop() {
  trap pass_on INT TERM HUP  # once more: train.py ends without saving
  pass_on
  while kill -0 ${CHILDREN[@]+"${CHILDREN[@]}"} 2> /dev/null; do wait || true; done
  [ "${3:-}" = quiet ] || echo "stopped by SIG$1; $GO_ON" >&2
  exit $((128 + $2))
}

pass_on() {
  kill -TERM ${CHILDREN[@]+"${CHILDREN[@]}"} 2> /dev/null || true
}

heed_signals() {
  trap "stop INT 2 ${1:-}" INT
  trap "stop TERM 15 ${1:-}" TERM
  trap "stop HUP 1 ${1:-}" HUP
}

# state.json of the newest checkpoint of run folder $1; nothing without one.
newest_state() {
  local state
  for state in "$1"/checkpoints/step_*[0-9]/state.json; do :; done  # in the order of their steps
  [ ! -e "$state" ] || echo "$state"
}

# The number $2 of a state.json $1, such as its step.
number_in() {
  sed -n "s/^ \"$2\": \([0-9]*\),*$/\1/p" "$1"
}

# How far run folder $1 got: "step 300 of 500".
progress() {
  local state
  state=$(newest_state "$1")
  if [ -z "$state" ]; then echo "no checkpoint"; return; fi
  echo "step $(number_in "$state" step) of $(number_in "$state" max_steps)"
}

# Whether run folder $1 has a checkpoint of its last step, evaluated.
is_finished() {
  local state
  state=$(newest_state "$1")
  [ -n "$state" ] && [ "$(number_in "$state" step)" = "$(number_in "$state" max_steps)" ] &&
    grep -q '^ "evaluated": true' "$state"
}

# The line for a run that ended in good order before its last step.
say_unfinished() {
  echo "stopped: $1 is at $(progress "$1"); $GO_ON" >&2
}
