"""Every kind of stage that trains or samples, as short as can be: what several processes run as
one.

`tests/tiny_hosts.py:data=DIR` with DIR as for `tests/tiny.py`; with
`only=pretrain,tokenizer=FOLDER` that stage alone; with `shards=S` streams for the data of some
stages, so that a host makes its own rows alone.
"""

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.stages import stage_config
from tests import tiny

STAGES = ("tokenizer", "pretrain", "sft", "collect", "reward", "ppo", "group", "direct")
LOOP = {
    "eval_every": 0,
    "checkpoint": {"every": 0},
    "log": {"every": 1, "tensorboard": False},
}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, data="", steps=2, only="", tokenizer="", shards=1)
    config = tiny.get_config(f"data={arg.data},steps={arg.steps}")
    del config.evaluate
    loop = {"steps": arg.steps, "optim": tiny.OPTIM, **LOOP}
    for name in ("pretrain", "sft", "reward", "ppo"):
        config[name].update(LOOP)
    config.ppo.update(
        {"gold": "", "ptx": {"coefficient": 0.0}, "ema": 0.0, "epochs": 1}
    )
    prompts = {"prompts": config.ppo.prompts, "eval_prompts": config.ppo.eval_prompts}
    config.group = stage_config(
        "group",
        init_from="stage:sft",
        reward="gold:sentiment",
        batch_size=8,
        samples_per_prompt=2,
        **prompts,
        **loop,
        **tiny.SAMPLING,
    )
    config.direct = stage_config(
        "direct",
        init_from="stage:sft",
        preferences=("stage:collect/preferences",),
        length=32,
        batch_size=8,
        **loop,
    )
    for name in (
        "pretrain",
        "reward",
        "direct",
    ):  # sft has one stream, of which every host makes all
        config[name].data_shards = arg.shards
    config.stages = STAGES
    if arg.only:
        config[arg.only].tokenizer = arg.tokenizer
        return config[arg.only]
    return config
