"""Loads a model to be calibrated: its language model, in plain numbers, with every weight of its experts and routers.

Multimodal models are loaded whole and give their text decoder, since the tower that reads images or sound has no experts that
are re-routed. Quantised checkpoints are dequantised where transformers can; similarity is of the weights' values, whatever
form they are kept in.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from sere_ext.contract.errors import UnsupportedError, UsageError

_OF_EXPERTS = re.compile(r"expert|router|\.gate\.")
_MESSAGE = 400  # characters of another library's message that are shown
# How a quantisation's settings of transformers ask for plain numbers, by the name of the option.
_PLAIN = {"dequantize": True, "run_compressed": False}


def load(model: str, revision: str | None, device: str, trust: bool) -> tuple[Any, Any]:
    """The tokenizer and the language model, in evaluation mode on the device.

    Args:
        device: a torch device, such as `cpu` or `cuda:1`.
        trust: run Python code that comes with the model.

    Raises:
        UsageError: the device cannot be used here, or the model cannot be loaded; one sentence.
        UnsupportedError: a form of quantisation that cannot be undone here.
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer

    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UsageError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}; use cpu") from error
    method = None
    try:
        # Said explicitly, since transformers asks on standard input where it is left open.
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust)
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust)
        method = ask_for_plain_numbers(model, config)
        network, loaded = _class_of(config).from_pretrained(
            model, config=config, revision=revision, dtype="auto", trust_remote_code=trust, output_loading_info=True
        )
    except UnsupportedError:
        raise
    except Exception as error:  # damaged files raise whatever their reader does
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        first = (lines or [type(error).__name__])[0]
        if method is not None and isinstance(error, ImportError):
            raise _needs_twin(model, f"is quantised by {method}, and what undoes that is missing ({first[:_MESSAGE]})") from error
        advice = "; add --trust-remote-code if you trust its code" if "trust_remote_code" in str(error) and not trust else ""
        raise UsageError(f"cannot load the model {model}: {first[:_MESSAGE]}{advice}") from error
    check_loaded(model, loaded)
    return tokenizer, language_model(network).eval().to(place)


def ask_for_plain_numbers(model: str, config: Any) -> str | None:
    """Set a configuration of transformers so that quantised weights are loaded dequantised. Returns the method's name, if any.

    Raises:
        UnsupportedError: transformers does not know the method, or cannot undo it.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    holder = next((c for c in (config, config.get_text_config()) if getattr(c, "quantization_config", None)), None)
    if holder is None:
        return None
    given = holder.quantization_config
    settings: dict[str, Any] = dict(given) if isinstance(given, dict) else given.to_dict()
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))
    known = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    options = inspect.signature(known.__init__).parameters if known is not None else {}
    option = next((name for name in _PLAIN if name in options), None)
    if option is None:
        raise _needs_twin(model, f"is quantised by {method}, which transformers cannot undo")
    holder.quantization_config = {**settings, option: _PLAIN[option]}
    return method


def _needs_twin(model: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{model} {why}; run `sere calibrate` on the unquantised model that it was made from, whose file fits this one too "
        "(--similarity FILE of `sere tune`)"
    )


def _class_of(config: Any) -> Any:
    """The class of transformers that loads a model: of multimodal ones the whole, as its checkpoint names its weights."""
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
    from transformers.models.auto import modeling_auto

    name = "MultimodalLM" if hasattr(transformers, "AutoModelForMultimodalLM") else "ImageTextToText"  # before transformers 5
    multimodal = getattr(transformers, f"AutoModelFor{name}")
    mapping = (
        getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING", None) or modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    )
    nested = config.get_text_config() is not config
    if type(config) in mapping and (nested or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING):
        return multimodal
    return AutoModelForCausalLM


def language_model(network: Any) -> Any:
    """The part of a model that reads text tokens: of a multimodal one its text decoder, of any other one the model itself."""
    network = getattr(network, "thinker", network)  # of models that also speak, the part that writes text
    if network.config.get_text_config() is network.config or not hasattr(network, "get_decoder"):
        return network
    return network.get_decoder()


def check_loaded(model: str, loaded: dict[str, Any]) -> None:
    """Raise UsageError if weights of experts or routers were left out or made up, which transformers only logs.

    Args:
        loaded: what transformers says of the loading: `missing_keys`, `unexpected_keys` and `mismatched_keys`.
    """
    keys = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in loaded.get(kind) or ()]
    names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
    wrong = [name for name in names if _OF_EXPERTS.search(name)]
    if wrong:
        raise UsageError(
            f"cannot calibrate {model}: {len(wrong)} weights of experts or routers are not those that transformers loads (first "
            f"{wrong[0]}), as in a form of quantisation that it does not know; calibrate the unquantised model, whose artefact fits "
            "this one too"
        )
