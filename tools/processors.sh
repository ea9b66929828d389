#!/usr/bin/env bash
# Notebooks and pytest on the arithmetic of other processors: oneDNN, PyTorch, MKL, OpenBLAS and NumPy choose their kernels by CPU, and their
# sums by the number of threads. A test that asks for more equality than that leaves fails here instead of at a user's.
#
#   tools/processors.sh                                  every row, about an hour on two cores; exit 1 if a test failed
#   tools/processors.sh old avx2                         only these rows
#   tools/processors.sh old -- tests/test_notebooks.py -k "54_runs or 23_unet"     what follows -- goes to pytest
#
# JOBS is the number of test processes (2), PYTHON the interpreter (that of .venv, else python).
set -uo pipefail
cd "$(dirname "$0")/.."

# MKL grants PyTorch no more threads than there are cores, unless MKL_DYNAMIC=FALSE; old: MKL, NumPy and its OpenBLAS as without AVX.
# name     ONEDNN_MAX_CPU_ISA  ATEN_CPU_CAPABILITY  OMP_NUM_THREADS  what else decides (-: leave the library its own choice)
ROWS="
old        SSE41               default              1                MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Nehalem NPY_DISABLE_CPU_FEATURES=X86_V3
avx2       AVX2                avx2                 2                -
avx512     AVX512_CORE         -                    4                MKL_DYNAMIC=FALSE
plain      -                   default              2                -
here       -                   -                    -                -
"
# Files whose tests read bytes, headers, text or the network, and train and score nothing: no kernel has a say in them.
NO_ARITHMETIC="archives bad_input docs export fuzz kaggle nbdev3 package privacy sources streaming"

wanted=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  grep -qE "^$1 " <<<"$ROWS" || { echo "There is no row '$1'; choose from:" $(awk 'NF {print $1}' <<<"$ROWS") >&2; exit 2; }
  wanted+=("$1")
  shift
done
[ $# -gt 0 ] && shift
tests=("$@")
if [ $# = 0 ]; then
  tests=(tests)
  for name in $NO_ARITHMETIC; do tests+=(--ignore "tests/test_$name.py"); done
fi

python=${PYTHON:-$( [ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || command -v python )}
export PATH="$(dirname "$python"):$PATH"
if [ -z "${ANOMDX_DATA:-}" ] && [ -d ../shared/data ]; then export ANOMDX_DATA="$(cd ../shared/data && pwd)"; fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
table=()

# What oneDNN and PyTorch really use: a cap above the processor changes nothing, and then the row is no test of that cap.
probe='
import torch
with torch.no_grad(): torch.nn.Conv2d(8, 8, 3)(torch.rand(2, 8, 32, 32))
print("used", torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())'
# passed, failed, skipped and the names of what failed, from what pytest wrote
count='
import sys, xml.etree.ElementTree as tree
cases = list(tree.parse(sys.argv[1]).iter("testcase"))
bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
skipped = sum(c.find("skipped") is not None for c in cases)
names = " ".join(c.get("classname", "").split(".")[-1] + "::" + c.get("name") for c in bad)
print(len(cases) - len(bad) - skipped, len(bad), skipped, names, sep="|")'

while read -r name isa aten threads more; do
  [ -z "$name" ] && continue
  [ ${#wanted[@]} -gt 0 ] && [[ " ${wanted[*]} " != *" $name "* ]] && continue
  setting=(-u ONEDNN_MAX_CPU_ISA -u ATEN_CPU_CAPABILITY -u OMP_NUM_THREADS)
  [ "$isa" != - ] && setting+=("ONEDNN_MAX_CPU_ISA=$isa")
  [ "$aten" != - ] && setting+=("ATEN_CPU_CAPABILITY=$aten")
  [ "$threads" != - ] && setting+=("OMP_NUM_THREADS=$threads")
  [ "$more" != - ] && setting+=($more)
  said=$(env "${setting[@]}" ONEDNN_VERBOSE=1 "$python" -c "$probe" 2>&1)
  used=$(sed -n 's/.*info,cpu,isa:\(Intel \)\{0,1\}//p' <<<"$said" | head -1)
  read -r _ torch has <<<"$(grep '^used ' <<<"$said")"
  case "$isa:$used" in
    AVX512_CORE:*AVX-512*|AVX2:*AVX2*|SSE41:*SSE4.1*|-:*) truly="$used" ;;
    *) truly="${used:-unknown}, NO TEST of $isa: this processor lacks it" ;;
  esac
  echo "== $name: ${setting[*]:6} (oneDNN $truly; PyTorch $torch; threads $has)"
  start=$SECONDS
  env "${setting[@]}" "$python" -m pytest -q -p no:cacheprovider -n "${JOBS:-2}" --dist worksteal --junitxml "$out/$name.xml" "${tests[@]}" </dev/null
  code=$?
  if [ -s "$out/$name.xml" ]; then IFS='|' read -r passed failed skipped names <<<"$("$python" -c "$count" "$out/$name.xml")"
  else passed=0; failed=1; skipped=0; names="pytest did not finish (exit status $code)"; fi
  if [ "$code" != 0 ] && [ "$failed" = 0 ]; then failed=1; names="pytest ended with exit status $code"; fi
  table+=("$name|$isa|$aten|$threads|$passed|$failed|$skipped|$((SECONDS - start))|oneDNN $truly; PyTorch $torch|$names")
done <<<"$ROWS"

row() { printf '%-8s %-12s %-8s %8s %7s %7s %8s %8s  %s\n' "$@"; }
status=0
echo
row row oneDNN PyTorch threads passed failed skipped seconds "kernels used"
for line in "${table[@]}"; do
  IFS='|' read -r name isa aten threads passed failed skipped seconds truly names <<<"$line"
  row "$name" "$isa" "$aten" "$threads" "$passed" "$failed" "$skipped" "$seconds" "$truly"
  for bad in ${names:+"$names"}; do echo "         failed: $bad"; done
  [ "$failed" = 0 ] || status=1
done
exit $status
