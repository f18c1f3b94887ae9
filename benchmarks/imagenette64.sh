#!/usr/bin/env bash
# The comparison in the README: every run twenty minutes on one core, then probed. From the project's root:
#   DATA=../shared/data/imagenette bash benchmarks/imagenette64.sh [folder of the runs]
# Runs one after the other; on a machine with more cores, start several with CORE=0, CORE=1 … and ONLY="name name".
set -euo pipefail
runs=${1:-runs/imagenette64}
data=${DATA:-frgfm/imagenette}
export OMP_NUM_THREADS=1

run() { # name, module or script, options
  local name=$1 program=$2
  shift 2
  [ -z "${ONLY:-}" ] || [[ " $ONLY " == *" $name "* ]] || return 0
  taskset -c "${CORE:-0}" python $program recipes/imagenette64.yaml --data "$data" --output_dir "$runs/$name" --no_probe \
    --report_to none --resume "$@"
  taskset -c "${CORE:-0}" python probe_ldae.py --model "$runs/$name" --data "$data" --overwrite
}

run vitmae "-m benchmarks.peers.vit_mae"
run moco_v3 "-m benchmarks.peers.moco_v3" --per_device_batch_size 128 --base_learning_rate 2e-3
run supervised "-m benchmarks.peers.supervised" --crop random_resized
run pixels train_ldae.py --tokenizer_type pixels --latent_dim 192 --latent_scaling global
run ldae-d16-component train_ldae.py --latent_dim 16 --latent_scaling component
run ldae-d16-global train_ldae.py --latent_dim 16 --latent_scaling global
run ldae-d16-none train_ldae.py --latent_dim 16 --latent_scaling none
run ldae-d08-component train_ldae.py --latent_dim 8 --latent_scaling component
run ldae-d32-component train_ldae.py --latent_dim 32 --latent_scaling component

# The results files, without pictures and weights, are what the README's table is made from.
for results in "$runs"/*/results; do
  mkdir -p "benchmarks/results/imagenette64/$(basename "$(dirname "$results")")"
  cp -r "$results" "benchmarks/results/imagenette64/$(basename "$(dirname "$results")")/"
done
python -m ldae.tables benchmarks/results/imagenette64 --write README.md
