#!/bin/sh
# Stands for the installer of a real service.
if [ "$1" = install ]; then
    mkdir -p /opt/demo/state
    echo "installed for $TEAM" > /opt/demo/state/log
    echo "service installed for $TEAM"
elif [ "$1" = remove ]; then
    rm -f /opt/demo/state/log /opt/demo/state/flag
    echo "service removed"
else
    echo "usage: service.sh install|remove" >&2
    exit 2
fi
