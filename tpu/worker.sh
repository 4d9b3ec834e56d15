#!/usr/bin/env bash
# What each worker of a slice does: install jaxdyn, run one command, start it again, report.
#
# tpu/tpu puts the job's settings before this text and makes the whole the slice's startup script,
# so every boot begins or resumes the job: jaxdyn goes on from its newest checkpoint when it gets
# the same command again. Modes: boot (the default), setup, start, run, stop, logs.
# shellcheck disable=SC2329  # the modes are called by their names
set -euo pipefail

: "${PACKAGE:?}" "${PYTHON:?}" "${LOGS:?}" "${RETRIES:?}" "${STALL_SECONDS:?}"
ROOT=${JAXDYN_ROOT:-/var/lib/jaxdyn}
RETRY_SECONDS=${JAXDYN_RETRY_SECONDS:-30}
WATCH_SECONDS=${JAXDYN_WATCH_SECONDS:-30}
UPLOAD_SECONDS=${JAXDYN_UPLOAD_SECONDS:-600}
export HOME=${HOME:-/root} PATH=$PATH:/snap/bin # a startup script has neither
# The whole contract with jaxdyn: this variable asks it for jax.distributed, found by itself.
export JAXDYN_DISTRIBUTED=${JAXDYN_DISTRIBUTED:-auto}

worker() {
  [[ -n ${JAXDYN_WORKER:-} ]] || JAXDYN_WORKER=$(
    curl -sf --retry 5 -H 'Metadata-Flavor: Google' \
      http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number \
      || hostname
  )
  echo "$JAXDYN_WORKER"
}

# The line that `tpu/tpu status` and `babysit` read: "worker 3: STATE details".
report() {
  printf 'worker %s: %s\n' "$WORKER" "$*" | cut -c -400 | tee "$ROOT/status.new"
  mv "$ROOT/status.new" "$ROOT/status"
}

upload() { # a log into the bucket; a failure costs only the copy
  gcloud storage cp --quiet "$1" "$LOGS/" </dev/null >/dev/null 2>&1 || true
}

# -- set-up ---------------------------------------------------------------------------------------

