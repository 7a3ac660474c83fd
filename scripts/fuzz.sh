#!/usr/bin/env bash
# Runs every fuzz target for some seconds each, 60 unless told otherwise:
#
#     scripts/fuzz.sh [SECONDS]
#
# What was found before, in fuzz/corpus, is where a run begins; an input that fails is kept in fuzz/artifacts.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-60}
case $seconds in
    '' | *[!0-9]* | 0)
        echo "usage: scripts/fuzz.sh [SECONDS]" >&2
        exit 2
        ;;
esac

if ! cargo fuzz --version >/dev/null 2>&1; then
    echo "skipped: no cargo-fuzz (cargo install cargo-fuzz)"
    exit 0
fi
# A look must not install what is not there.
if ! RUSTUP_AUTO_INSTALL=0 cargo +nightly --version >/dev/null 2>&1; then
    echo "skipped: no nightly toolchain"
    exit 0
fi

cargo +nightly fuzz build
targets=$(cargo +nightly fuzz list)

failed=0
for target in $targets; do
    log=fuzz/target/$target.log
    # An input that takes 10 s hangs: there is none that should take 10 ms.
    if cargo +nightly fuzz run "$target" -- -max_total_time="$seconds" -timeout=10 -print_final_stats=1 >"$log" 2>&1; then
        result=ok
    else
        result=FAILED
        failed=1
    fi
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    printf '%-14s %12s runs  %s\n' "$target" "${runs:-0}" "$result"
    if [ "$result" = FAILED ]; then
        tail -n 40 "$log" | sed 's/^/    /'
        echo "    all of it: $log"
    fi
done
exit "$failed"
