# What must be true of this machine before anything is changed on it.
# shellcheck shell=bash

SLURM_PACKAGES=(slurmctld slurmd slurm-client munge iproute2 procps)
ACCOUNTING_PACKAGES=(slurmdbd slurm-wlm-mysql-plugin mariadb-server)

require_root() {
  [ "$(id -u)" = 0 ] || fail "needs root: it starts daemons and creates users, network namespaces and device files"
}

cluster_packages() {
  echo "${SLURM_PACKAGES[@]}"
  if [ "$ACCT" = 1 ]; then echo "${ACCOUNTING_PACKAGES[@]}"; fi
}

require_packages() {
  local command missing=()
  local commands=(slurmctld slurmd sbatch squeue sinfo scontrol munged munge ip ps setpriv)
  if [ "$ACCT" = 1 ]; then commands+=(slurmdbd sacctmgr mariadbd mariadb mariadb-install-db); fi
  for command in "${commands[@]}"; do
    command -v "$command" >/dev/null 2>&1 || missing+=("$command")
  done
  [ ${#missing[@]} = 0 ] || fail "missing: ${missing[*]}
  apt-get update && apt-get install -y --no-install-recommends $(cluster_packages | tr '\n' ' ')"
}

require_abilities() {
  if [ "$MODE" = netns ] && ! unshare --net --uts true 2>/dev/null; then
    fail "this machine allows no network namespaces (a container without CAP_SYS_ADMIN?): use MODE=ports"
  fi
}

# A slurm.conf of somebody else means this machine belongs to a real cluster: never touch it.
require_free_config() {
  [ ! -e "$ETC/slurm.conf" ] || grep -q "^# Written by scripts/dev-cluster" "$ETC/slurm.conf" ||
    fail "$ETC/slurm.conf exists and is not ours: this machine seems to belong to a Slurm cluster; nothing changed"
}

require_node() {
  node_names | grep -x "${1:-}" >/dev/null || fail "no node \"${1:-}\"; there are: $(node_names | tr '\n' ' ')"
}
