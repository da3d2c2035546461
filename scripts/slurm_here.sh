#!/usr/bin/env bash
# A Slurm of two nodes on this machine, for a test of docs/cluster.md: Debian's slurm-wlm, munge, openmpi-bin. As root.
#
#     scripts/slurm_here.sh start DIRECTORY     then: export SLURM_CONF=DIRECTORY/slurm.conf
#     scripts/slurm_here.sh stop DIRECTORY
#
# Configuration, keys, logs and process ids live in DIRECTORY; nothing outside of it is changed.
set -euo pipefail
[[ $# -eq 2 && ($1 == start || $1 == stop) ]] || { sed -n '2,7s/^# \?//p' "$0" >&2; exit 2; }
directory=$(realpath -m "$2")

stop() {
  local pid_file pid
  for pid_file in slurmd-n1 slurmd-n2 slurmctld munged; do
    [[ -s $directory/$pid_file.pid ]] || continue
    pid=$(<"$directory/$pid_file.pid")
    kill "$pid" 2>/dev/null || continue
    for _ in {1..50}; do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
  done
}

if [[ $1 == stop ]]; then
  stop
  exit
fi

mkdir -p "$directory"/{state,spool-n1,spool-n2,tmp-n1,tmp-n2}
chmod 755 "$directory"
# Both daemons refuse a key and a socket that others could replace.
[[ -s $directory/munge.key ]] || dd if=/dev/urandom of="$directory/munge.key" bs=1024 count=1 status=none
chmod 600 "$directory/munge.key"
munged --force --key-file "$directory/munge.key" --socket "$directory/munge.socket" --pid-file "$directory/munged.pid" \
  --log-file "$directory/munged.log" --seed-file "$directory/munged.seed"
cat >"$directory/slurm.conf" <<CONF
ClusterName=here
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$directory/munge.socket
CredType=cred/munge
MpiDefault=pmix
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
SlurmctldPort=17817
SlurmctldPidFile=$directory/slurmctld.pid
SlurmctldLogFile=$directory/slurmctld.log
SlurmdPidFile=$directory/slurmd-%n.pid
SlurmdLogFile=$directory/slurmd-%n.log
SlurmdSpoolDir=$directory/spool-%n
TmpFS=$directory/tmp-%n
StateSaveLocation=$directory/state
SlurmdTimeout=20
MinJobAge=3600
NodeName=n1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=17818 CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=17819 CPUs=1 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES State=UP MaxTime=INFINITE
CONF
export SLURM_CONF=$directory/slurm.conf
slurmctld -c
slurmd -N n1
slurmd -N n2
for _ in {1..100}; do
  [[ $(sinfo --noheader --format=%D --states=idle 2>/dev/null) == 2 ]] && { echo "export SLURM_CONF=$SLURM_CONF"; exit; }
  sleep 0.2
done
echo "slurm_here: the nodes did not become idle; see $directory/*.log" >&2
sinfo -N -l >&2 || true
stop
exit 1
