# Users, folders and the files in /etc/slurm.
# shellcheck shell=bash

make_user_and_folders() {
  local node index
  id "$JOBUSER" >/dev/null 2>&1 || useradd --create-home --shell /bin/bash "$JOBUSER"
  install -d -m 755 "$ROOT" "$ETC" "$RUN" "$ROOT/gpu" "$ROOT/spool"
  install -d -o slurm -g slurm -m 755 "$LOGS" "$(state_folder)"
  for node in $(node_names); do install -d -m 755 "$ROOT/spool/$node"; done
  for ((index = 0; index < GPUS; index++)); do
    # Clones of /dev/null: slurmd refuses plain files as devices and then leaves CUDA_VISIBLE_DEVICES unset.
    [ -c "$ROOT/gpu/nvidia$index" ] || mknod "$ROOT/gpu/nvidia$index" c 1 3
  done
}

# One state per accounting mode: a controller without accounting cannot read the TRES of one with it.
state_folder() { echo "$ROOT/state-acct$ACCT"; }

write_config() {
  write_hosts
  slurm_conf >"$ETC/slurm.conf"
  if [ "$GPUS" -gt 0 ]; then echo "Name=gpu Type=a100 File=$ROOT/gpu/nvidia[0-$((GPUS - 1))]"; fi >"$ETC/gres.conf"
  # Autodetection makes slurmd refuse to start where /sys/fs/cgroup is absent, as inside `ip netns exec`.
  echo "CgroupPlugin=cgroup/v1" >"$ETC/cgroup.conf"
  if [ "$ACCT" = 1 ]; then
    (umask 077 && slurmdbd_conf >"$ETC/slurmdbd.conf")
    chown slurm:slurm "$ETC/slurmdbd.conf" # slurmdbd exits when anyone else owns or reads it
  fi
}

# Without its configuration `sbatch` says so at once, instead of waiting for a controller that is gone.
remove_config() {
  if [ -e "$ETC/slurm.conf" ] && grep -q "^# Written by scripts/dev-cluster" "$ETC/slurm.conf"; then
    rm -f "$ETC"/{slurm,gres,cgroup,slurmdbd}.conf
  fi
  replace_hosts </dev/null
}

write_hosts() {
  local index
  for ((index = 1; index <= NODES; index++)); do
    if [ "$MODE" = netns ]; then echo "$SUBNET.$((10 + index)) node$index"; else echo "127.0.0.1 node$index"; fi
  done | replace_hosts
}

# Our marked block of /etc/hosts becomes standard input. Rewritten in place: it may be a bind mount.
replace_hosts() {
  local block rest
  block=$(cat)
  rest=$(sed '/^# dev-cluster begin/,/^# dev-cluster end/d' /etc/hosts)
  if [ -n "$block" ]; then block=$'# dev-cluster begin\n'"$block"$'\n# dev-cluster end'; fi
  printf '%s\n' "$rest" ${block:+"$block"} >/etc/hosts
}

slurm_conf() {
  cat <<CONF
# Written by scripts/dev-cluster; changes are lost at its next start.
ClusterName=devcluster
SlurmctldHost=$(hostname -s)($CONTROLLER)
SlurmUser=slurm
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired: 120 s by default.
AuthInfo=cred_expire=5
SlurmctldPort=6817
SlurmdPort=6818
StateSaveLocation=$(state_folder)
SlurmdSpoolDir=$ROOT/spool/%n
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/%n.pid
SlurmctldLogFile=$LOGS/slurmctld.log
SlurmdLogFile=$LOGS/slurmd-%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
# Nodes may declare more CPUs and memory than this machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# Without it every job takes the whole memory of its nodes.
DefMemPerCPU=1024
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
MaxArraySize=10001
MaxJobCount=20000
$(strict_line)
KillWait=5
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=10
BatchStartTimeout=10
ReturnToService=2
RebootProgram=/bin/true
$(gpu_lines)
$(accounting_lines)
$(node_lines)
PartitionName=DEFAULT Nodes=node[1-$NODES] MaxTime=INFINITE State=UP OverSubscribe=NO
PartitionName=main Default=YES PriorityTier=10 DefaultTime=60 PreemptMode=REQUEUE GraceTime=5
PartitionName=low PriorityTier=1 DefaultTime=60 PreemptMode=REQUEUE GraceTime=5
PartitionName=high PriorityTier=100 DefaultTime=60 PreemptMode=OFF
CONF
}

gpu_lines() { if [ "$GPUS" -gt 0 ]; then echo "GresTypes=gpu"; fi; }

# By default sbatch takes jobs over a partition's limits, which then wait for ever.
strict_line() { if [ "$STRICT" = 1 ]; then echo "EnforcePartLimits=ALL"; fi; }

accounting_lines() {
  if [ "$ACCT" != 1 ]; then
    echo "AccountingStorageType=accounting_storage/none"
    echo "PreemptType=preempt/partition_prio"
    return
  fi
  cat <<CONF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$CONTROLLER
AccountingStorageEnforce=associations,limits,qos
# As curious as a site can be: what must not get there is looked for there.
AccountingStoreFlags=job_comment,job_env,job_script
PreemptType=preempt/qos
PriorityType=priority/multifactor
PriorityWeightQOS=100000
PriorityWeightPartition=10000
PriorityWeightAge=10
CONF
  if [ "$GPUS" -gt 0 ]; then echo "AccountingStorageTRES=gres/gpu,gres/gpu:a100"; fi
}

node_lines() {
  local index place gres=""
  if [ "$GPUS" -gt 0 ]; then gres=" Gres=gpu:a100:$GPUS"; fi
  for ((index = 1; index <= NODES; index++)); do
    if [ "$MODE" = netns ]; then
      place="NodeAddr=$SUBNET.$((10 + index)) NodeHostname=node$index Port=6818"
    else
      place="NodeAddr=127.0.0.1 NodeHostname=$(hostname -s) Port=$((17000 + index))"
    fi
    echo "NodeName=node$index $place Sockets=1 CoresPerSocket=$CPUS ThreadsPerCore=1 CPUs=$CPUS RealMemory=$MEM$gres Feature=a100 State=UNKNOWN"
  done
}

slurmdbd_conf() {
  cat <<CONF
AuthType=auth/munge
DbdHost=$(hostname -s)
DbdAddr=$CONTROLLER
DbdPort=6819
SlurmUser=slurm
LogFile=$LOGS/slurmdbd.log
PidFile=$RUN/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CONF
}
