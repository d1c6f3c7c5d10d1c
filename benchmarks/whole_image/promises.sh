#!/bin/bash
# The runs that the table of promises is made from, each one call with all its ways:
#   bash promises.sh RUN COMMAND...        e.g. promises.sh fp8 bash .gpu/bring.sh
#   bash promises.sh RUN python run.py --root FORGE --models M --work W --out O
# More arguments of run.py may follow the command (the last one counts); PRINT=1 only prints the line.
# Seconds are of an H200 with a fresh disk: making the files, then each way's start, first image, and the rest.
set -eu
run=$1
shift
case $run in
  # 60 + guard 35 + 28 + 13 + 55 + 19 + fp16 35 + 30 + 87 + 178 = 540; fp16's 4 steps are in no promise, and its time may end in its ten images.
  fp8) arguments="--host forge --storage fp8 --free-gb 12 --plan 50:long 20:ten 4:ten@guard --ways guard fp16 --time-limit 540" ;;
  # 60 + guard 37 + 21 + 23 + 55 + 9 + 17 + fp16 30 + 26 + 50 + 100 = 428; likewise.
  nf4) arguments="--host forge --storage nf4 --free-gb 8 --plan 50:long 20:ten 4:three@guard 4:ten@guard --ways guard fp16 --time-limit 440" ;;
  # With nf4's files: 25 + guard 36 + 19 + 30 + fp16 35 + 27 + 80 = 252. Each way's share has to be enough for the first one.
  slow) arguments="--host forge --storage nf4 --free-gb 8 --plan 2:cold 20:six --ways guard fp16 --slow-link-gb-s 6 --time-limit 260" ;;
  # 40 + guard 35 + 29 + 22 + stock 35 + 29 + 80 + fp16 35 + 30 + 100 = 435; with fp8's files 395.
  neo-fp8) arguments="--host neo --storage fp8 --free-gb 12 --plan 4:ten --ways guard stock fp16 --time-limit 440" ;;
  # With nf4's files: guard 35 + 24 + 22 + stock 35 + 26 + 70 = 212.
  neo-nf4) arguments="--host neo --storage nf4 --free-gb 8 --plan 4:ten --ways guard stock --time-limit 230" ;;
  # 45 + guard 35 + 18 + 25 + stock 35 + 22 + 70 = 250.
  neo-q4_k) arguments="--host neo --storage q4_k --free-gb 10 --plan 4:ten --ways guard stock --time-limit 260" ;;
  *) echo "$run: expected fp8, nf4, slow, neo-fp8, neo-nf4 or neo-q4_k" >&2; exit 2 ;;
esac
[ $# -gt 0 ] || { echo "expected a command that takes the arguments of run.py" >&2; exit 2; }
# The command's own arguments come after those of the run, so that they count.
words=()
while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do words+=("$1"); shift; done
set -- "${words[@]}" $arguments "$@"
echo "$*"
[ -n "${PRINT:-}" ] || exec "$@"
