"""Defines the flags of `rlhfjax serve`."""

from absl import flags

from rlhfjax import command_flags, sampling_flags

Flags = flags.FlagValues
MOST_LANES = 1024
TOKEN = "RLHFJAX_TOKEN"  # the environment variable of --token
DAY = 86_400.0


def define(fv: Flags) -> None:
    flags.DEFINE_multi_string(
        "model",
        [],
        "a model's folder, hf:FOLDER, gguf:FILE or pip:PACKAGE; several may be given",
        flag_values=fv,
    )
    command_flags.adapter(fv)
    _address(fv)
    _engine(fv)
    flags.DEFINE_string(
        "reward",
        "",
        "a reward model's workdir, or another reward, for /v1/score; default: the last reward "
        "model of the workdir, if it has one",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "comparisons",
        "",
        "JSON lines that votes of the page are added to; default: comparisons.jsonl in the "
        "workdir, and none without one",
        flag_values=fv,
    )
    sampling_flags.sampling(fv, "default: what there is room for")
    sampling_flags.int8(fv)
    command_flags.compilation_cache(fv)


def _address(fv: Flags) -> None:
    flags.DEFINE_string(
        "host",
        "127.0.0.1",
        "address to listen at; any but this machine's own needs a token",
        flag_values=fv,
    )
    flags.DEFINE_integer("port", 8000, "0 takes a free one", 0, 65535, flag_values=fv)
    flags.DEFINE_string(
        "token",
        "",
        f"what clients must send as API key; default: ${TOKEN}, else none",
        flag_values=fv,
    )
    flags.DEFINE_float(
        "timeout", 600.0, "seconds of the longest response", 0.1, DAY, flag_values=fv
    )
    flags.DEFINE_bool(
        "log_prompts", False, "log prompts, not their lengths alone", flag_values=fv
    )


def _engine(fv: Flags) -> None:
    flags.DEFINE_integer(
        "lanes",
        8,
        "number of responses that are decoded at a time",
        1,
        MOST_LANES,
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "length",
        None,
        "tokens of prompt and response together, at most; default: the model's context, at most "
        "2048",
        2,
        2**24,
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "queue",
        64,
        "number of requests that may wait for a lane; others are answered 429",
        1,
        2**16,
        flag_values=fv,
    )
