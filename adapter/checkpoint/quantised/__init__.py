"""Published quantised checkpoints: config.json's quantization_config -> how the files hold the weights of layers.

form.py says what a form is; awq.py, gptq.py and fp8.py are the forms. Weights are decoded as they are read: ranks hold
them in the model's dtype. adapter/checkpoint/plain.py decodes whole tensors a second way, for those who check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from adapter.checkpoint.quantised.awq import Awq
from adapter.checkpoint.quantised.form import Form, stated
from adapter.checkpoint.quantised.fp8 import Fp8
from adapter.checkpoint.quantised.gptq import Gptq
from policies.errors import UserError

__all__ = ["Awq", "Form", "Fp8", "Gptq", "form_of"]

FORMS: Mapping[str, Callable[[Mapping[str, Any]], Form]] = {"awq": Awq.of, "gptq": Gptq.of, "fp8": Fp8.of}
REFUSED = {  # quant_method -> what it is
    "compressed-tensors": "llm-compressor's format, which has scales by channel, tensor or group under other names",
    "bitsandbytes": "codes of bitsandbytes, which its own kernels unpack",
    "modelopt": "ModelOpt's FP8 or NVFP4, with scales in two levels",
    "nvfp4": "4-bit floats with scales in two levels",
    "mxfp4": "4-bit floats with a power of two for each 32",
    "auto-round": "AutoRound's own packing (its export as auto_gptq or auto_awq is read)",
    "intel/auto-round": "AutoRound's own packing (its export as auto_gptq or auto_awq is read)",
    "fbgemm_fp8": "FP8 with a scale for each row",
}
ADVICE = "use the model's release in AWQ (gemm), GPTQ, FP8 by blocks or bfloat16"


def form_of(config: Mapping[str, Any]) -> Form | None:
    """The form that config.json states; None where it states none. Raises UserError where it is one that is not read:
    what it is, why not, and what to do."""
    section = config.get("quantization_config") or config.get("compression_config")
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise UserError(f"config.json: quantization_config is a {type(section).__name__}, a mapping is needed")
    method = stated(section, ("quant_method",), "")
    if method in FORMS:
        try:
            return FORMS[method](section)
        except UserError as error:
            raise UserError(f"config.json: {error}") from None
    if not method and any(str(key).startswith(("load_in_", "bnb_", "_load_in_")) for key in section):
        method = "bitsandbytes"
    if not method:
        raise UserError(f"config.json: quantization_config has no quant_method, which says how to read it; {ADVICE}")
    raise UserError(f"config.json: weights quantised with {method!r} are not read: "
                    f"{REFUSED.get(method, 'no reader for it is here')}; {ADVICE}")
