#!/usr/bin/env bash
# TinyLlama v1.1 rehearsed in minutes: a basic stage, from its end three variants with a ramped mixture and a cooldown, one
# of them killed in its second stage and resumed on another number of ranks under another ZeRO stage. Start it again to
# continue where it stopped; remove demo-v1.1/ to redo it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! command -v tinyllama-ds >/dev/null; then source scripts/environment.sh; fi
demo=${DEMO_DIR:-demo-v1.1}
sources=(slimpajama starcoderdata proof-pile-2 skypile)
started=$SECONDS

step() { printf '\n== %s (%d s)\n' "$*" $((SECONDS - started)); }

pretrain() { # recipe, run, DeepSpeed JSON, further arguments
  tinyllama-ds pretrain --recipe "$1" --run-dir "$demo/$2" --deepspeed-config "$3" --data "$demo/data" "${@:4}"
}

step "1/9 raw text in the published formats, from the Python installation"
tinyllama-ds demo-data "$demo/raw" --source "${sources[@]}"

step "2/9 tokenizer and token shards"
if [[ ! -f $demo/tokenizer.model ]]; then
  tinyllama-ds train-tokenizer --input "${sources[@]/#/$demo/raw/}" --vocab-size 2048 --output "$demo/tokenizer.model"
fi
for source in "${sources[@]}"; do
  tinyllama-ds prepare --source "$source" --input "$demo/raw/$source" --tokenizer "$demo/tokenizer.model" \
    --output "$demo/data"
done

step "3/9 the basic stage, and the general variant to its end"
pretrain demo-v1.1 general demo_zero3

step "4/9 Math&Code from the end of the basic stage, killed in its second stage"
math_code=(tinyllama-ds pretrain --recipe demo-v1.1-math-code --run-dir "$demo/math-code" --data "$demo/data")
is_saved() { compgen -G "$demo/math-code/checkpoints/step_*" >/dev/null; }
if ! is_saved; then
  "${math_code[@]}" --branch-from "$demo/general" --deepspeed-config demo_zero3 &
  until is_saved || ! kill -0 $!; do sleep 0.2; done
  kill -KILL $! # the supervisor; its ranks end with it
  wait $! || true
fi

step "5/9 and resumed on one rank under ZeRO-1"
"${math_code[@]}" --deepspeed-config demo_zero1 --num-gpus 1

step "6/9 Chinese from the end of the basic stage"
pretrain demo-v1.1-chinese chinese demo_zero3 --branch-from "$demo/general"

step "7/9 export to Hugging Face, verified equal"
for run in general math-code chinese; do
  if [[ ! -d $demo/hf-$run ]]; then tinyllama-ds export "$demo/$run" "$demo/hf-$run"; fi
done

step "8/9 scores on a task made of held-out text"
tinyllama-ds demo-data --tasks "$demo/raw"
for run in general math-code chinese; do
  tinyllama-ds evaluate "$demo/$run" --task-file "$demo/raw/tasks/demo_endings.yaml"
done

step "9/9 a page for each run"
for run in general math-code chinese; do
  tinyllama-ds report "$demo/$run" | tail -n 2
done
step "done"
