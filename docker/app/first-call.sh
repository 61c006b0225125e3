#!/bin/sh
# From an empty device to an API call: the steps of a new user, in their order.
set -eu
api=${1:-road}
say() { echo "=== $*"; }

enrol.sh
say "checking the setup, without a request to Maskinporten"
hsmtoll doctor
say "getting a token and calling the API '$api' of Customs"
hsmtoll test-auth "$api"
