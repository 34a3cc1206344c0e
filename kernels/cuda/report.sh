#!/bin/sh
# Compiler launcher: runs the compiler and turns what `ptxas -v` says of each kernel into a line of a table.
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
"$@" 2>"$log"
status=$?
names='cat'; command -v c++filt >/dev/null && names='c++filt -p'
awk '
  /^ptxas info +: [0-9]+ bytes gmem/ || /^ptxas info +: Function properties/ || /Compile time =/ { next }
  /^ptxas info +: Compiling entry function/ { split($0, part, "\047"); kernel = part[2]; arch = part[4]; next }
  /bytes stack frame/ { stack = $1; spill = $5 + $9; next }
  /^ptxas info +: Used [0-9]+ registers/ {
    shared = 0
    for (i = 2; i <= NF; i++) { if ($i ~ /^smem/) shared = $(i - 2) }
    if (!rows++) printf "%-8s %9s %7s %7s %8s  %s\n", "arch", "registers", "spills", "stack", "shared", "kernel"
    printf "%-8s %9d %7d %7d %8d  %s\n", arch, $5, spill, stack, shared, kernel
    next
  }
  { print }' "$log" | $names >&2
exit $status
