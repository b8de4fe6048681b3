#!/bin/sh
if [ -e /opt/demo/state/flag ]; then
    echo 1
else
    echo 0
fi
