#!/usr/bin/env bash
# A run whose final loss is predicted before it starts, in minutes on two cores: four small models, a fit over them, the
# plan of a larger one with its predicted loss, that run, and its report with predicted next to measured. Start it again
# to continue where it stopped; remove demo-ladder/ to redo it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! command -v tinyllama-ds >/dev/null; then source scripts/environment.sh; fi
demo=${DEMO_DIR:-demo-ladder}
started=$SECONDS

step() { printf '\n== %s (%d s)\n' "$*" $((SECONDS - started)); }

step "1/5 raw text, tokenizer and token shards, as in the quickstart"
tinyllama-ds demo-data "$demo/raw"
if [[ ! -f $demo/tokenizer.model ]]; then
  tinyllama-ds train-tokenizer --input "$demo/raw/slimpajama" "$demo/raw/starcoderdata" --vocab-size 2048 \
    --output "$demo/tokenizer.model"
fi
for source in slimpajama starcoderdata; do
  tinyllama-ds prepare --source "$source" --input "$demo/raw/$source" --tokenizer "$demo/tokenizer.model" \
    --output "$demo/data"
done

step "2/5 the ladder: four sizes, each finished at three numbers of tokens"
tinyllama-ds ladder demo --data "$demo/data" --run-dir "$demo/ladder"

step "3/5 the plan of the large run, with its predicted loss"
large=(--recipe demo-ladder --deepspeed-config demo_wsd)
tinyllama-ds plan "${large[@]}" --data "$demo/data" --num-gpus 1 --ladder "$demo/ladder" --html "$demo/plan.html" |
  grep -A 6 "^Predicted"

step "4/5 the large run"
tinyllama-ds pretrain "${large[@]}" --data "$demo/data" --run-dir "$demo/run"

step "5/5 predicted next to measured"
tinyllama-ds report "$demo/run" --ladder "$demo/ladder" | grep -A 4 "^Predicted"
step "done: $demo/ladder/ladder.html, $demo/plan.html, $demo/run/report.html"
