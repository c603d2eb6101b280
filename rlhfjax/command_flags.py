"""Defines the flags of the commands. Their help begins in lower case and ends without a dot."""

from absl import flags

from rlhfjax import sampling_flags
from rlhfjax.sampling_flags import OWN

Flags = flags.FlagValues
MOST = 1024  # processes that a command takes
LONGEST_WAIT = 2**31 - 1  # seconds: jax takes an int32
# What stands for a flag's value in its help.
PLACEHOLDERS = {
    "adapter": "DIR",
    "cache": "DIR",
    "comparisons": "FILE",
    "compilation_cache": "DIR",
    "config": "FILE.py[:ARGS]",
    "data_dir": "DIR",
    "fits": "SIZE",
    "from": "NAME",
    "json": "FILE",
    "model": "MODEL",
    "only": "STAGE",
    "price": "MONEY",
    "reward": "MODEL",
    "reward_model": "MODEL",
    "source": "SPEC",
    "stage": "STAGE",
    "to": "DIR",
    "tokenizer": "MODEL",
    "workdir": "DIR",
}

CONFIG = (
    "experiment file; --config.a.b=VALUE overrides one of its options, which `rlhfjax options "
    "STAGE` and --print_config list"
)


def config(fv: Flags) -> None:
    flags.DEFINE_string("config", None, CONFIG, flag_values=fv)


def workdir(fv: Flags) -> None:
    flags.DEFINE_string(
        "workdir",
        None,
        "folder of the run, local or gs://…; an unfinished run in it continues",
        flag_values=fv,
    )


def helps(fv: Flags) -> None:
    flags.DEFINE_bool(
        "help", False, "show this and exit", short_name="h", flag_values=fv
    )


def print_config(fv: Flags) -> None:
    flags.DEFINE_bool(
        "print_config",
        False,
        "print the config with all its options, one override per line, and exit",
        flag_values=fv,
    )


def dry_run(fv: Flags) -> None:
    flags.DEFINE_bool(
        "dry_run",
        False,
        "print what would run, its data, models, memory and time, and exit; nothing is written",
        flag_values=fv,
    )


def compilation_cache(fv: Flags) -> None:
    flags.DEFINE_string(
        "compilation_cache",
        None,
        "folder in which compiled programs are kept for the next start; default: "
        "$JAX_COMPILATION_CACHE_DIR, else ~/.cache/rlhfjax/programs on one host; empty: none",
        flag_values=fv,
    )


def hosts(fv: Flags) -> None:
    compilation_cache(fv)
    flags.DEFINE_integer(
        "host_timeout",
        1200,
        "seconds without a heartbeat after which another host counts as lost; longer than the "
        "longest compilation",
        1,
        LONGEST_WAIT,
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "join_timeout",
        3600,
        "seconds to wait for the other hosts to start",
        1,
        LONGEST_WAIT,
        flag_values=fv,
    )


def cache(fv: Flags, default: str = "") -> None:
    flags.DEFINE_string(
        "cache",
        None,
        "folder of finished stages; one with the same config, inputs, code and hardware "
        f"is copied from it instead of computed{default}",
        flag_values=fv,
    )


def train(fv: Flags) -> None:
    print_config(fv)
    dry_run(fv)
    cache(fv)


def run(fv: Flags) -> None:
    train(fv)
    flags.DEFINE_string(
        "from",
        None,
        "run this stage and those after it again; the stages before it are kept",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "only",
        None,
        "run only this stage again; finished stages that depend on it are moved away",
        flag_values=fv,
    )


def sweep(fv: Flags) -> None:
    cache(fv, "; default: cache/ in the sweep's folder; empty: none")
    flags.DEFINE_integer(
        "parallel",
        1,
        "number of runs at a time; an accelerator has room for one",
        1,
        MOST,
        flag_values=fv,
    )
    flags.DEFINE_string(
        "launcher",
        "local",
        "local; or tpu, gke, slurm or ssh with flags of the script in launch/, such as 'slurm "
        "--gpus_per_node=8 --sbatch=exclusive' (in the repository's folder); or a command that "
        "starts a run elsewhere and waits for it, in which {name} is the run's name",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "slices_in_turn",
        0,
        "with --launcher='tpu …': number of TPUs that take the runs in turn, without queueing and "
        "installing per run",
        0,
        MOST,
        flag_values=fv,
    )
    print_config(fv)
    flags.DEFINE_bool(
        "dry_run",
        False,
        "print the commands and their total time, and exit; nothing is written",
        flag_values=fv,
    )
    flags.DEFINE_list(
        "metrics",
        [],
        "metrics on the page; default: the main ones",
        flag_values=fv,
    )


