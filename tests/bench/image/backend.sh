#!/bin/sh
# A backend: one short line from memory, and a download of 1 GiB. The file is sparse and on a tmpfs, so it needs no memory.
set -eu
truncate -s 1G /tmp/large
exec nginx -e stderr -c /bench/backend.conf
