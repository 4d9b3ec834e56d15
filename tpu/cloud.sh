# shellcheck shell=bash
# Every command that reaches the cloud, and what the cloud says back. Sourced by tpu/tpu.

where=(--project="$TPU_PROJECT" --zone="$TPU_ZONE")
queue=(gcloud compute tpus queued-resources)
home=$TPU_BUCKET/$TPU_NAME     # job/, logs/ and run/ of this slice's run
local_dir=$TPU_LOCAL/$TPU_NAME # the same on this machine
job=$local_dir/job.sh          # the startup script
ASSUMED=()                     # under --dry-run: the states that the slice is taken to have

say() { echo "tpu: $*" >&2; }

fail() { # something the user can mend
  say "$*"
  exit 2
}

# Print a command so that a shell reads the same words again.
show() {
  local word line=
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    line+="$word "
  done
  echo "${line% }"
}

act() { if [[ $DRY ]]; then show "$@"; else "$@" </dev/null; fi; }

pause() { act sleep "$TPU_POLL_SECONDS"; }

# -- the slice ------------------------------------------------------------------------------------

# STATE: what the queue says (ACTIVE, SUSPENDED, …), ABSENT, or UNKNOWN with the REASON.
read_state() {
  local said
  local command=("${queue[@]}" describe "$TPU_NAME" "${where[@]}" '--format=value(state.state)')
  if [[ $DRY ]]; then
    show "${command[@]}"
    STATE=${ASSUMED[0]:-ACTIVE}
    ASSUMED=("${ASSUMED[@]:1}")
    echo "# taken to be $STATE"
  elif said=$("${command[@]}" 2>&1 </dev/null); then
    STATE=$(grep -xE '[A-Z_]+' <<<"$said" | tail -n 1) || STATE=UNKNOWN
    REASON=$said
  elif grep -q NOT_FOUND <<<"$said"; then
    STATE=ABSENT
  else
    STATE=UNKNOWN
    REASON=$(tail -n 1 <<<"$said")
  fi
}

know_state() {
  read_state
  [[ $STATE != UNKNOWN ]] || fail "gcloud cannot tell the state of $TPU_NAME: $REASON"
}

request() {
  local flags=() more
  [[ $TPU_CAPACITY == on-demand ]] || flags=("--$TPU_CAPACITY")
  read -ra more <<<"$TPU_CREATE_FLAGS"
  act "${queue[@]}" create "$TPU_NAME" --node-id="$TPU_NAME" "${where[@]}" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${flags[@]}" "${more[@]}" \
    --metadata-from-file=startup-script="$job"
}

remove() { act "${queue[@]}" delete "$TPU_NAME" "${where[@]}" --force --quiet; }

await_active() {
  local wrong=0
  while :; do
    read_state
    case $STATE in
      ACTIVE) return ;;
      ABSENT | FAILED | SUSPENDED) fail "$TPU_NAME is $STATE: tpu/tpu create, then again" ;;
      UNKNOWN) ((++wrong < TPU_PATIENCE)) || fail "gcloud does not answer: $REASON" ;;
      *) wrong=0 && say "$TPU_NAME is $STATE; waiting for ACTIVE" ;;
    esac
    pause
  done
}

# -- its workers ----------------------------------------------------------------------------------

# Connections that die are noticed: a worker that aborts must not look like one that thinks.
ssh_flags=(--ssh-flag='-o ConnectTimeout=30' --ssh-flag='-o ServerAliveInterval=30')

on_workers() { # WORKERS COMMAND
  act gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker="$1" --quiet \
    "${ssh_flags[@]}" --command="$2"
}

send_job() {
  act gcloud compute tpus tpu-vm scp "$job" "$TPU_NAME:/tmp/jaxdyn-job.sh" "${where[@]}" \
    --worker=all --quiet
}

# REPORTS: a line from each worker. What ssh itself says goes to a file.
read_reports() {
  local ask="cat /var/lib/jaxdyn/status 2>/dev/null || echo worker on \$(hostname): booting"
  if [[ $DRY ]]; then
    on_workers all "$ask"
    REPORTS="worker 0: running"
    ((${#ASSUMED[@]})) || REPORTS="worker 0: done"
    echo "# taken to be $REPORTS"
  else
    REPORTS=$(on_workers all "$ask" 2>>"$local_dir/ssh.log")
  fi
}

# -- the bucket -----------------------------------------------------------------------------------

bring() { # FOLDER FLAGS…: from the bucket to here
  act mkdir -p "$local_dir/$1"
  act gcloud storage rsync "$home/$1" "$local_dir/$1" --recursive "${@:2}"
}
