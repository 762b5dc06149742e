# Settings of the development cluster: read from the environment, remembered while it runs.
# shellcheck shell=bash

# In these files `grep -q` never ends a pipe: it leaves early, and with pipefail the writer's SIGPIPE reads as "not found".

SETTING_NAMES=(MODE ACCT STRICT NODES GPUS CPUS MEM JOBUSER)

load_settings() {
  MODE=${MODE:-netns} ACCT=${ACCT:-1} STRICT=${STRICT:-0} NODES=${NODES:-4} GPUS=${GPUS:-8} CPUS=${CPUS:-16} MEM=${MEM:-65536}
  JOBUSER=${JOBUSER:-slurmuser}
  ROOT=${ROOT:-/var/lib/launcher-dev-cluster}
  LOGS=$ROOT/log
  RUN=$ROOT/run
  LOCK=/run/lock/launcher-dev-cluster
  ETC=/etc/slurm
  SUBNET=10.77.0
  BRIDGE=slurmbr0
  case "$MODE" in
    netns) CONTROLLER=$SUBNET.1 ;;
    ports) CONTROLLER=127.0.0.1 ;;
    *) fail "MODE=$MODE is neither netns nor ports" ;;
  esac
}

settings() {
  local name
  for name in "${SETTING_NAMES[@]}"; do echo "$name=${!name}"; done
}

remembered() { cat "$ROOT/settings" 2>/dev/null || true; }

remember_settings() {
  install -d -m 755 "$ROOT"
  settings >"$ROOT/settings"
}

# The settings of the running cluster win over the environment: `crash node2` must not need MODE again.
recall_settings() {
  if [ -e "$ROOT/settings" ]; then apply_settings <"$ROOT/settings"; fi
}

apply_settings() {
  local line
  while read -r line; do declare -g "${line%%=*}=${line#*=}"; done
  load_settings
}

say() { echo "[dev-cluster] $*" >&2; }

# What to do is in the message; no stack, no log.
fail() {
  say "$*"
  exit 1
}

# Something that should have come up did not: the logs say why.
broken() {
  say "FAILED: $*"
  show_logs 40 >&2 || true
  exit 1
}

# wait_for SECONDS WHAT COMMAND...   (WATCH=pid: give up as soon as that process is gone)
wait_for() {
  local deadline=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    if [ -n "${WATCH:-}" ] && ! kill -0 "$WATCH" 2>/dev/null; then broken "$what: it exited while starting"; fi
    if [ "$SECONDS" -ge "$deadline" ]; then broken "$what: not within the time limit"; fi
    sleep 0.1
  done
}

node_names() { seq -f 'node%g' 1 "$NODES"; }

for_each_node() {
  local node
  for node in $(node_names); do "$1" "$node"; done
}

load_settings
