#!/bin/bash
# The same command on every host of a TPU slice; the hosts find each other.
#   TPU=my-slice ZONE=us-west4-a launch/tpu_pod.sh CONFIG WORKDIR [--config.section.field=VALUE ...]
# The package is expected in ~/mara_jax on every host (pip install -e '.[tpu]'); WORKDIR on a file system that all hosts
# share (Filestore, or a mounted bucket).
set -euo pipefail
: "${TPU:?name of the slice}" "${ZONE:?its zone}"
config=${1:?"usage: TPU=NAME ZONE=ZONE launch/tpu_pod.sh CONFIG WORKDIR [flags]"} workdir=${2:?"WORKDIR is missing"}
shift 2
flags=$(printf ' %q' "--config=$config" "--workdir=$workdir" "$@")
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd ~/mara_jax && python3 -m mara_jax.main$flags"
