#!/usr/bin/env bash
# Measure everything on one GPU, in at most 9 minutes, and write the results to a folder. In the project's folder:
#
#     benchmarks/gpu.sh OUT [DATA [FLAG ...]]        such as: benchmarks/gpu.sh gpu data/VOCdevkit/Toy
#
# speed.md     the common loop with and without workers, and train.py, train_5_a.py and train_6.py: see speed.py
# compiled.md  these scripts, also with torch.compile and with CUDA graphs
# tests.txt    the tests that need a GPU
# log.txt      messages, and how each part ended: at the latest when its own time is over, and the next begins
#
# Without DATA, the toy set is rendered first. FLAGs are for speed.py. Variables: PYTHON, the interpreter; BEFORE, the
# folder of another checkout to compare with; TOTAL, the seconds for everything.
# A try on a CPU: TOTAL=1800 benchmarks/gpu.sh out DATA --device cpu --limit 8 --rounds 1
out=${1:?"usage: benchmarks/gpu.sh OUT [DATA [FLAG ...]]"} data=$2
shift $(($# < 2 ? $# : 2))
python=${PYTHON:-python3} total=${TOTAL:-530}
mkdir -p "$out" && rm -f "$out"/{speed,compiled}.md "$out"/{tests,log}.txt
exec 2>>"$out/log.txt"
export PYTHONUNBUFFERED=1 KINETO_LOG_LEVEL=99 # the profiler's messages

part() { # SECONDS of 530, FILE for the output, COMMAND ...
    local limit=$(($1 * total / 530)) left=$((total - SECONDS)) file=$2 begin=$SECONDS code=0
    limit=$((limit < left ? limit : left))
    limit=$((limit > 1 ? limit : 1))
    shift 2
    timeout --kill-after=3 $limit "$@" >>"$out/$file" || code=$?
    echo "$((SECONDS - begin)) of $limit s, exit code $code: $*" | tee -a "$out/log.txt"
}

"$python" - <<'END' | tee -a "$out/log.txt"
from importlib.util import find_spec
names = "torch torchvision numpy PIL tqdm matplotlib jinja2 pytest sklearn torchmetrics onnx onnxscript onnxruntime"
print("missing packages:", *[name for name in names.split() if not find_spec(name)] or ["none"])
END
if [ -z "$data" ]; then
    data=$(mktemp -d)/VOCdevkit/Toy
    part 40 log.txt "$python" download.py --toy --out "${data%/VOCdevkit/Toy}"
fi

measure() { # EXPERIMENT, SECONDS for speed.md and for compiled.md
    local speed=("$python" benchmarks/speed.py --data "$data" --experiments "$1" ${BEFORE:+--before "$BEFORE"})
    part "$2" speed.md "${speed[@]}" --workers 0 4 "$(nproc)" --seconds $(($2 / 3)) "${flags[@]}"
    part "$3" compiled.md "${speed[@]}" --compile --workers "${flags[@]}"
}

flags=("$@")
measure train 65 55
part 60 tests.txt "$python" -m pytest -m cuda --continue-on-collection-errors -p no:cacheprovider
measure train_5_a 75 55
measure train_6 100 200 # what is left
