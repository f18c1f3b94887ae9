#!/usr/bin/env bash
# The comparisons on Imagenette at 64 px: every run takes twenty minutes on one core, and is then measured. From the project's root:
#   DATA=FOLDER_OR_HUB_ID bash experiments/comparison/imagenette64.sh [folder of the runs]
# The runs follow one another. On a machine with more cores, start several with CORE=0, CORE=1 … and ONLY="name name".
# ONLY=none makes the tables again from the results that are there.
set -euo pipefail
runs=${1:-runs/imagenette64}
data=${DATA:-frgfm/imagenette:320px}
results=experiments/results
export OMP_NUM_THREADS=1

# three random views of an image stand in for ninety; three epochs of fine-tuning are too few for heavy augmentation
protocols=(knn linear linear-fast attentive few-shot retrieval finetune)
short=(--linear_views 3 --finetune_epochs 3 --finetune_base_learning_rate 4e-3 --finetune_mixup 0 --finetune_cutmix 0
  --finetune_randaugment 0 --finetune_erasing 0 --finetune_drop_path 0)

wanted() { [ -z "${ONLY:-}" ] || [[ " $ONLY " == *" $1 "* ]]; }

train() { # run, module or script, options
  taskset -c "${CORE:-0}" python $2 recipes/imagenette64.yaml --data "$data" --output_dir "$runs/$1" --no_probe \
    --report_to none --resume "${@:3}"
}

measure() { # run, study, options
  taskset -c "${CORE:-0}" python probe_ldae.py --model "$runs/$1" --data "$data" "${@:3}"
  python -m experiments.collect "$runs" "$results/$2.jsonl" --runs "$1"
}

encoder() { # run, baseline or no_baseline, module or script, options
  wanted "$1" || return 0
  train "$1" "${@:3}"
  measure "$1" imagenette64 "--$2" --protocols "${protocols[@]}" "${short[@]}"
}

latent() { # run, options
  wanted "$1" || return 0
  train "$1" train_ldae.py "${@:2}"
  measure "$1" latents64
}

# docs/comparison.md: l-DAE beside its baselines. One untrained ViT stands beside all ViTs.
encoder vitmae baseline "-m experiments.baselines.vit_mae"
encoder moco_v3 no_baseline "-m experiments.baselines.moco_v3" --per_device_batch_size 128 --base_learning_rate 2e-3
encoder supervised no_baseline "-m experiments.baselines.supervised" --crop random_resized
encoder pixels no_baseline train_ldae.py --tokenizer_type pixels --latent_dim 192 --latent_scaling global
encoder ldae-d16-component baseline train_ldae.py --latent_dim 16 --latent_scaling component

# docs/probes.md: every protocol on one encoder, and the linear probe with ten times the steps
if wanted ldae-d16-component; then
  measure ldae-d16-component probes64 --protocols "${protocols[@]}" "${short[@]}" --sweep
  taskset -c "${CORE:-0}" python probe_ldae.py --model "$runs/ldae-d16-component" --data "$data" --no_baseline \
    --protocols linear --linear_views 3 --linear_epochs 900 --linear_batch_size 121 \
    --output_dir "$runs/linear-900/results"
  python -m experiments.collect "$runs" "$results/probes64.jsonl" --runs linear-900
fi

# docs/defaults.md: how latents are scaled, and how many dimensions they have
latent ldae-d16-global --latent_dim 16 --latent_scaling global
latent ldae-d16-none --latent_dim 16 --latent_scaling none
latent ldae-d08-component --latent_dim 8 --latent_scaling component
latent ldae-d32-component --latent_dim 32 --latent_scaling component

python -m experiments.comparison.tables "$results/imagenette64.jsonl" --write docs/comparison.md \
  --protocols knn linear linear-fast attentive finetune
python -m experiments.comparison.tables "$results/probes64.jsonl" --write docs/probes.md --details
python -m experiments.comparison.tables "$results/latents64.jsonl" --write docs/defaults.md
