"""What other trainers call things: flags that people have in their scripts.

A flag is taken under another name; taken where its value says what happens here anyway; taken with
a line that it has no effect; or refused with the remedy. Nothing is ignored in silence.
"""

from __future__ import annotations

__all__ = ["NO_EFFECT", "ONLY", "REFUSED", "SPELLINGS"]

SPELLINGS: dict[str, tuple[str, ...]] = {
    "chat_template": ("chat_template_path",),
    "data_path": ("dataset_name", "dataset_name_or_path", "dataset", "train_file", "data_files"),
    "eval_data_path": ("validation_file", "eval_dataset", "eval_file"),
    "eval_strategy": ("evaluation_strategy",),
    "fsdp_transformer_layer_cls_to_wrap": ("transformer_layer_cls_to_wrap",),
    "lora_r": ("lora_rank",),
    "lora_target_modules": ("lora_target",),
    "model_max_length": ("max_length", "max_seq_length", "max_seq_len", "cutoff_len"),
    "model_name_or_path": ("model_name", "base_model"),
    "overwrite": ("overwrite_output_dir",),
    "per_device_eval_batch_size": ("per_gpu_eval_batch_size",),
    "per_device_train_batch_size": ("per_gpu_train_batch_size", "micro_batch_size"),
    "resume": ("resume_from_checkpoint",),
    "timeout_s": ("ddp_timeout",),
}
"""Names that Hugging Face's Trainer, TRL and others have, or had, for a setting."""

_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")
"""What a switch may be written as, in lower case."""

ONLY: dict[str, tuple[tuple[str, ...], str]] = {
    "assistant_only_loss": (
        _TRUE,
        "only the assistant's turns are learned; to learn all of a text, give it as text",
    ),
    "auto_find_batch_size": (_FALSE, "set --per_device_train_batch_size"),
    "average_tokens_across_devices": (_TRUE, "for Alpaca's mean of means: --loss_norm microbatch"),
    "completion_only_loss": (
        _TRUE,
        "only completions are learned; to learn the prompt too, give both as text",
    ),
    "dataloader_drop_last": (_FALSE, "every record is trained on"),
    "dataset_text_field": (("text",), "use --column_mapping YOURS=text"),
    "dataset_train_split": (("train",), "name the files of the split with --data_path"),
    "do_predict": (_FALSE, "ask the finished model with python -m trainer.sample"),
    "do_train": (_TRUE, "this command trains"),
    "finetuning_type": (("full", "lora"), "give --lora_r for LoRA, nothing for the whole model"),
    "fp16": (_FALSE, "float16 loses small gradients; use --bf16 True"),
    "fp16_full_eval": (_FALSE, "use --bf16 True"),
    "group_by_length": (_FALSE, "packing leaves no padding to save"),
    "half_precision_backend": (("auto",), "use --bf16 True"),
    "label_smoothing_factor": (("0", "0.0"), "the loss is the plain cross-entropy"),
    "load_best_model_at_end": (
        _FALSE,
        "compare eval_loss in metrics.jsonl and raise --save_total_limit",
    ),
    "load_in_4bit": (_FALSE, "weights are not quantised here; use --lora_r with --bf16 True"),
    "load_in_8bit": (_FALSE, "weights are not quantised here; use --lora_r with --bf16 True"),
    "logging_strategy": (("steps",), "metrics.jsonl has every step; --logging_steps prints"),
    "lora_bias": (("none",), "adapters learn no biases"),
    "lora_task_type": (("causal_lm",), "this trainer learns causal language models"),
    "model_revision": (("main",), "download the revision and name its folder"),
    "predict_with_generate": (_FALSE, "ask the finished model with python -m trainer.sample"),
    "push_to_hub": (_FALSE, "upload the finished folder with hf upload"),
    "save_only_model": (_FALSE, "checkpoints hold what a resumed run needs"),
    "save_safetensors": (_TRUE, "nothing is ever written as a pickle"),
    "stage": (("sft",), "this trainer learns answers"),
    "torch_compile": (_FALSE, "the model is not compiled here"),
    "train_on_inputs": (_FALSE, "prompts are not learned; to learn all of a text, give it as text"),
    "trust_remote_code": (_FALSE, "code from a model folder is never run"),
    "use_cpu": (_FALSE, "use --device cpu"),
    "use_dora": (_FALSE, "adapters are plain LoRA"),
    "use_liger_kernel": (_FALSE, "the loss is computed in chunks without it"),
    "use_rslora": (_FALSE, "adapters are plain LoRA; set --lora_alpha"),
}
"""Flags that are taken with these values alone, which say what happens here anyway; else the
remedy."""

