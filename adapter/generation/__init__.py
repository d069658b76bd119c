"""Generating tokens: prefill, KV cache, decode loop, CUDA graphs."""
