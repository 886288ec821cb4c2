#!/usr/bin/env bash
# The quickstart's model extended from 256 to 2,048 tokens of context, in minutes on two cores: a run from its weights with
# another rotation on whole documents, then perplexity by position and needles, before and after, on one page. Start it again
# to continue where it stopped; remove demo/long/ to redo it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! command -v tinyllama-ds >/dev/null; then source scripts/environment.sh; fi
demo=${DEMO_DIR:-demo}
if [[ ! -d $demo/hf ]]; then scripts/quickstart.sh; fi # the last thing that it writes
started=$SECONDS

step() { printf '\n== %s (%d s)\n' "$*" $((SECONDS - started)); }

measure() { # model, folder of its results, further arguments
  if ! compgen -G "$2/long-context.png" >/dev/null; then
    tinyllama-ds evaluate "$1" --suite long-context --data "$demo/data" "${@:3}"
  fi
}

step "1/5 texts of numbers, told again: what a model learns to copy from"
tinyllama-ds demo-data "$demo/raw" --source numbers
for kind in short in-prose; do
  tinyllama-ds prepare --source numbers --name "numbers-$kind" --subset "$kind" --input "$demo/raw/numbers" \
    --tokenizer "$demo/tokenizer.model" --output "$demo/data"
done

step "2/5 the extension: 2,048 tokens, a larger theta, whole documents, the same global batch in tokens"
tinyllama-ds pretrain --recipe demo-long --deepspeed-config demo_long --data "$demo/data" --run-dir "$demo/long" \
  --init-from "$demo/run" --num-gpus 1

step "3/5 what the model did before, up to its 512 positions, on the documents of the next step"
before=$demo/long/evaluation/before # where the report of the extended run finds it
measure "$demo/run" "$before" --document-tokens 2048 --output "$before"

step "4/5 what it does now, up to 2,048"
measure "$demo/long" "$demo/long/evaluation/step_*"

step "5/5 both on one page"
tinyllama-ds report "$demo/long" | tail -n 3
step "done"