NO_EFFECT: dict[str, str] = {
    "attn_implementation": "attention is chosen by device",
    "dataloader_num_workers": "rows are mapped from disk",
    "dataloader_persistent_workers": "rows are mapped from disk",
    "dataloader_pin_memory": "rows are mapped from disk",
    "dataloader_prefetch_factor": "rows are mapped from disk",
    "dataset_num_proc": "records are tokenised in batches by all cores",
    "ddp_backend": "gloo on CPUs, nccl on GPUs",
    "ddp_find_unused_parameters": "FSDP2 has no such search",
    "disable_tqdm": "there is no progress bar",
    "do_eval": "held-out records are evaluated as --eval_strategy says",
    "eval_accumulation_steps": "no logits are kept",
    "eval_packing": "held-out records are packed as the others",
    "gradient_checkpointing_kwargs": "checkpointing is never reentrant",
    "include_num_input_tokens_seen": "metrics.jsonl has the tokens of each step",
    "include_tokens_per_second": "metrics.jsonl has them",
    "log_level": "a run says a few lines",
    "log_on_each_node": "rank 0 speaks",
    "logging_first_step": "metrics.jsonl has every step",
    "logging_nan_inf_filter": "metrics.jsonl has every step",
    "packing_strategy": "rows are packed inside each global batch",
    "padding_free": "packed rows have no padding",
    "prediction_loss_only": "evaluation computes the loss alone",
    "preprocessing_num_workers": "records are tokenised in batches by all cores",
    "remove_unused_columns": "columns that would be lost are refused by name",
    "save_on_each_node": "all hosts write into one folder",
    "skip_memory_metrics": "peak memory is always in metrics.jsonl",
    "use_fast_tokenizer": "the tokenizer is the fast one where there is one",
}
"""Flags that are taken and change nothing; what happens instead."""

REFUSED: dict[str, str] = {
    "accelerator_config": "launch with torchrun",
    "config_name": "the configuration comes with --model_name_or_path",
    "data_seed": "one --seed orders records and draws dropout",
    "dataset_config": "name the files with --data_path",
    "deepspeed": "this trainer shards with FSDP2; use --fsdp full_shard",
    "eos_token": "set it in the tokenizer's own files",
    "eval_delay": "evaluate by --eval_strategy and --eval_steps",
    "fsdp_config": "use --fsdp and --fsdp_transformer_layer_cls_to_wrap",
    "greater_is_better": "compare eval_loss in metrics.jsonl",
    "hub_model_id": "upload the finished folder with hf upload",
    "hub_token": "set HF_TOKEN in the environment, never on a command line",
    "lr_scheduler_kwargs": "schedules here have a warmup and no other parameters",
    "max_train_samples": "give a file with fewer records, or --max_steps",
    "metric_for_best_model": "compare eval_loss in metrics.jsonl",
    "neftune_noise_alpha": "embeddings get no noise here",
    "num_epochs": "use --num_train_epochs",
    "pad_token": "packed rows need no padding token",
    "tokenizer_name": "the tokenizer comes with --model_name_or_path",
    "tokenizer_name_or_path": "the tokenizer comes with --model_name_or_path",
    "dtype": "weights that learn are float32; to compute in bfloat16 use --bf16 True",
    "torch_dtype": "weights that learn are float32; to compute in bfloat16 use --bf16 True",
    "use_peft": "give the rank of the adapters, --lora_r 16",
}
"""Flags that are refused whatever their value; the remedy."""
