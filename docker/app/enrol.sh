#!/bin/sh
# Makes a key on an empty device and gets its certificates, once. The issuer is the sandbox: it
# replies to the file request.pem in the shared directory.
set -eu
shared=/run/sandbox
say() { echo "=== $*"; }

if ! hsmtoll chain >/dev/null 2>&1; then
    if ! hsmtoll key jwk >/dev/null 2>&1; then
        say "making a key on the device, which it never leaves"
        hsmtoll key generate --bits 2048
    fi
    say "sending a signing request, signed on the device, to the issuer"
    rm -f "$shared/chain.pem"
    hsmtoll key csr --country SE --organization "Eksempel AB" --common-name "Eksempel AB" \
        --organization-identifier NTRSE-5566778899 > "$shared/request.part"
    mv "$shared/request.part" "$shared/request.pem"
    for _ in $(seq 600); do
        if [ -s "$shared/chain.pem" ]; then break; fi
        sleep 0.1
    done
    say "storing the certificates beside the key"
    hsmtoll key import "$shared/chain.pem"
fi
