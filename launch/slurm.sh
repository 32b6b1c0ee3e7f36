#!/bin/bash
# One process per GPU on a SLURM cluster: sbatch --nodes=4 launch/slurm.sh CONFIG WORKDIR [--config.section.field=VALUE ...]
# The processes find each other through SLURM. WORKDIR must lie on a file system that all nodes share.
#SBATCH --job-name=mara_jax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --output=%x-%j.log
set -euo pipefail
config=${1:?"usage: sbatch --nodes=N launch/slurm.sh CONFIG WORKDIR [flags]"} workdir=${2:?"WORKDIR is missing"}
shift 2
# Proxies of a login node would be asked for the coordinator.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY
srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m mara_jax.main --config="$config" --workdir="$workdir" "$@"
