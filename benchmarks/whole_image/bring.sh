#!/bin/bash
# On the GPU machine: unpacks what pack.py packed (once), and runs run.py with these arguments:
#   bash .gpu/bring.sh --host forge --storage fp8 --free-gb 12 --plan 4 --ways stock fp16 guard
# Ways may name the builds that were packed. BRING_ONLY=1 only unpacks. Results go to $OUT, all else to $WHOLE_IMAGE (/tmp/whole_image).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=${WHOLE_IMAGE:-/tmp/whole_image}
out=${OUT:-$work/out}
mkdir -p "$work" "$out"
echo "$(date +%T) begins; $(nvidia-smi --query-gpu=name,memory.free --format=csv,noheader 2>/dev/null || echo 'no GPU'); $(df -h "$work" | awk 'END {print $4}') of disk"
python3 "$here/benchmarks/whole_image/unpack.py" "$here" "$work"
[ -z "${BRING_ONLY:-}" ] || exit 0

host=forge
for word in "$@"; do [ "$word" != neo ] || host=neo; done
# Packages of the host come before those of the machine.
export PYTHONPATH=$work/site_$host:$work/site_common PYTHONUNBUFFERED=1
exec python3 "$here/benchmarks/whole_image/run.py" --root "$work/$host" --models "$work/models" --work "$work/run" \
  --out "$out" --builds "$work/builds" "$@"
