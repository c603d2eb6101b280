"""Defines the flags of `rlhfjax plan`."""

from absl import flags

Flags = flags.FlagValues
MOST = 1024  # slices, and compilations of a search


def define(fv: Flags) -> None:
    flags.DEFINE_string(
        "topology",
        None,
        "CHIP:SHAPE such as v5e:16x16; GPU:COUNT such as h100:64, by hand; here: this machine's "
        "devices; or search",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "slices",
        1,
        "number of slices, joined by the data center's network",
        1,
        MOST,
        flag_values=fv,
    )
    flags.DEFINE_list(
        "chips",
        ["v5e", "v5p", "v6e"],
        "chips that --topology=search considers, TPUs and GPUs; with --fits the one whose speed "
        "a card of that size has",
        flag_values=fv,
    )
    flags.DEFINE_list(
        "vary",
        ["remat", "microbatches", "mesh"],
        "what --topology=search may change; none of them changes results but by rounding",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "fits",
        None,
        "memory of one card, 16GiB, or a chip, a100-80gb: print which settings of the stage fit",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "price",
        None,
        "money per chip-hour, 2.5, or of several chips, v5e:1.2,h100:3: print what the run costs; "
        "a search ranks by it",
        flag_values=fv,
    )
    flags.DEFINE_float(
        "tokens",
        None,
        "with --model alone: training tokens, to print FLOPs and PF-days; with "
        "--topology=CHIP:COUNT and --mfu also days",
        1.0,
        1e18,
        flag_values=fv,
    )
    flags.DEFINE_float(
        "mfu",
        None,
        "with --tokens: share of the peak that training reaches, such as 0.4",
        1e-6,
        1.0,
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "compiles",
        8,
        "number of slices that --topology=search may compile for",
        1,
        MOST,
        flag_values=fv,
    )
    flags.DEFINE_string(
        "stage",
        None,
        "stage of a recipe; default: the last that trains",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "model",
        "",
        "model_config of an init_from that does not exist yet: PRESET[:field=value,...]; "
        "without --config: print its sizes and FLOPs",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "reward_model",
        "",
        "model_config of a reward that does not exist yet",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "completions",
        2,
        "completions per prompt, if the data determines it",
        2,
        2**20,
        flag_values=fv,
    )
    flags.DEFINE_list(
        "programs",
        [],
        "compile only these programs, such as update; default: all of a step",
        flag_values=fv,
    )
    flags.DEFINE_string("json", None, "file to write the plan to", flag_values=fv)
