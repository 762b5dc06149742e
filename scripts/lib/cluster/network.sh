# MODE=netns: one bridge, and per node a network namespace with an address of its own.
# shellcheck shell=bash

network_up() {
  [ "$MODE" = netns ] || return 0
  local index
  ip link show "$BRIDGE" >/dev/null 2>&1 || ip link add "$BRIDGE" type bridge
  ip addr show dev "$BRIDGE" | grep "$CONTROLLER/" >/dev/null || ip addr add "$CONTROLLER/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  for ((index = 1; index <= NODES; index++)); do node_network_up "node$index" "$SUBNET.$((10 + index))"; done
}

node_network_up() {
  local node=$1 address=$2
  # There is no way out of a node: with the host's resolv.conf every unknown name would hang for 10 s.
  install -d "/etc/netns/$node"
  echo "options timeout:1 attempts:1" >"/etc/netns/$node/resolv.conf"
  if ip netns list | grep -w "$node" >/dev/null; then return 0; fi
  ip netns add "$node"
  ip link add "v$node" type veth peer name eth0 netns "$node"
  ip link set "v$node" master "$BRIDGE" up
  ip -n "$node" addr add "$address/24" dev eth0
  ip -n "$node" link set lo up
  ip -n "$node" link set eth0 up
  ip -n "$node" route add default via "$CONTROLLER"
}

network_down() {
  [ "$MODE" = netns ] || return 0
  local node
  for node in $(node_names); do
    ip netns del "$node" 2>/dev/null || true
    rm -rf "/etc/netns/$node"
  done
  ip link del "$BRIDGE" 2>/dev/null || true
}

require_links() { [ "$MODE" = netns ] || fail "MODE=$MODE has no link to cut; start with MODE=netns"; }

cut() {
  require_links
  ip link set "v$1" down
}

join() {
  require_links
  ip link set "v$1" up
}
