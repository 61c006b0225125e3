#!/bin/sh
# A key on an empty device and its certificates, once. The issuer is the sandbox: it answers what is
# put on its desk.
set -eu
desk=/run/sandbox
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
