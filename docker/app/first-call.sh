#!/bin/sh
# From an empty device to an API call: what a new user does, in the order a new user does it.
set -eu
api=${1:-road}
if ! hsmtoll chain >/dev/null 2>&1; then
    echo "=== a key is made on the device, never to leave it, and gets its certificates"
    python /usr/local/lib/hsmtoll-enrol.py
fi
echo "=== what the device holds"
hsmtoll chain
echo "=== a token, and a call to the API '$api' of Customs"
hsmtoll test-auth "$api"
