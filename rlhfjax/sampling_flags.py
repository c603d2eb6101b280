"""Defines the flags of commands that sample responses."""

from absl import flags

Flags = flags.FlagValues
OWN = "default: that of the model's generation_config.json, else "


def sampling(fv: Flags, longest: str) -> None:
    """Defines how responses are sampled.

    Args:
      longest: what stands after "longest response, in tokens; ".
    """
    flags.DEFINE_float(
        "temperature",
        None,
        f"0 is greedy; {OWN}0.7, and 0.2 for models from elsewhere",
        0.0,
        1e4,
        flag_values=fv,
    )
    flags.DEFINE_float(
        "top_p",
        None,
        f"keep the most likely tokens up to this probability, 1 is off; {OWN}0.9, "
        "and 0.5 for models from elsewhere",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "top_k", None, f"keep the k most likely tokens; {OWN}0 (off)", flag_values=fv
    )
    flags.DEFINE_float(
        "min_p",
        None,
        "keep tokens at least this many times as likely as the likeliest; "
        f"{OWN}0 (off)",
        flag_values=fv,
    )
    flags.DEFINE_multi_string(
        "stop",
        [],
        f"text that ends a response, before it; several may be given; {OWN}none",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "max_new_tokens",
        None,
        f"longest response, in tokens; {longest}",
        1,
        2**24,
        flag_values=fv,
    )


def int8(fv: Flags) -> None:
    flags.DEFINE_bool(
        "int8",
        None,
        "keep weights and cache in int8, or neither; default: the weights of a large dense model "
        "on a CPU",
        flag_values=fv,
    )
