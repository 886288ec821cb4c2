#!/usr/bin/env bash
# From nothing to a trained, exported, inspectable model: sets up .venv, then runs the whole pipeline on a demo corpus
# that is made from the Python installation itself. Start it again to continue where it stopped; remove demo/ to redo it.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
demo=${DEMO_DIR:-demo}
started=$SECONDS

step() { printf '\n== %s\n' "$*"; }

step "1/6 raw text: prose and code from the Python installation, in the published formats"
tinyllama-ds demo-data "$demo/raw"

step "2/6 tokenizer: sentencepiece with Llama's settings"
if [[ ! -f $demo/tokenizer.model ]]; then
  tinyllama-ds train-tokenizer --input "$demo/raw/slimpajama" "$demo/raw/starcoderdata" --vocab-size 2048 \
    --output "$demo/tokenizer.model"
fi

step "3/6 token shards"
for source in slimpajama starcoderdata; do
  tinyllama-ds prepare --source "$source" --input "$demo/raw/$source" --tokenizer "$demo/tokenizer.model" \
    --output "$demo/data"
done

step "4/6 pretraining: DeepSpeed ZeRO-3 under the deepspeed launcher"
tinyllama-ds pretrain --recipe demo --deepspeed-config demo_zero3 --data "$demo/data" --run-dir "$demo/run"

step "5/6 export to Hugging Face, verified identical"
if [[ ! -d $demo/hf ]]; then
  tinyllama-ds export "$demo/run" "$demo/hf"
fi

step "6/6 sample generation"
prompt='def load_model(path):
    """'
printf -- '--- %s\n%s\n---\n' "continuation from the Hugging Face folder" \
  "$(tinyllama-ds generate "$demo/hf" "$prompt" --max-new-tokens 80)"

step "done in $((SECONDS - started)) s"
tinyllama-ds report "$demo/run" | grep -E 'Validation/Loss|^Finished'
echo "report:              $root/$demo/run/report.html"
echo "Hugging Face folder: $root/$demo/hf"
echo "watch the curves:    $venv/bin/tensorboard --logdir $root/$demo/run/tensorboard"
