# munge, MariaDB, slurmdbd and slurmctld: started in this order, each waited for.
# shellcheck shell=bash

# Not the default socket: a database of the machine's own may be there. libmariadb reads this variable.
export MYSQL_UNIX_PORT=$ROOT/mysql/mysqld.sock

# The pid in a pid file, while it still is the daemon that the file is named after: pids get reused.
daemon_pid() {
  local pid expected
  pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] || return 1
  expected=$(basename "$1" .pid)
  case "$expected" in node*) expected=slurmd ;; esac
  [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$expected" ] && echo "$pid"
}

running() { daemon_pid "$RUN/slurmctld.pid" >/dev/null; }

# stop_pid PIDFILE GRACE_S
stop_pid() {
  local pid deadline=$((SECONDS + $2))
  if pid=$(daemon_pid "$1"); then
    kill "$pid" 2>/dev/null || true
    while daemon_pid "$1" >/dev/null && [ "$SECONDS" -lt "$deadline" ]; do sleep 0.1; done
    if daemon_pid "$1" >/dev/null; then kill -9 "$pid" 2>/dev/null || true; fi
  fi
  rm -f "$1"
}

# daemon NAME COMMAND...: in a session of its own, holding neither our pipes nor our lock
daemon() {
  local name=$1
  shift
  setsid "$@" >"$LOGS/$name.out" 2>&1 </dev/null 8>&- &
}

start_munge() {
  install -d -o munge -g munge -m 755 /run/munge
  install -d -o munge -g munge -m 700 /etc/munge /var/log/munge
  install -d -o munge -g munge -m 711 /var/lib/munge
  if [ ! -s /etc/munge/munge.key ]; then
    (umask 077 && head -c 1024 /dev/urandom >/etc/munge/munge.key)
    chown munge:munge /etc/munge/munge.key
    chmod 400 /etc/munge/munge.key
  fi
  if ! munge_answers >/dev/null 2>&1; then
    setpriv --reuid=munge --regid=munge --clear-groups munged --force >"$LOGS/munged.out" 2>&1 </dev/null 8>&-
    touch "$RUN/munge-is-ours"
  fi
  wait_for 10 "munged" munge_answers
}

munge_answers() { munge -n | unmunge; }

start_accounting() {
  [ "$ACCT" = 1 ] || return 0
  start_database
  if ! daemon_pid "$RUN/slurmdbd.pid" >/dev/null; then
    daemon slurmdbd slurmdbd -D
    echo $! >"$RUN/slurmdbd.pid"
  fi
  wait_for 30 "slurmdbd" sacctmgr -n list cluster
  register_cluster
}

start_database() {
  local data=$ROOT/mysql
  install -d -o mysql -g mysql -m 755 "$data"
  if ! daemon_pid "$data/mariadbd.pid" >/dev/null; then
    [ -d "$data/mysql" ] || create_database "$data"
    daemon mariadbd mariadbd --no-defaults --user=mysql --datadir="$data" --socket="$MYSQL_UNIX_PORT" --skip-networking \
      --pid-file="$data/mariadbd.pid" --innodb-buffer-pool-size=128M --innodb-lock-wait-timeout=900 \
      --innodb-flush-log-at-trx-commit=0 --performance-schema=off
    WATCH=$! wait_for 30 "mariadbd" mariadb --no-defaults --socket="$MYSQL_UNIX_PORT" -e "select 1"
  fi
  mariadb --no-defaults --socket="$MYSQL_UNIX_PORT" -e "create database if not exists slurm_acct_db;
    create user if not exists slurm@localhost identified by 'slurm'; grant all on slurm_acct_db.* to slurm@localhost;"
}

# Beside it first and renamed: an interrupted creation must not look like a database.
create_database() {
  rm -rf "$1.new"
  install -d -o mysql -g mysql -m 755 "$1.new"
  mariadb-install-db --no-defaults --user=mysql --datadir="$1.new" --skip-test-db \
    --auth-root-authentication-method=socket >"$LOGS/mariadb-install.log" 2>&1 || broken "mariadb-install-db"
  rmdir "$1"
  mv "$1.new" "$1"
}

# The cluster must be known to slurmdbd before slurmctld starts. Adding twice is an error: ask first.
register_cluster() {
  known cluster devcluster || sacctmgr -i add cluster devcluster >/dev/null
  if ! known qos urgent; then
    known qos preemptible || sacctmgr -i add qos preemptible Priority=1 PreemptMode=Requeue GraceTime=5 >/dev/null
    sacctmgr -i modify qos normal set Priority=10 Preempt=preemptible PreemptMode=Requeue GraceTime=5 >/dev/null
    sacctmgr -i add qos urgent Priority=100 Preempt=preemptible,normal >/dev/null
  fi
  known account dev || sacctmgr -i add account dev Description=dev Organization=dev >/dev/null
  local user
  for user in "$JOBUSER" root; do
    sacctmgr -n list assoc user="$user" account=dev format=user | grep . >/dev/null ||
      sacctmgr -i add user "$user" account=dev qos=normal,preemptible,urgent defaultqos=normal >/dev/null
  done
}

# known cluster|qos|account NAME
known() {
  local column=$1
  if [ "$1" = qos ]; then column=name; fi
  sacctmgr -n list "$1" format="$column%30" | grep -w "$2" >/dev/null
}

start_controller() {
  if running; then return 0; fi
  daemon slurmctld slurmctld -D
  WATCH=$! wait_for 30 "slurmctld" controller_answers
}

controller_answers() { scontrol ping | grep "is UP" >/dev/null; }

stop_daemons() {
  stop_pid "$RUN/slurmctld.pid" 10
  stop_pid "$RUN/slurmdbd.pid" 10
  stop_pid "$ROOT/mysql/mariadbd.pid" 20
  if [ -e "$RUN/munge-is-ours" ]; then
    stop_pid /run/munge/munged.pid 5
    rm -f "$RUN/munge-is-ours"
  fi
}
