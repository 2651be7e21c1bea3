"""Get the accuracy back: distillation into the compressed form, and LoRA beside it."""
