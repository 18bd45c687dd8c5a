"""GRPO with LoRA on DeepSpeed ZeRO-2, written by hand."""

__version__ = "0.1.0"
