#!/bin/sh
# From an empty device to an API call: what a new user does, in the order a new user does it.
set -eu
api=${1:-road}
say() { echo "=== $*"; }

enrol.sh
say "what Maskinporten would say, before it is asked"
hsmtoll doctor
say "a token, and a call to the API '$api' of Customs"
hsmtoll test-auth "$api"