setup() {
  exec 8>"$ROOT/setup.lock"
  flock 8 # `tpu/tpu setup` may come while the boot's set-up runs
  [[ ! -f $ROOT/installed || $(<"$ROOT/installed") != "$PACKAGE" ]] || return 0
  local requirement=$PACKAGE
  if [[ $PACKAGE == gs://* ]]; then
    gcloud storage cp --quiet "$PACKAGE" "$ROOT/"
    requirement="jaxdyn[tpu] @ file://$ROOT/${PACKAGE##*/}"
  fi
  # The images' Python is older than jaxdyn's oldest; uv brings its own.
  python3 -m pip install --quiet --upgrade --target "$ROOT/uv" uv
  "$ROOT/uv/bin/uv" venv --clear --python "$PYTHON" "$ROOT/venv"
  "$ROOT/uv/bin/uv" pip install --python "$ROOT/venv/bin/python" "$requirement"
  echo "$PACKAGE" >"$ROOT/installed"
}

prepare() { # set-up and files, each in a shell of its own: the first error ends it
  bash "$ROOT/job.sh" setup || return
  [[ -z ${FILES:-} ]] || gcloud storage rsync --quiet --recursive "$FILES" "$ROOT/work" </dev/null
}

# -- the command ----------------------------------------------------------------------------------

# One run of the command, on its own log. Sets CODE, and STALLED when the watcher ended it.
attempt() {
  local log=$1 watcher
  # A slice that replaced another must not look for the other's coordinator.
  unset "${!MEGASCALE_@}"
  rm -f "$ROOT/stalled"
  cd "$ROOT/work"
  # Python prints every thread's traceback on SIGABRT: what a hang was waiting for.
  PYTHONFAULTHANDLER=1 setsid "$ROOT/venv/bin/jaxdyn" "${COMMAND[@]}" </dev/null >>"$log" 2>&1 &
  CHILD=$!
  watch "$log" &
  watcher=$!
  while :; do # a signal ends `wait` before the command has ended
    CODE=0
    wait "$CHILD" || CODE=$?
    kill -0 "$CHILD" 2>/dev/null || break
  done
  kill -KILL -- "-$CHILD" 2>/dev/null || true # what it left behind may hold the chips
  CHILD=
  kill "$watcher" 2>/dev/null || true
  wait "$watcher" || true
  upload "$log"
}

# When one host aborts, the others wait for it inside a collective operation. Process 0 prints a
# line every few steps, so its silence is a hang; without their coordinator the others end too.
watch() {
  local log=$1 uploaded=$SECONDS rest
  trap 'kill "${rest:-}" 2>/dev/null; exit' TERM
  while :; do
    sleep "$WATCH_SECONDS" &
    rest=$!
    wait "$rest"
    if ((SECONDS - uploaded >= UPLOAD_SECONDS)); then
      upload "$log"
      uploaded=$SECONDS
    fi
    if [[ $WORKER != 0 ]] || ((STALL_SECONDS == 0)); then continue; fi
    (($(date +%s) - $(stat -c %Y "$log") >= STALL_SECONDS)) || continue
    touch "$ROOT/stalled"
    kill -ABRT -- "-$CHILD" 2>/dev/null || true
    sleep "$WATCH_SECONDS"
    kill -KILL -- "-$CHILD" 2>/dev/null || true
    return
  done
}

# Preempted or stopped: jaxdyn saves on SIGTERM.
pass_on() {
  STOPPED=yes
  [[ -z $CHILD ]] || kill -TERM -- "-$CHILD" 2>/dev/null || true
}

run() {
  exec 9>"$ROOT/lock"
  flock --wait 2 9 || return 0 # another one runs
  echo $$ >"$ROOT/pid"
  CHILD='' STOPPED=''
  trap pass_on TERM INT
  report "setting-up, log $ROOT/logs/job.log"
  local try=1
  until prepare; do
    [[ -z $STOPPED ]] || { report "stopped during set-up" && return; }
    ((try++ < 3)) || { report "failed to set up, log $ROOT/logs/job.log" && return 1; }
    sleep "$RETRY_SECONDS"
  done

  local failures=0 began log last
  while [[ -z $STOPPED ]]; do
    log=$ROOT/logs/worker-$WORKER-$(date -u +%Y%m%dT%H%M%S.%3N).log
    : >"$log"
    ln -sfn "$log" "$ROOT/logs/current.log"
    report "running, log $log"
    began=$SECONDS
    attempt "$log"
    last=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 || true)
    [[ -z $STOPPED ]] || break
    ((CODE)) || { report "done, log $log" && return; }
    ((CODE != 2)) || { report "failed with exit code 2, log $log: $last" && return 1; }
    ((SECONDS - began < 3600)) || failures=0 # it worked for a while: count anew
    ((++failures <= RETRIES)) || break
    report "waiting to start again after exit code $CODE (failure $failures), log $log: $last"
    sleep "$RETRY_SECONDS" || true
  done
  [[ -z $STOPPED ]] || { report "stopped, log ${log:-none}" && return; }
  # A chip that another process holds stays held: only a new machine helps.
  ! grep -qE '/dev/(vfio/|accel)[0-9]+.*busy' "$log" || { report "busy, log $log: $last" && return 1; }
  [[ ! -e $ROOT/stalled ]] || last="silent for $STALL_SECONDS s; tracebacks in the log"
  report "failed with exit code $CODE, log $log: $last"
  return 1
}

# -- modes ----------------------------------------------------------------------------------------

running() { ! flock --nonblock "$ROOT/lock" true; }

start() {
  local self=${BASH_SOURCE[0]}
  if running; then
    cmp -s "$self" "$ROOT/job.sh" && echo "worker $WORKER: already running" && return
    echo "worker $WORKER: runs another command; tpu/tpu stop ends it" && return 1
  fi
  [[ $self -ef $ROOT/job.sh ]] || install -m 755 "$self" "$ROOT/job.sh"
  report "starting"
  setsid nohup bash "$ROOT/job.sh" run </dev/null >>"$ROOT/logs/job.log" 2>&1 &
}

boot() {
  local self=${BASH_SOURCE[0]}
  [[ ! -e $ROOT/job.sh ]] || self=$ROOT/job.sh # the disk survived: the job that was given last
  if [[ $self == "$ROOT/job.sh" || ${#COMMAND[@]} -gt 0 ]]; then
    grep -qs '^worker [^:]*: done' "$ROOT/status" || exec bash "$self" start
    return
  fi
  report "setting-up"
  if bash "$self" setup; then self=ready; else self="failed to set up: sudo journalctl says why"; fi
  running || report "$self"
}

stop() {
  running || { echo "worker $WORKER: nothing runs" && return; }
  kill -TERM "$(<"$ROOT/pid")"
  for _ in {1..240}; do
    running || { cat "$ROOT/status" && return; }
    sleep 0.5
  done
  echo "worker $WORKER: has not stopped yet, log $ROOT/logs/current.log" && return 1
}

logs() { tail -n 50 -F "$ROOT/logs/current.log" 2>/dev/null | sed -u "s/^/[worker $WORKER] /"; }

main() {
  mkdir -p "$ROOT/logs" "$ROOT/work"
  WORKER=$(worker)
  export JAXDYN_WORKER=$WORKER
  case ${1:-boot} in
    boot | setup | start | run | stop | logs) "${1:-boot}" ;;
    *) echo "job.sh: no mode $1" >&2 && return 2 ;;
  esac
}

main "$@"
exit
