#!/usr/bin/env bash
# The first process of the second host, which run.sh here starts in its namespaces: makes the tree the root, with the
# file systems of a host, and runs the tests. All processes of the second host end with this one.
#   first_process.sh TREE [PYTEST WORD…]
set -euo pipefail

mount --make-rprivate /
mount --bind "$1" "$1" # pivot_root needs a mount point
cd "$1"
shift
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
# Docker's data must not be on an overlay, as the tree may be if this host is a container.
mkdir -p var/lib/docker
mount -t tmpfs tmpfs var/lib/docker
if [ -d /lib/modules ]; then
    mkdir -p usr/lib/modules
    mount --rbind /lib/modules usr/lib/modules
fi
mkdir -p .old
pivot_root . .old
umount -l /.old

# Not exec: this process has to wait for orphans, and to live until tests/run.sh has stopped the engine.
cd /root/lbscaler
trap : TERM
status=0
tests/run.sh "$@" || status=$?
exit "$status"