def model(fv: Flags) -> None:
    flags.DEFINE_string(
        "model",
        None,
        "a model's folder, hf:FOLDER, gguf:FILE or pip:PACKAGE",
        flag_values=fv,
    )


def adapter(fv: Flags) -> None:
    flags.DEFINE_string(
        "adapter",
        "",
        "a PEFT folder, adapter_config.json and adapter_model.safetensors, merged into the model",
        flag_values=fv,
    )


def chat(fv: Flags) -> None:
    model(fv)
    adapter(fv)
    sampling_flags.sampling(fv, f"{OWN}256, at most a quarter of the context")
    flags.DEFINE_float(
        "repetition_penalty",
        None,
        f"makes tokens that came before less likely, such as 1.1; {OWN}1 (off)",
        flag_values=fv,
    )
    system(fv)
    flags.DEFINE_integer("seed", 0, "seed of the sampler", 0, 2**32 - 2, flag_values=fv)
    sampling_flags.int8(fv)
    compilation_cache(fv)


def system(fv: Flags) -> None:
    flags.DEFINE_string(
        "system", "", "system message before the conversation", flag_values=fv
    )


def tokenize(fv: Flags) -> None:
    flags.DEFINE_multi_string(
        "model",
        [],
        "a workdir, a tokenizer's folder, hf:FOLDER, gguf:FILE or pip:PACKAGE; several may be "
        "given",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "text",
        None,
        "the text; it may also stand without --text=; default: the standard input",
        flag_values=fv,
    )
    flags.DEFINE_bool(
        "chat",
        False,
        "render the text with the chat template: a user's message, or a JSON array of messages",
        flag_values=fv,
    )
    system(fv)


def data(fv: Flags) -> None:
    flags.DEFINE_string(
        "source",
        None,
        "where rows come from, as `spec` of a source in a config: jsonl:GLOB, text:GLOB, tfds:NAME",
        flag_values=fv,
    )
    flags.DEFINE_enum(
        "kind",
        None,
        ["text", "messages", "prompt", "preferences", "unpaired", "steps"],
        "kind of the rows that a stage needs; default: that of their form",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "form",
        None,
        "form of the rows, such as alpaca or pair; default: recognized by the columns",
        flag_values=fv,
    )
    flags.DEFINE_multi_string(
        "columns",
        [],
        "--columns.NAME=COLUMN reads the source's COLUMN as our NAME; several may be given",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "split", "train", "train, validation, test, or all", flag_values=fv
    )
    flags.DEFINE_string(
        "tokenizer",
        None,
        "a workdir, a tokenizer's folder, hf:FOLDER, gguf:FILE or pip:PACKAGE; default: no lengths",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "length",
        0,
        "tokens of a training example, to see what is cut; 0: nothing",
        0,
        2**24,
        flag_values=fv,
    )
    flags.DEFINE_enum(
        "documents",
        "file",
        ["file", "paragraph", "line"],
        "what one row of a text file is",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "data_dir",
        None,
        "folder of TFDS datasets; default: TFDS's own",
        flag_values=fv,
    )
    flags.DEFINE_integer(
        "limit", 0, "number of rows to read; 0: all", 0, LONGEST_WAIT, flag_values=fv
    )


def import_model(fv: Flags) -> None:
    model(fv)
    adapter(fv)
    flags.DEFINE_string(
        "chat_template",
        "",
        "ours, chatml, llama2, llama3 or a .jinja file; default: the model's own",
        flag_values=fv,
    )


def export(fv: Flags) -> None:
    adapter(fv)
    flags.DEFINE_string(
        "to",
        None,
        "folder to write, or GGUF file, local or gs://…; it must not exist yet",
        flag_values=fv,
    )
    flags.DEFINE_enum(
        "format",
        "hf",
        ["hf", "gguf"],
        "a Hugging Face folder, or a file for llama.cpp",
        flag_values=fv,
    )
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16", "float16", "q8_0"],
        "dtype of the tensors; default: float32, and float16 for gguf; q8_0 is for gguf",
        flag_values=fv,
    )
    flags.DEFINE_bool(
        "drop_bias",
        False,
        "leave out the constant offset of a reward model",
        flag_values=fv,
    )


def options(fv: Flags) -> None:
    flags.DEFINE_string("stage", None, "stage, such as ppo", flag_values=fv)
