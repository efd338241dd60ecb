"""A loaded student and a quantization_config of diffusers -> the student with quantized linear layers."""

from typing import Any

from diffusers.quantizers import DiffusersAutoQuantizer


def quantize(student: Any, config: Any) -> None:
    """Quantize the linear layers of a student in place, as diffusers does while it loads one.

    Layers that Wan keeps in float32 are left out. Raises ImportError if the library of the config is missing, and
    ValueError if the config is not one of diffusers' (TorchAoConfig, BitsAndBytesConfig, QuantoConfig).
    """
    try:
        quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=False)
    except NotImplementedError as error:  # diffusers, of a library that is missing or too old
        raise ImportError(f"quantization_config: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"quantization_config is {config!r:.100}, expected a config of diffusers such as "
            "TorchAoConfig(Int8WeightOnlyConfig())."
        ) from None
    quantizer.validate_environment(torch_dtype=student.dtype, device_map=None)
    device, weights, count = student.device, student.state_dict(), 0
    quantizer.preprocess_model(
        model=student, device_map=None, keep_in_fp32_modules=[*student._keep_in_fp32_modules]
    )
    for name, weight in weights.items():
        if quantizer.check_if_quantized_param(student, weight, name, weights, param_device=device):
            quantizer.create_quantized_param(student, weight, name, device, weights, [], dtype=weight.dtype)
            count += 1
    if not count:
        raise ValueError(f"quantization_config quantizes no layer of the student: {config!r:.200}")
    quantizer.postprocess_model(student)
    student.hf_quantizer = quantizer
