#!/bin/sh
# From an empty device to a signing host: enrolment, certificates, the daemon.
set -eu
umask 077
enrol.sh
mkdir -p /var/lib/hsmtoll/audit /var/lib/hsmtoll/stop
python /usr/local/lib/hsmtoll-certificates.py
exec hsmtoll serve
