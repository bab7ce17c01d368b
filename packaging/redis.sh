#!/bin/sh
# Redis for one GEAR_ROOT, on a socket in GEAR_RUN_DIR. A second one of either is refused before it touches anything:
# Redis itself would take over socket and AOF of the one that runs. The locks are redis-server's, and end with it.
set -eu

hold() {
    flock --nonblock "$1" || { echo "redis: a Redis of this $2 is already running ($3 is locked)" >&2; exit 1; }
}

mkdir -p -m 700 "$GEAR_RUN_DIR" "$GEAR_ROOT/redis"
exec 8>"$GEAR_RUN_DIR/redis.lock" 9>"$GEAR_ROOT/redis/lock"
hold 8 GEAR_RUN_DIR "$GEAR_RUN_DIR/redis.lock"
hold 9 GEAR_ROOT "$GEAR_ROOT/redis/lock"
exec redis-server "${0%/*}/redis.conf" --dir "$GEAR_ROOT/redis" --unixsocket "$GEAR_RUN_DIR/redis.sock"
