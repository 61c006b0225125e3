#!/bin/sh
# A SoftHSM p11_token behind a p11-kit server, until SIGTERM.
#
#   TOKEN_LABEL   its label                                   (default: toll)
#   PIN_FILE      where the user PIN stands                   (default: /run/secrets/pin if it is
#                 there, else /run/pin/pin, made here at random when the device is made)
#   SOCKET        where PKCS#11 clients connect               (default: /run/p11/pkcs11.sock)
#   SOCKET_MODE   who may connect; guard it with the folder   (default: 0666)
set -eu
umask 077
if [ -z "${PIN_FILE:-}" ]; then
    PIN_FILE=/run/pin/pin
    if [ -f /run/secrets/pin ]; then PIN_FILE=/run/secrets/pin; fi
fi
random() { od -An -N8 -tx1 /dev/urandom | tr -d ' \n'; }
[ -s "$PIN_FILE" ] || random > "$PIN_FILE"

module=/usr/local/lib/libsofthsm2.so
if ! softhsm2-util --show-slots | grep -q "Label: *$TOKEN_LABEL *\$"; then
    # By variables of these two commands alone: an argv can be read by everybody.
    # Nobody needs the SO PIN again: whoever wants another device removes the volume.
    so_pin=$(random)
    pin=$(cat "$PIN_FILE")
    SO_PIN=$so_pin pkcs11-tool --module "$module" --slot-index 0 --init-token \
        --label "$TOKEN_LABEL" --so-pin env:SO_PIN
    SO_PIN=$so_pin PIN=$pin pkcs11-tool --module "$module" --token-label "$TOKEN_LABEL" --init-pin \
        --login --login-type so --so-pin env:SO_PIN --pin env:PIN
    unset so_pin pin
fi

# After a kill the old socket is still there, and nobody listens on it.
rm -f "$SOCKET"
server=
# p11-kit keeps the whole of each connection in a process of its own: all of them end with us.
trap 'trap "" TERM INT; [ -z "$server" ] || kill -TERM "$server" 2>/dev/null; rm -f "$SOCKET"; exit 0' TERM INT
p11-kit server --foreground --name "$SOCKET" --provider "$module" "pkcs11:token=$TOKEN_LABEL" >/dev/null &
server=$!
until [ -S "$SOCKET" ]; do
    kill -0 "$server" || exit 1
    sleep 0.02
done
# p11-kit makes it rwx--x--x whatever the umask is, which locks other users out.
chmod "${SOCKET_MODE:-0666}" "$SOCKET"
echo "p11_token $TOKEN_LABEL listens on $SOCKET, its PIN is in $PIN_FILE"
wait "$server"
