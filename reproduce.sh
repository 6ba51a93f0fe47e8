#!/usr/bin/env bash
# The one entry of this paper: builds its environment, then runs, tests, checks or opens it.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'EOF'
./reproduce.sh [run] [options]   regenerate every table and figure of a profile
./reproduce.sh cut MODEL --keep 0.75 --out FOLDER [options]
                                 your own model, cut, repaired, tested and saved: see ./reproduce.sh cut --help
./reproduce.sh test [-- ...]     run the tests; what follows -- goes to pytest
./reproduce.sh check             after a run: committed tables against regenerated ones, claims against tables
./reproduce.sh lab               open the notebooks in JupyterLab
./reproduce.sh clean             delete what runs wrote to results/, and Snakemake's records; what else is there stays

options of run
  --profile NAME     a file of profiles/: tiny (seconds a notebook), laptop (default), long (nights; its sections
                     1 to 7 go to tables/long and figures/long), gpu, models (for further models)
  --only NOTEBOOK    this notebook and what it needs, for example 03_compaction, or 03
  --model NAME       a local folder, a .gguf file or a hub id; results go to results/<profile>-<model>
  --device DEVICE    cpu, cuda, cuda:1
  --data-dir FOLDER  where Amazon's files are, for 06_recommendation
  --jobs N           processor cores to use (default: all); long notebooks run one at a time
  --force            run again what is up to date
  --verbose          show what the notebooks print; else it goes to results/<profile>/logs alone
  --help             this text

Nothing but bash and Python 3.11 or newer is needed: an active conda or virtual environment that satisfies
requirements.txt is used as it is, otherwise .venv is made from it. PYTHON=/path/to/python picks another.
EOF
}

die() { echo "error: $*" >&2; exit 2; }

