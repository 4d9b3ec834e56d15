#!/usr/bin/env bash
# A cloud of one slice. $FAKE/states has the states that `describe` finds, one after the other (the
# last one stays); `create` and `delete` change whether there is a slice; $FAKE/reports has what
# its workers say, a line for each look with `|` between workers. Every call goes to $FAKE/calls.
set -euo pipefail
printf '%s\x1f' "$@" >>"$FAKE/calls"
echo >>"$FAKE/calls"

next() { # the file's first line; the last line stays
  head -n 1 "$1"
  [[ $(wc -l <"$1") -le 1 ]] || sed -i 1d "$1"
}

case "$*" in
  *"queued-resources describe "*)
    [[ ! -e $FAKE/broken ]] || { echo "ERROR: (gcloud) PERMISSION_DENIED: no access" >&2 && exit 1; }
    [[ -e $FAKE/slice ]] || { echo "ERROR: (gcloud) NOT_FOUND: resource was not found" >&2 && exit 1; }
    next "$FAKE/states"
    ;;
  *"queued-resources create "*)
    [[ ! -e $FAKE/slice ]] || { echo "ERROR: (gcloud) ALREADY_EXISTS" >&2 && exit 1; }
    touch "$FAKE/slice"
    startup=${!#}
    cp "${startup##*startup-script=}" "$FAKE/startup-$(grep -c create "$FAKE/calls")"
    ;;
  *"queued-resources delete "*)
    [[ -e $FAKE/slice ]] || { echo "ERROR: (gcloud) NOT_FOUND: resource was not found" >&2 && exit 1; }
    rm "$FAKE/slice"
    ;;
  *"tpu-vm ssh "*"--command=cat "*)
    [[ $(head -n 1 "$FAKE/reports") != unreachable ]] || { next "$FAKE/reports" >&2 && exit 255; }
    next "$FAKE/reports" | tr '|' '\n'
    ;;
  *"storage rsync "*) [[ ! -e $FAKE/no-bucket ]] || exit 1 ;;
esac
