#!/usr/bin/env bash
# Installs batchai on this machine: deploy/install.sh coordinator|node-agent. As root; nothing is started.
set -euo pipefail

part=${1:-}
here=$(cd "$(dirname "$0")" && pwd)
program=${BATCHAI_PROGRAM:-$here/../target/release/batchai}

case "$part" in
coordinator) user=batchai home=/var/lib/batchai ;;
node-agent) user=batchai-job home=/var/lib/batchai-job ;;
*)
    echo "usage: deploy/install.sh coordinator|node-agent" >&2
    exit 2
    ;;
esac
if [ "$(id -u)" != 0 ]; then
    echo "install.sh: this takes root: sudo $0 $part" >&2
    exit 1
fi
if [ ! -x "$program" ]; then
    echo "install.sh: $program is not there: cargo build --release" >&2
    exit 1
fi

install -D -m 755 "$program" /usr/local/bin/batchai
install -D -m 644 "$here/batchai-$part.service" "/etc/systemd/system/batchai-$part.service"
# What was changed here stays.
if [ ! -e "/etc/batchai/$part.env" ]; then
    install -D -m 644 "$here/$part.env" "/etc/batchai/$part.env"
fi
if ! id "$user" >/dev/null 2>&1; then
    useradd --system --user-group --create-home --home-dir "$home" --shell /usr/sbin/nologin "$user"
fi
install -d -m 700 -o "$user" -g "$user" "$home"
if [ "$part" = coordinator ]; then
    install -d -m 700 -o "$user" -g "$user" /var/lib/batchai/coordinator
fi
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
fi
echo "installed batchai $part for user $user; settings are in /etc/batchai/$part.env"
