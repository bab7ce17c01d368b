#!/bin/sh
# Run Redis for one GEAR_ROOT, on a socket in GEAR_RUN_DIR. Locks on both directories keep a second Redis from starting:
# it would take over the socket and the AOF of the first. redis-server inherits the locks.
set -eu

hold() {
    flock --nonblock "$1" || { echo "redis: a Redis of this $2 is already running ($3 is locked)" >&2; exit 1; }
}

mkdir -p -m 700 "$GEAR_RUN_DIR" "$GEAR_ROOT/redis"
exec 8>"$GEAR_RUN_DIR/redis.lock" 9>"$GEAR_ROOT/redis/lock"
hold 8 GEAR_RUN_DIR "$GEAR_RUN_DIR/redis.lock"
hold 9 GEAR_ROOT "$GEAR_ROOT/redis/lock"
exec redis-server "${0%/*}/redis.conf" --dir "$GEAR_ROOT/redis" --unixsocket "$GEAR_RUN_DIR/redis.sock"
