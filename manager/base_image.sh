#!/usr/bin/env bash
# Makes a base image with Debian's debootstrap, where no registry is reachable. As in the official slim images, neither
# this image nor those that are built on it have documentation (but licenses), translations, or downloaded packages.
#   base_image.sh TREE LABEL NAME     TREE: an empty folder; LABEL: a KEY=VALUE for the image
set -euo pipefail
tree=$1
debootstrap --variant=minbase trixie "$tree"

{
    printf 'path-exclude /usr/share/%s/*\n' doc man info locale
    echo 'path-include /usr/share/doc/*/copyright'
} >"$tree/etc/dpkg/dpkg.cfg.d/slim"
clean='rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin'
echo "DPkg::Post-Invoke { \"$clean\"; };" >"$tree/etc/apt/apt.conf.d/slim"
find "$tree/usr/share/doc" -type f ! -name copyright -delete
rm -rf "$tree"/usr/share/{man,info,locale}/* "$tree"/var/cache/apt/* "$tree"/var/lib/apt/lists/*

tar -C "$tree" -c . | docker import --change "LABEL $2" - "$3"
