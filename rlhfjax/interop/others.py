"""Why models of other families are not read."""

# The beginning of a class (Hugging Face) or architecture (GGUF), in small letters without dashes
# -> what our Transformer does not have. The first that fits counts.
_SHARED_EXPERTS = "experts that every token shares"
_LATENT = "latent attention and " + _SHARED_EXPERTS
_SHARED_NORM = "one norm for attention and MLP"
_STATES = "state-space layers"
_ENCODER = "an encoder"
_MISSING = {
    "bart": _ENCODER,
    "bert": _ENCODER,
    "bloom": "ALiBi positions",
    "cohere": _SHARED_NORM,
    "commandr": _SHARED_NORM,
    "deepseek2": _LATENT,
    "deepseekv2": _LATENT,
    "deepseekv3": _LATENT,
    "deepseek": _SHARED_EXPERTS,
    "falconh1": _STATES,
    "falconmamba": _STATES,
    "falcon": _SHARED_NORM + ", or fused groups of heads",
    "gemma3n": "embeddings of each layer and residuals of several streams",
    "gptj": _SHARED_NORM + ", and rotated pairs that are neighbors",
    "gptoss": "attention sinks and biases of experts",
    "granite": "multipliers of embeddings, residuals and logits",
    "jamba": _STATES,
    "llama4": "attention in chunks and " + _SHARED_EXPERTS,
    "mamba": _STATES,
    "mpt": "ALiBi positions",
    "optfor": "ReLU, and learned positions that begin at 2",
    "phifor": _SHARED_NORM,
    "phi2": _SHARED_NORM,
    "qwen2moe": _SHARED_EXPERTS,
    "qwen3next": "linear attention",
    "recurrentgemma": "recurrent layers",
    "roberta": _ENCODER,
    "rwfor": _SHARED_NORM + ", or fused groups of heads",
    "rwkv": "recurrent layers",
    "t5": _ENCODER,
}


def missing(name: object) -> str:
    """Returns " (it has …)": what a model of this class has and ours has not; "": not known."""
    plain = str(name).lower().replace("-", "").replace("_", "")
    for begins, part in _MISSING.items():
        if plain.startswith(begins):
            return f" (it has {part})"
    return ""
