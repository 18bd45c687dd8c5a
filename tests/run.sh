#!/usr/bin/env bash
# Set up the environment as launch.sh does, and run every test that this machine can run. Arguments are passed to pytest.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
needs="dependencies test"
source "$root/environment.sh"
cd "$root"
unset PYTHONDONTWRITEBYTECODE  # many processes import the same files
export PYTHONPATH=$root OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
if [ $# -gt 0 ]; then exec "$python" -m pytest -q "$@"; fi
"$python" -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m "not soak and not alone"
exec "$python" -m pytest -q -m "alone and not soak" $(grep -l "mark.alone" tests/test_*.py)
