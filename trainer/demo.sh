#!/bin/bash
# Fine-tune the small real model on the bundled seed tasks: two processes under torchrun, killed
# once, resumed, exported, asked. About four minutes on two CPU cores. The environment's Python must
# come first on PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-runs/train-demo}
model=${WOOLMILL_DEMO_MODEL:-$(woolmill models fetch smollm2)}
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

train() {
  torchrun --nproc_per_node 2 --log_dir "$out/torchrun" -m trainer \
    --model_name_or_path "$model" --data_path engine/data/seed_tasks.jsonl --output_dir "$out" \
    --max_steps 24 --global_batch_size 4 --per_device_train_batch_size 1 --model_max_length 384 \
    --learning_rate 5e-5 --warmup_ratio 0.1 --logging_steps 1 --save_steps 8 --save_total_limit 1 \
    --eval_split_ratio 0.1 --eval_on_start True --eval_strategy steps --eval_steps 12 \
    --fsdp "full_shard auto_wrap" "$@"
}

rm -rf "$out"
mkdir -p "$out"
echo "== train, and kill every process without warning after step 12"
WOOLMILL_FAILPOINT=train.step:12:kill train > "$out/cut.log" 2>&1 || true
grep -E '^(step|Llama|the first|[0-9]+ records)' "$out/cut.log"
test -f "$out/checkpoint-8/manifest.json"

echo "== resume from the checkpoint of step 8"
train --resume True

echo "== what it learned"
python - "$out" << 'PYTHON'
import json, sys

rows = [json.loads(line) for line in open(f"{sys.argv[1]}/metrics.jsonl")]
steps = [row["step"] for row in rows if "loss" in row]
assert steps == list(range(1, 25)), steps
held_out = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
before, after = held_out[0], held_out[24]
print(f"held-out loss {before:.4f} -> {after:.4f}, {1 - after / before:.1%} lower; 24 steps, each once")
assert after < 0.95 * before, "the held-out loss should fall by 5 % at least"
PYTHON

echo "== what it answers"
python -m trainer.sample --model "$out"
