"""Qwen-VL, tensor-parallel, under DeepSpeed. Heavy imports happen at first use, so that planning stays quick."""

from typing import Any

__all__ = ["deepspeed_kwargs", "init_inference"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from adapter import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'adapter' has no attribute {name!r}")
