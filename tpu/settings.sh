# shellcheck shell=bash
# Settings of tpu/tpu. The environment goes before this file: TPU_NAME=second tpu/tpu status.
# A file of your own, in the same form, is named by TPU_SETTINGS.

# Where.
: "${TPU_PROJECT:=}"                   # Google Cloud project
: "${TPU_ZONE:=}"                      # a zone that has the accelerator, such as us-west4-a
: "${TPU_BUCKET:=}"                    # gs://bucket or gs://bucket/folder, in the zone's region

# What. The name is the run's id too: TPU_BUCKET/TPU_NAME/run is its directory.
: "${TPU_NAME:=jaxdyn}"
: "${TPU_ACCELERATOR:=v5litepod-16}"   # v5litepod-N (or v5e-N), v5p-N, v6e-N, v4-N, v3-N, v2-N
: "${TPU_CAPACITY:=spot}"              # spot, reserved or on-demand
: "${TPU_RUNTIME:=}"                   # the machine's image; by accelerator when empty
: "${TPU_CREATE_FLAGS:=}"              # more flags for `queued-resources create`, in words

# The workers.
: "${TPU_PACKAGE:=}"                   # what pip installs; this checkout's last commit when empty
: "${TPU_PYTHON:=3.12}"
: "${TPU_FILES:=}"                     # a local directory whose contents the command finds in `.`
: "${TPU_RETRIES:=5}"                  # starts in a row that may fail before a worker gives up
: "${TPU_STALL_SECONDS:=1800}"         # silence of worker 0 that counts as a hang; 0: for ever

# This machine.
: "${TPU_POLL_SECONDS:=60}"            # between two looks at the slice
: "${TPU_PATIENCE:=10}"                # looks in a row that may go wrong
: "${TPU_KEEP:=no}"                    # yes: babysit leaves the slice when the run has ended
: "${TPU_LOCAL:=runs/tpu}"             # jobs, logs and results