value_of() { [ $# -ge 2 ] && [ -n "$2" ] || die "option $1 needs a value: see ./reproduce.sh --help"; echo "$2"; }

# --- environment -----------------------------------------------------------------------------------------

# Prints the first package of the lock that an interpreter lacks; nothing if it satisfies the lock.
lacking() {
  "$1" - <<'EOF' 2>/dev/null || echo "pip"
from importlib.metadata import PackageNotFoundError, version
from pip._vendor.packaging.requirements import Requirement

for line in open("requirements.txt"):
    if not line.strip() or line.startswith("#"):
        continue
    wanted = Requirement(line)
    if wanted.marker and not wanted.marker.evaluate():
        continue
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        found = None
    if not found or not wanted.specifier.contains(found, prereleases=True):
        print(wanted.name, "is", found or "missing", "instead of", str(wanted.specifier))
        break
EOF
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

base_python() {
  local name
  for name in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
    if command -v "$name" >/dev/null && new_enough "$name"; then echo "$name"; return; fi
  done
  die "no Python 3.11 or newer (found: $(${PYTHON:-python3} --version 2>&1 | head -n 1)): install one, or set PYTHON"
}

# Sets $python: the active environment's, or that of .venv, which is made or completed if it must be.
environment() {
  local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" missing
  if [ -n "$active" ] && [ -x "$active/bin/python" ] && new_enough "$active/bin/python"; then
    missing=$(lacking "$active/bin/python")
    if [ -z "$missing" ]; then python="$active/bin/python"; return; fi
    echo "the active environment does not satisfy requirements.txt ($missing): using .venv" >&2
  fi
  python="$PWD/.venv/bin/python"
  local stamp=.venv/.complete
  if [ -f "$stamp" ] && cmp -s "$stamp" requirements.txt && [ -x "$python" ]; then return; fi
  if [ ! -x "$python" ] || ! new_enough "$python"; then
    local base; base=$(base_python)
    "$base" -m venv --clear .venv || die "$base cannot make a virtual environment: install its venv module"
  fi
  if [ -n "$(lacking "$python")" ]; then
    echo "installing the packages of requirements.txt into .venv (a few minutes, once) ..." >&2
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt >&2 ||
      die "pip could not install requirements.txt (see above): check the network and the space on disk"
  fi
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps -e . >&2 || die "pip could not install this package"
  cp requirements.txt "$stamp"
}

# --- commands --------------------------------------------------------------------------------------------

run() {
  local profile=laptop only="" model="" device="" data_dir="" jobs="" verbose="" force=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --profile) profile=$(value_of "$@"); shift 2 ;;
      --only) only=$(value_of "$@"); only=$(basename "$only" .ipynb); shift 2 ;;
      --model) model=$(value_of "$@"); shift 2 ;;
      --device) device=$(value_of "$@"); shift 2 ;;
      --data-dir) data_dir=$(value_of "$@"); shift 2 ;;
      --jobs) jobs=$(value_of "$@"); shift 2 ;;
      --force) force=(--forceall); shift ;;
      --verbose) verbose=yes; shift ;;
      *) die "unknown option $1: see ./reproduce.sh --help" ;;
    esac
  done
  [ -f "profiles/$profile.yaml" ] || die "no profile '$profile': there are $(cd profiles && echo *.yaml)"
  [ "$only" != 10_your_model ] || die "10_your_model is no part of the paper: ./reproduce.sh cut runs it"
  [[ ! "$only" =~ ^0[0-9]$ ]] || only=$(cd notebooks && basename -s .ipynb "$only"_*)  # by its number
  [ -z "$only" ] || [ -f "notebooks/$only.ipynb" ] || die "no notebook '$only': there are $(cd notebooks && echo 0*.ipynb)"
  [[ "$jobs" =~ ^([1-9][0-9]*)?$ ]] || die "--jobs '$jobs': give a number of cores, 1 or more"
  [[ "$model$device$data_dir" != *"'"* ]] || die "--model, --device and --data-dir cannot hold a quote character"
  # Paths are of the place this was called from.
  [ -z "$data_dir" ] || data_dir=$(cd "$called_from" && cd "$data_dir" 2>/dev/null && pwd) || die "--data-dir: no such folder"
  if [ -n "$model" ]; then
    local path; path=$(cd "$called_from" && [ -e "$model" ] && cd "$(dirname "$model")" && echo "$PWD/$(basename "$model")") || true
    [ -n "$path" ] || [[ ! "$model" =~ ^(/|\.|~)|\.gguf$ ]] || die "--model: no such file or folder: $model"
    model=${path:-$model}
  fi

  environment
  local results=results/$profile since target
  if [ -n "$model" ]; then results+=-$(basename "$model" | tr -c 'A-Za-z0-9._\n' '-'); fi
  mkdir -p results 2>/dev/null && : 2>/dev/null >>results/.lock || die "cannot write to $PWD/results: make it writable"
  exec 9>>results/.lock
  "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null ||
    die "another reproduce.sh is running in this folder: wait for it, or stop it"
  "$python" -m paper_src.reporting check "profiles/$profile.yaml"

  target=$results/report/index.html
  [ -z "$only" ] || target=$results/notebooks/$only.ipynb
  [ -z "$only" ] || [ ${#force[@]} -eq 0 ] || force=(--force)
  since=$("$python" -c 'import time; print(time.time())')
  local status=0
  # Files of the future, from before the clock was set back, would fail what is made of them now.
  find paper_src notebooks profiles "$results" -type f -newermt now -exec touch {} + 2>/dev/null || true
  "$python" -m snakemake "$target" --cores "${jobs:-all}" --config "profile=$profile" "results=$results" \
    ${model:+"model=$model"} ${device:+"device=$device"} ${data_dir:+"data_dir=$data_dir"} ${verbose:+"verbose=$verbose"} \
    --nolock --rerun-incomplete --quiet all ${force[@]+"${force[@]}"} || status=$?
  "$python" -m paper_src.reporting summary "$results" --since "$since"
  [ $status -eq 0 ] || return $status
  if [[ "$results" =~ ^results/(laptop|long)$ ]]; then publish "$results"; fi
}

# Copies results to the top and makes from them the page that stands there, if anything it shows is newer.
publish() {
  "$python" -m paper_src.reporting publish "$1"
  local newer; newer=$(find tables figures SUMMARY.md notebooks/*.ipynb paper_src -name __pycache__ -prune -o \
    -newer report/index.html -print -quit 2>/dev/null) || true
  [ -f report/index.html ] && [ -z "$newer" ] || "$python" -m paper_src.reporting page . report/index.html
}

check() {
  [ $# -eq 0 ] || die "check takes no options, got $1"
  environment
  [ -f results/laptop/SUMMARY.md ] || die "results/laptop is not complete: run ./reproduce.sh first"
  "$python" -m pytest -q tests/paper
}

clean() {
  [ $# -eq 0 ] || die "clean takes no options, got $1"
  local folder
  for folder in results/*/; do
    rm -rf "$folder"{tables,figures,models,notebooks,report,logs,unfinished} "$folder"SUMMARY{,.zh-CN}.md
    rmdir "$folder" 2>/dev/null || [ ! -d "$folder" ] || echo "kept: $folder holds other files" >&2
  done
  rm -rf results/.lock .snakemake
  rmdir results 2>/dev/null || true
}

# All tests run in two processes of one thread each: the notebooks in one, for they follow on one another.
tests() {
  [ $# -gt 0 ] || set -- -n 2 --dist loadfile
  OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$python" -m pytest "$@"
}

main() {
  local command=run
  case "${1:-}" in
    -h | --help | help) usage; return ;;
    run | cut | test | check | lab | clean) command=$1; shift ;;
    "" | --*) ;;
    *) die "unknown command $1: see ./reproduce.sh --help" ;;
  esac
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
  case "$command" in
    run) for word in "$@"; do [ "$word" != --help ] || { usage; return; }; done; run "$@" ;;
    cut) environment; cd "$called_from"; exec "$python" -m paper_src.cutting.notebook "$@" ;;
    test) [ "${1:-}" != -- ] || shift; environment; tests "$@" ;;
    check) check "$@" ;;
    lab) environment; exec "$python" -m jupyterlab --notebook-dir=notebooks "$@" ;;
    clean) clean "$@" ;;
  esac
}

main "$@"
