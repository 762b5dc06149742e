# The nodes: slurmd and everything that runs below it.
# shellcheck shell=bash

# A node comes up; also after `crash` and `kill-slurmd`.
boot() {
  local node=$1
  if daemon_pid "$RUN/$node.pid" >/dev/null; then return 0; fi
  if [ "$MODE" = netns ]; then
    daemon "slurmd-$node" ip netns exec "$node" unshare --uts sh -c "hostname $node; exec slurmd -D -N $node"
  else
    daemon "slurmd-$node" slurmd -D -N "$node"
  fi
}

# The whole node dies at once: slurmd, the steps and the tasks, without a word to the controller.
crash() {
  local pids
  pids=$(node_pids "$1")
  # shellcheck disable=SC2086  # a list
  if [ -n "$pids" ]; then kill -9 $pids 2>/dev/null || true; fi
  rm -f "$RUN/$1.pid"
}

# Only slurmd dies; tasks live on.
kill_slurmd() {
  local pid
  pid=$(daemon_pid "$RUN/$1.pid") || fail "slurmd of $1 is not running"
  kill -9 "$pid"
  rm -f "$RUN/$1.pid"
}

all_nodes_up() { [ "$(sinfo -h -N -p main -t idle,mix,alloc -o %N | sort -u | wc -l)" = "$NODES" ]; }

node_pids() {
  if [ "$MODE" = netns ]; then
    ip netns pids "$1" 2>/dev/null || true
    return 0
  fi
  # All nodes share this host. slurmd and slurmstepd overwrite their titles and environments, but they hold their
  # node's log file open; whatever descends from them belongs to that node.
  local pid roots=""
  for pid in $(ps -eo pid=,comm= | awk '$2 ~ /^slurm(d|stepd)/ {print $1}'); do
    if find "/proc/$pid/fd" -lname "$LOGS/slurmd-$1.log" 2>/dev/null | grep . >/dev/null; then roots="$roots $pid"; fi
  done
  [ -n "$roots" ] || return 0
  ps -eo pid=,ppid= --sort=start_time | awk -v roots="$roots" '
    BEGIN { count = split(roots, list, " "); for (i = 1; i <= count; i++) found[list[i]] = 1 }
    ($2 in found) && $1 > 1 { found[$1] = 1 }
    END { for (pid in found) print pid }'
}
