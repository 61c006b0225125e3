#!/bin/sh
# From an empty device to an API call: what a new user does, in the order a new user does it.
# The issuer is the sandbox: it answers what is put on its desk.
set -eu
desk=/run/sandbox
api=${1:-road}
say() { echo "=== $*"; }

if ! hsmtoll chain >/dev/null 2>&1; then
    if ! hsmtoll key jwk >/dev/null 2>&1; then
        say "a key is made on the device, never to leave it"
        hsmtoll key generate --bits 2048
    fi
    say "a signing request, signed on the device, goes to the issuer"
    rm -f "$desk/chain.pem"
    hsmtoll key csr --country SE --organization "Eksempel AB" --common-name "Eksempel AB" \
        --organization-identifier NTRSE-5566778899 > "$desk/request.part"
    mv "$desk/request.part" "$desk/request.pem"
    for _ in $(seq 600); do
        if [ -s "$desk/chain.pem" ]; then break; fi
        sleep 0.1
    done
    say "the issuer's certificates are stored beside the key"
    hsmtoll key import "$desk/chain.pem"
fi
say "what Maskinporten would say, before it is asked"
hsmtoll doctor
say "a token, and a call to the API '$api' of Customs"
hsmtoll test-auth "$api"
