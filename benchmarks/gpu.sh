#!/usr/bin/env bash
# One visit to a machine with a GPU, in stages:
#   DATA=FOLDER MINUTES=5 bash benchmarks/gpu.sh OUT check step train mae probe pack
#
#   check  the tests that need a GPU
#   step   time, FLOP utilization and memory of a training step, for l-DAE, ViTMAE and DiT at base and half-large, 256 px
#   train  the recipe's run, MINUTES long; a run that was cut short goes on from its last checkpoint
#   mae    ViTMAE by the same recipe, as long, with its authors' beta2 and weight decay
#   probe  both encoders on DATA
#   pack   the l-DAE's weights, in bf16, as files of at most 15 MB in OUT
#
# Every stage has a time limit; one that fails does not keep the others from running. After each, the small files of all
# stages (logs, results, losses, cards, images) are in OUT/results.tar.gz. The exit status counts the stages that failed.
#
# DATA       images with labels (a folder, parquet files, a Hub data set), with a validation split
# MINUTES    length of each training run, 5 by default
# RECIPE     recipes/tiny-imagenet-gpu.yaml by default
# BATCH      images in a step of the runs, 1024 by default
# WORKERS    processes that read images, all cores but two by default
# OPTIONS    more options of both runs; MAE_OPTIONS, of ViTMAE's; STEP_OPTIONS, of benchmarks.step
# PROTOCOLS  what probe measures, "knn linear-fast" by default
# RUNS       the runs' folder, runs/gpu by default
# DRY=1      all of it at tiny sizes on the CPU, in place of DATA on embedded images, to see that the script works
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?the first argument is the folder for what comes back}
shift
dry=${DRY:-} runs=${RUNS:-runs/gpu} recipe=${RECIPE:-recipes/tiny-imagenet-gpu.yaml} minutes=${MINUTES:-5}
data=${DATA:-photos} batch=${BATCH:-1024} cores=$(nproc) protocols=${PROTOCOLS:-knn linear-fast}
workers=${WORKERS:-$((cores > 2 ? cores - 2 : 0))}
export PYTHONUNBUFFERED=1 TQDM_MININTERVAL=10 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export HF_HOME=${HF_HOME:-${TMPDIR:-/tmp}/ldae-hf} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out" "$runs/report"

if [ -n "$dry" ]; then
  export ACCELERATE_USE_CPU=true LDAE_TEST_DEVICE=cpu
  tests=(-m "gpu and not compile" -k "not bf16")
  patience=300 # seconds more than on a GPU: other work may share the processor
  step=(--device cpu --image_size 16 --patch_size 8 --num_hidden_layers 1 --batch_size 2 --steps 1 --warmup 0)
  sizes=(tiny)
  common=(--data photos --image_size 16 --patch_size 4 --hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2
    --decoder_num_hidden_layers 1 --latent_dim 4 --per_device_batch_size 8 --max_steps 4 --num_workers 1)
  data=photos
  workers=0
  protocols=knn
else
  tests=(-m gpu)
  python -c "import xdist" 2>/dev/null && tests+=(-n 4) # most of a test is not spent on the GPU
  patience=0
  step=(--device cuda --image_size 256 --patch_size 16 --steps 10 --warmup 3 --compile)
  sizes=(base half-large)
  common=(--data "$data" --max_minutes "$minutes" --per_device_batch_size "$batch" --num_workers "$workers"
    --mixed_precision bf16 --torch_compile)
fi
common+=(--no_probe --report_to none --knn_steps 0 --image_steps 0 --resume ${OPTIONS:-})
step+=(${STEP_OPTIONS:-})

limit() { # seconds, command: with a time limit, its output to the screen and to the stage's log
  timeout --kill-after=10 $(($1 + patience)) "${@:2}" 2>&1 | tee -a "$runs/report/$stage.log"
}

check() {
  limit 150 python -m pytest tests/gpu "${tests[@]}" --durations=5
}

step() {
  local size failed=0
  declare -A batches=([base]=256 [half-large]=128)
  for size in "${sizes[@]}"; do
    limit 150 python -m benchmarks.step --model_size "$size" --attention sdpa "${step[@]}" \
      ${batches[$size]:+--batch_size ${batches[$size]}} --output "$runs/report/step-gpu-$size.json" --overwrite || failed=1
  done
  return $failed
}

train() {
  limit "$(awk "BEGIN {print int($minutes * 60 + 150)}")" python train_ldae.py "$recipe" "${common[@]}" --output_dir "$runs/ldae"
}

mae() {
  limit "$(awk "BEGIN {print int($minutes * 60 + 150)}")" python -m experiments.baselines.vit_mae "$recipe" "${common[@]}" --output_dir "$runs/mae" \
    --adam_beta2 0.95 --weight_decay 0.05 ${MAE_OPTIONS:-}
}

probe() {
  local run failed=0
  for run in ldae mae; do
    [ -d "$runs/$run" ] || continue
    limit 150 python probe_ldae.py --model "$runs/$run" --data "$data" --protocols $protocols --num_workers "$workers" \
      --features_cache none --overwrite || failed=1
  done
  return $failed
}

pack() {
  rm -rf "$runs/weights" "$out"/*.safetensors
  limit 60 python -m benchmarks.weights "$runs/ldae" "$runs/weights" && cp "$runs"/weights/*.safetensors "$out"
}

bundle() { # everything small in one file
  (cd "$runs" && find . -type f ! -path '*/checkpoints/*' ! -name '*.safetensors' ! -name results.tmp -print0 |
    tar --null --files-from - -czf results.tmp) && mv "$runs/results.tmp" "$out/results.tar.gz"
}

summary=() failures=0
for stage in "$@"; do
  start=$SECONDS
  if [[ " check step train mae probe pack " != *" $stage "* ]]; then
    echo "there is no stage '$stage'; the stages are check, step, train, mae, probe and pack" >&2
    status=2
  else
    "$stage"
    status=$?
  fi
  [ $status -eq 0 ] || failures=$((failures + 1))
  summary+=("$(printf '%-6s %4d s  %s' "$stage" $((SECONDS - start)) "$([ $status -eq 0 ] && echo done || echo "failed, status $status")")")
  printf '%s\n' "${summary[@]}" >"$runs/report/summary.txt"
  bundle
done
printf '%s\n' "${summary[@]}"
exit $failures
