"""The kind of attention of each layer in a config.json: its windows, and its layers without RoPE.

`layer_types` names the kind of each layer. Where it is absent, the family's rule says which layers
have a window:
  "full"          none,
  "window"        every layer, unless sliding_window is null (Mistral, Phi-3),
  "late_window"   those from max_window_layers on, if use_sliding_window is true (Qwen2, Qwen3),
  "local_global"  all but each `period`-th (Gemma 2 and 3),
  "no_rope"       none, and some layers have no RoPE (SmolLM3).
"""

from typing import Any

from rlhfjax.interop.hf_families import Family
from rlhfjax.interop.hf_values import ConfigValues
from rlhfjax.models.config import Attention, TransformerConfig

WINDOW, FULL = "sliding_attention", "full_attention"
_KINDS: dict[str, Attention] = {WINDOW: "window", FULL: "full"}
_DEEPEST = 1024  # ranges.Depth
_EVERY = 4  # SmolLM3Config: without a list, each fourth layer has no RoPE


def read(family: Family, values: ConfigValues, n_layers: int) -> dict[str, Any]:
    """Returns the TransformerConfig fields attention_pattern and window.

    Raises:
      CheckpointError: the layers are of other kinds, or their number is not n_layers.
    """
    depth = max(0, min(n_layers, _DEEPEST))  # others are an error of n_layers
    window, types = _of_the_rule(family, values, depth)
    given = values.take("layer_types", list, types)
    for name in given:
        if not isinstance(name, str) or name not in _KINDS:
            raise values.invalid("layer_types", name, " or ".join(_KINDS))
    fixed = family.layers not in ("late_window", "local_global")
    if len(given) != depth or (fixed and given != types):
        alike = f"{n_layers} times {types[0] if types else FULL}"
        accepted = alike if fixed else f"a list of {n_layers}"
        raise values.invalid("layer_types", given, accepted)
    if WINDOW not in given:
        window = None
    elif window is None:
        raise values.invalid("layer_types", given, "none that slides without a window")
    kinds: list[Attention] = [_KINDS[name] for name in given]
    if family.layers == "no_rope":
        kinds = _without_rope(values, depth)
    return {"attention_pattern": shortest(kinds), "window": window}


def describe(family: Family, config: TransformerConfig) -> dict[str, Any]:
    """Returns what `read` reads. What the family cannot express is left out."""
    kinds = kinds_of(config)
    types = [WINDOW if kind == "window" else FULL for kind in kinds]
    if family.layers == "window":
        return {"sliding_window": config.window}
    if family.layers == "local_global":
        return {"sliding_window": config.window, "layer_types": types}
    if family.layers == "no_rope":
        return {"no_rope_layers": [int(kind != "full_no_rope") for kind in kinds]}
    if family.layers == "late_window" and WINDOW in types:
        return {
            "use_sliding_window": True,
            "sliding_window": config.window,
            "max_window_layers": types.index(WINDOW),
            "layer_types": types,
        }
    return {"use_sliding_window": False} if family.layers == "late_window" else {}


def kinds_of(config: TransformerConfig) -> list[Attention]:
    """Returns the kind of attention of each layer."""
    return [config.kind(i) for i in range(config.n_layers)]


def shortest(kinds: list[Attention]) -> tuple[Attention, ...]:
    """Returns the shortest pattern that gives these kinds when it is repeated."""
    for length in range(1, len(kinds)):
        if all(kinds[i] == kinds[i - length] for i in range(length, len(kinds))):
            return tuple(kinds[:length])
    return tuple(kinds) or ("full",)


def _of_the_rule(
    family: Family, values: ConfigValues, depth: int
) -> tuple[int | None, list[str]]:
    """Returns the window and the types of the layers by the family's rule."""
    if family.layers in ("full", "no_rope"):
        return None, [FULL] * depth
    window = values.take_or_none("sliding_window", int, family.window)
    first, period = 0, depth + 1
    if family.layers == "late_window":
        first = values.take("max_window_layers", int, 28)
        used = values.take("use_sliding_window", bool, False)
        window = window if used else None
    if family.layers == "local_global":
        keys = ("sliding_window_pattern", "_sliding_window_pattern")
        period = values.take_first(keys, int, family.period)
        if period < 1:
            raise values.invalid(keys[0], period, "a positive number of layers")
    slides = [
        window is not None and i >= first and bool((i + 1) % period)
        for i in range(depth)
    ]
    return window, [WINDOW if slide else FULL for slide in slides]


def _without_rope(values: ConfigValues, depth: int) -> list[Attention]:
    """Returns the kinds of SmolLM3's layers. In its list, a 1 is a layer with RoPE."""
    every = values.take("no_rope_layer_interval", int, _EVERY)
    if every < 1:
        raise values.invalid(
            "no_rope_layer_interval", every, "a positive number of layers"
        )
    by_interval = [int((i + 1) % every != 0) for i in range(depth)]
    rotates = values.take("no_rope_layers", list, by_interval)
    known = all(type(value) is int and value in (0, 1) for value in rotates)
    if len(rotates) != depth or not known:
        raise values.invalid("no_rope_layers", rotates, f"a list of {depth} 0 or 1")
    return ["full" if rotated else "full_no_rope" for rotated in rotates]
