#!/bin/sh
# Launcher of the CUDA compiler: keeps what it prints in OBJECT.log, where tests/build looks for ptxas's messages.
log=/dev/null
previous=
for word; do
  [ "$previous" != -o ] || log=$word.log
  previous=$word
done
text=$("$@" 2>&1)
code=$?
[ -z "$text" ] || printf '%s\n' "$text" >&2
printf '%s\n' "$text" >"$log"
exit $code
