#!/usr/bin/env bash
# The comparisons on Imagenette at 64 px: every run twenty minutes on one core, then measured. From the project's root:
#   DATA=FOLDER_OR_HUB_ID bash experiments/comparison/imagenette64.sh [folder of the runs]
# Runs one after the other; on a machine with more cores, start several with CORE=0, CORE=1 … and ONLY="name name".
set -euo pipefail
runs=${1:-runs/imagenette64}
data=${DATA:-frgfm/imagenette:320px}
export OMP_NUM_THREADS=1

# three random views of a image stand in for ninety; three epochs of fine-tuning are too few for heavy augmentation
protocols=(knn linear linear-fast attentive few-shot retrieval finetune)
short=(--linear_views 3 --finetune_epochs 3 --finetune_base_learning_rate 4e-3 --finetune_mixup 0 --finetune_cutmix 0
  --finetune_randaugment 0 --finetune_erasing 0 --finetune_drop_path 0)

wanted() { [ -z "${ONLY:-}" ] || [[ " $ONLY " == *" $1 "* ]]; }

train() { # run, module or script, options
  taskset -c "${CORE:-0}" python $2 recipes/imagenette64.yaml --data "$data" --output_dir "$runs/$1" --no_probe \
    --report_to none --resume "${@:3}"
}

measure() { # run, where the results go, options
  taskset -c "${CORE:-0}" python probe_ldae.py --model "$runs/$1" --data "$data" "${@:3}"
  mkdir -p "experiments/results/$2" # results files, without images and weights, are what tables are made from
  cp "$runs/$1"/results/*.json "experiments/results/$2/"
}

baseline() { # run, baseline or no_baseline, module or script, options
  wanted "$1" || return 0
  train "$1" "${@:3}"
  measure "$1" "imagenette64/$1/results" "--$2" --protocols "${protocols[@]}" "${short[@]}"
}

latent() { # run, options
  wanted "$1" || return 0
  train "$1" train_ldae.py "${@:2}"
  measure "$1" "latents64/$1/results"
}

# README: l-DAE beside its baselines. An untrained ViT is the untrained baseline of all ViTs.
baseline vitmae baseline "-m experiments.baselines.vit_mae"
baseline moco_v3 no_baseline "-m experiments.baselines.moco_v3" --per_device_batch_size 128 --base_learning_rate 2e-3
baseline supervised no_baseline "-m experiments.baselines.supervised" --crop random_resized
baseline pixels no_baseline train_ldae.py --tokenizer_type pixels --latent_dim 192 --latent_scaling global
baseline ldae-d16-component baseline train_ldae.py --latent_dim 16 --latent_scaling component

# docs/probes.md: every protocol on one encoder, and the linear probe with ten times the steps
if wanted ldae-d16-component; then
  measure ldae-d16-component probes64/all/results --protocols "${protocols[@]}" "${short[@]}" --sweep
  taskset -c "${CORE:-0}" python probe_ldae.py --model "$runs/ldae-d16-component" --data "$data" --no_baseline \
    --protocols linear --linear_views 3 --linear_epochs 900 --linear_batch_size 121 \
    --output_dir experiments/results/probes64/linear-900/results
fi

# docs/defaults.md: how latents are scaled, and how many dimensions they have
latent ldae-d16-global --latent_dim 16 --latent_scaling global
latent ldae-d16-none --latent_dim 16 --latent_scaling none
latent ldae-d08-component --latent_dim 8 --latent_scaling component
latent ldae-d32-component --latent_dim 32 --latent_scaling component

python -m ldae.report.tables experiments/results/imagenette64 --write README.md \
  --protocols knn linear linear-fast attentive finetune
python -m ldae.report.tables experiments/results/probes64 --write docs/probes.md --details
python -m ldae.report.tables experiments/results/latents64 --write docs/defaults.md
