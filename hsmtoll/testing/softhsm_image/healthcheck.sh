#!/bin/sh
# Healthy is a device that answers a client through the socket.
P11_KIT_SERVER_ADDRESS=unix:path=$SOCKET pkcs11-tool --module /usr/local/lib/p11-kit-client.so \
    --list-token-slots 2>/dev/null | grep -q "token label *: $TOKEN_LABEL *\$"
