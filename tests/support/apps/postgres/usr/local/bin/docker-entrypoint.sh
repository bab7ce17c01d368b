#!/bin/sh
# Makes the database at the first start, as Docker Hub's image does.
set -e
bin=$(echo /usr/lib/postgresql/*/bin)
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    "$bin/initdb" --username=postgres --auth=trust --no-sync --no-instructions > /dev/null
    cat /docker-entrypoint-initdb.d/*.sql | "$bin/postgres" --single -j postgres > /dev/null
fi
exec "$bin/postgres" -c listen_addresses=127.0.0.1 -c unix_socket_directories= -p 18082
