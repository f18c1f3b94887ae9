#!/usr/bin/env bash
# l-DAE beside MAE for equal processor time on Tiny-ImageNet at 64 px, one thread each. From the project's root:
#   DATA=FOLDER_OR_HUB_ID TRANSFER=FOLDER_OR_HUB_ID SEED=0 bash experiments/comparison/tiny_imagenet64.sh [folder of the runs]
# MINUTES=60 is another study, with a folder, results and a table of its own; so is PRECISION=bf16, for processors with AMX.
# All runs of a seed belong on one machine, since a minute is worth more on a faster one. They follow one another; where other
# cores are free, start several with ONLY="name name". A run that is done is not made again, and one that was stopped goes on.
set -euo pipefail
seed=${SEED:-0} data=${DATA:-zh-plus/tiny-imagenet} transfer=${TRANSFER:-frgfm/imagenette:320px}
minutes=${MINUTES:-15} precision=${PRECISION:-no} study=tiny-imagenet64
[ "$minutes" = 15 ] || study+=-${minutes}min
[ "$precision" = no ] || study+=-$precision
runs=${1:-runs/$study} results=experiments/results/$study.jsonl
export OMP_NUM_THREADS=1

wanted() { [ -z "${ONLY:-}" ] || [[ " $ONLY " == *" $1 "* ]]; }

probe() { # name, options
  python probe_ldae.py --model "$runs/$1-seed$seed" --mixed_precision "$precision" --features_cache none "${@:2}"
}

run() { # name, module or script, options
  wanted "$1" || return 0
  local name=$1-seed$seed images
  python $2 recipes/tiny-imagenet64.yaml --data "$data" --output_dir "$runs/$name" --max_minutes "$minutes" --seed "$seed" \
    --mixed_precision "$precision" --no_probe --report_to none --resume "${@:3}"
  for images in "$data" "$transfer"; do
    probe "$1" --data "$images" --protocols knn knn-whitened linear-fast ${BASELINE:---no_baseline}
  done
  python -m experiments.collect "$runs" "$results" --runs "$name"
}

finetune() { # name, as in imagenette64.sh
  wanted "$1" || return 0
  probe "$1" --data "$transfer" --protocols finetune --no_baseline --finetune_epochs 3 --finetune_base_learning_rate 4e-3 \
    --finetune_mixup 0 --finetune_cutmix 0 --finetune_randaugment 0 --finetune_erasing 0 --finetune_drop_path 0
  python -m experiments.collect "$runs" "$results" --runs "$1-seed$seed"
}

ldae() { run "$1" train_ldae.py "${@:2}"; }
mae() { run "$1" "-m experiments.baselines.vit_mae" --adam_beta2 0.95 --weight_decay 0.05 "${@:2}"; }

whitened=(--latent_scaling component --loss_units latent) # noise and loss in units of each component's deviation
raw=(--latent_scaling global --loss_units image)          # equation 4
clean=(--noise_schedule single_sigma --sigma_single 0)    # the control: dropped tokens alone

# the methods
mae mae
ldae ldae-paper "${raw[@]}"
ldae ldae-keep50-whitened "${whitened[@]}" --keep_ratio 0.5
# MAE's own choices
mae mae-lr2e-3 --base_learning_rate 2e-3
mae mae-lr8e-3 --base_learning_rate 8e-3
mae mae-decoder1 --decoder_num_hidden_layers 1
mae mae-decoder4 --decoder_num_hidden_layers 4
mae mae-decoder1-mask85 --decoder_num_hidden_layers 1 --keep_ratio 0.15
mae mae-decoder1-mask85-lr2e-3 --decoder_num_hidden_layers 1 --keep_ratio 0.15 --base_learning_rate 2e-3
# what l-DAE's lead is made of: tokens kept, units of the loss, noise
ldae ldae-keep50-whitened-clean "${whitened[@]}" --keep_ratio 0.5 "${clean[@]}"
ldae ldae-keep50-whitened-decoder1 "${whitened[@]}" --keep_ratio 0.5 --decoder_num_hidden_layers 1
ldae ldae-whitened "${whitened[@]}"
ldae ldae-keep50 "${raw[@]}" --keep_ratio 0.5
ldae ldae-keep25-whitened "${whitened[@]}" --keep_ratio 0.25
ldae ldae-keep25-whitened-decoder1 "${whitened[@]}" --keep_ratio 0.25 --decoder_num_hidden_layers 1
ldae ldae-keep25-whitened-decoder1-sigma0.7 "${whitened[@]}" --keep_ratio 0.25 --decoder_num_hidden_layers 1 --sigma_max 0.7
ldae ldae-keep25 "${raw[@]}" --keep_ratio 0.25
# what the encoder sees of a patch
ldae ldae-keep25-whitened-decoder1-d32 "${whitened[@]}" --keep_ratio 0.25 --decoder_num_hidden_layers 1 --latent_dim 32
ldae ldae-keep25-whitened-decoder1-d64 "${whitened[@]}" --keep_ratio 0.25 --decoder_num_hidden_layers 1 --latent_dim 64

# the finalists, fine-tuned on the data on which nothing was trained
finetune mae-decoder1
finetune mae-decoder1-mask85
finetune mae-decoder1-mask85-lr2e-3
finetune ldae-keep50-whitened-decoder1
finetune ldae-keep25-whitened-decoder1
finetune ldae-keep25-whitened-decoder1-d32
finetune ldae-keep25-whitened-decoder1-d64

python -m experiments.comparison.paired "$results" --reference "${REFERENCE:-mae-decoder1}" \
  ${WITHOUT:+--without $WITHOUT} --write docs/comparison.md
