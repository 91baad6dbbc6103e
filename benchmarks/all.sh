#!/usr/bin/env bash
# Train all experiments with several seeds on one GPU, many at a time, in at most 9 minutes. In the project's folder:
#
#     benchmarks/all.sh DATA OUT [FLAG ...]        such as: benchmarks/all.sh data/VOCdevkit/CamVid comparison
#
# Writes what compare.py --seeds writes, OUT/seed0 and so on, OUT/RESULTS.md and plots, and each run's output to OUT/logs.
# FLAGs are those that compare.py passes on. The same call continues what is not finished. Variables: PYTHON, the
# interpreter; SEEDS ("0 1 2 3 4"); JOBS, how many runs at a time (16); EXPERIMENTS; TOTAL, the seconds for everything.
# A try on a CPU: JOBS=2 SEEDS="0 1" benchmarks/all.sh DATA OUT --limit 8 --epochs 1 --device cpu
usage="usage: benchmarks/all.sh DATA OUT [FLAG ...]"
export data=${1:?$usage} out=${2:?$usage}
shift 2
# the longest first, so that the last runs end at about the same time
experiments=${EXPERIMENTS:-train_4_b train_4_c train_5_c train_6 train_5_a train train_4_a train_5_b}
export python=${PYTHON:-python3} flags="$*" end=$(($(date +%s) + ${TOTAL:-520})) OMP_NUM_THREADS=1
mkdir -p "$out/logs"

run() { # EXPERIMENT SEED
    local begin left code=0
    begin=$(date +%s) left=$((end - $(date +%s)))
    # shellcheck disable=SC2086
    timeout --kill-after=5 $((left > 1 ? left : 1)) "$python" "$1.py" --data "$data" --seed "$2" --out "$out/seed$2" \
        --resume $flags >>"$out/logs/$1_seed$2.txt" 2>&1 || code=$?
    echo "$1 seed $2: exit code $code after $(($(date +%s) - begin)) s"
}
export -f run

for name in $experiments; do
    for seed in ${SEEDS:-0 1 2 3 4}; do
        echo "$name" "$seed"
    done
done | xargs -P "${JOBS:-16}" -L 1 bash -c 'run "$@"' run
"$python" compare.py --data "$data" --out "$out" "$@"
