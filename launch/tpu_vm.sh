#!/bin/bash
# Trains on the hosts of a TPU slice made with Cloud TPU's `gcloud compute tpus tpu-vm`; the hosts find each other:
#   TPU=my-slice ZONE=us-west4-a launch/tpu_vm.sh CONFIG WORKDIR [--config.section.field=VALUE ...]
# The package is expected in ~/mara_jax on every host (pip install -e '.[tpu]'), WORKDIR on a file system that all hosts
# share (Filestore). A run that was asked to end, or whose hosts or connection were lost, is begun again as soon as the
# slice is ready, up to RESTARTS times (10). What the statuses mean: docs/clusters.md
set -euo pipefail
: "${TPU:?name of the slice}" "${ZONE:?its zone}"
config=${1:?"usage: TPU=NAME ZONE=ZONE launch/tpu_vm.sh CONFIG WORKDIR [flags]"} workdir=${2:?"WORKDIR is missing"}
shift 2
REFUSED=2 INTERRUPTED=130 # exit statuses of mara_jax.main, which gcloud hands on from the first host that has one
flags=$(printf ' %q' "--config=$config" "--workdir=$workdir" "$@")

# Waits for the slice, as after a preemption: spot slices are made again by their queued resource.
wait_until_ready() {
  local state
  while true; do
    state=$(gcloud compute tpus tpu-vm describe "$TPU" --zone="$ZONE" --format='value(state)') || state=gone
    if [ "$state" = READY ]; then return; fi
    echo "mara_jax: $TPU is $state; looking again in ${WAIT:-60} s" >&2
    sleep "${WAIT:-60}"
  done
}

# A run that a lost connection has left behind holds the chips: it is asked to end, and waited for.
# shellcheck disable=SC2016 # the hosts expand it
leave='for _ in $(seq 300); do pkill -TERM -f "^[^ ]*python[0-9.]* -m mara_jax[.]main" || break; sleep 1; done'

for ((restart = 0; restart <= ${RESTARTS:-10}; restart++)); do
  wait_until_ready
  status=0
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
    --command="$leave; cd ~/mara_jax && exec python3 -m mara_jax.main$flags" || status=$?
  case $status in
    0 | "$REFUSED" | "$INTERRUPTED") exit "$status" ;;
    *) echo "mara_jax: ended with status $status" >&2 ;;
  esac
done
exit "$status"
