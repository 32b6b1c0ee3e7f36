#!/bin/bash
# A SLURM cluster of two nodes, n1 and n2, on this one machine, for as long as a command takes:
#   tests/launch/slurm_here.sh COMMAND [ARGUMENT ...]
# COMMAND finds it through SLURM_CONF. Needs root and Debian's slurm-wlm (with munge); leaves nothing behind, but with
# KEEP=1 the folder of logs and configuration.
set -euo pipefail
export PATH="$PATH:/usr/sbin"

if [ "${1-}" != --inside ]; then
  # The names n1 and n2 are known in here alone: tasks look for the coordinator at the name of its node.
  folder=$(mktemp -d /tmp/slurm-here-XXXXXX)
  chmod 755 "$folder"
  { cat /etc/hosts; echo "127.0.0.1 n1 n2"; } >"$folder/hosts"
  status=0
  FOLDER=$folder unshare --mount "$0" --inside "$@" || status=$?
  if [ "${KEEP-}" = 1 ]; then echo "kept $folder" >&2; else rm -rf "$folder"; fi
  exit "$status"
fi
shift
: "${FOLDER:?}"
mount --bind "$FOLDER/hosts" /etc/hosts

mkdir "$FOLDER/state" "$FOLDER/spool.n1" "$FOLDER/spool.n2"
cat >"$FOLDER/slurm.conf" <<CONF
ClusterName=here
SlurmctldHost=localhost
SlurmctldPort=17000
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$FOLDER/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=${KILL_WAIT:-300}
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool.%n
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd.%n.pid
SlurmctldLogFile=$FOLDER/slurmctld.log
SlurmdLogFile=$FOLDER/slurmd.%n.log
SlurmctldTimeout=600
SlurmdTimeout=600
MessageTimeout=60
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=1 RealMemory=1000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$FOLDER/slurm.conf

daemons=()
# shellcheck disable=SC2317,SC2329 # the trap calls it
stop() {
  local daemon
  for daemon in "${daemons[@]}"; do kill "$daemon" 2>/dev/null || true; done
  wait
}
trap stop EXIT
dd if=/dev/urandom of="$FOLDER/munge.key" bs=128 count=1 status=none
chmod 400 "$FOLDER/munge.key"
munged --foreground --force --key-file="$FOLDER/munge.key" --socket="$FOLDER/munge.socket" \
  --pid-file="$FOLDER/munge.pid" --seed-file="$FOLDER/munge.seed" >"$FOLDER/munge.log" 2>&1 &
daemons+=($!)
slurmctld -D >"$FOLDER/slurmctld.out" 2>&1 &
daemons+=($!)
for node in n1 n2; do
  slurmd -D -N "$node" >"$FOLDER/slurmd.$node.out" 2>&1 &
  daemons+=($!)
done
for _ in $(seq 120); do
  if [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" = 2 ]; then
    "$@"
    exit
  fi
  sleep 1
done
echo "the nodes did not come up within two minutes:" >&2
tail -n 5 "$FOLDER"/*.out "$FOLDER"/*.log >&2
exit 1
