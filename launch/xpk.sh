#!/bin/bash
# Trains on a TPU slice of a GKE cluster that XPK has made (pip install xpk):
#   CLUSTER=my-cluster ZONE=us-east5-b IMAGE=REGISTRY/mara_jax:tpu launch/xpk.sh NAME CONFIG WORKDIR [--config.section.field=VALUE ...]
# NAME is the workload's; WORKDIR lies on a volume that all hosts share (`xpk storage attach`). TYPE is that of the slice
# (v6e-16), SLICES how many (1). What is begun again, and when: docs/kubernetes.md
set -euo pipefail
: "${CLUSTER:?name of the cluster}" "${ZONE:?its zone}" "${IMAGE:?the image built from launch/Dockerfile}"
name=${1:?"usage: launch/xpk.sh NAME CONFIG WORKDIR [flags]"} config=${2:?"CONFIG is missing"} workdir=${3:?"WORKDIR is missing"}
shift 3
flags=$(printf ' %q' "--config=$config" "--workdir=$workdir" "$@")
# `exec`, so that the SIGTERM that XPK hands on reaches the run. Status 75 (saved), 69 (another process is lost), 70 (ended
# by its watchdog) and 1 (an error that nobody foresaw) are begun again, as those from 127 on are by themselves; 2
# (refused) is not.
exec xpk workload create --cluster="$CLUSTER" --zone="$ZONE" --workload="$name" --docker-image="$IMAGE" \
  --tpu-type="${TYPE:-v6e-16}" --num-slices="${SLICES:-1}" --max-restarts="${RESTARTS:-10}" \
  --restart-on-exit-codes=1,69,70,75 --termination-grace-period-seconds=300 \
  --command="exec python -m mara_jax.main$flags"
