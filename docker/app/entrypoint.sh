#!/bin/sh
# `docker run hsmtoll token road` is `hsmtoll token road`; a program of the image runs as itself.
set -eu
case "${1:-}" in
    first-call.sh | signing-host.sh | python | sh) exec "$@" ;;
    *) exec hsmtoll "$@" ;;
esac
