"""The whole recipe at its smallest, on rows that a test wrote: what the system tests run.

`tests/tiny.py:data=DIR`, or `:data=DIR,until=reward` for its beginning; DIR holds
{train,validation,test}.jsonl with conversations.
"""

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.stages import stage_config

STAGES = ("tokenizer", "pretrain", "sft", "collect", "reward", "ppo", "evaluate")
VOCAB = 320
SAMPLING = {"prompt_length": 24, "max_new_tokens": 8, "temperature": 0.9}
OPTIM = {"learning_rate": 3e-3, "warmup_steps": 2}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, data="", steps=6, until=STAGES[-1])

    def chats(split):
        return {
            "spec": f"jsonl:{arg.data}/{split}.jsonl",
            "kind": "messages",
            "split": "all",
        }

    loop = {
        "steps": arg.steps,
        "eval_every": 2,
        "checkpoint": {"every": 2, "keep_last": 2},
        "log": {"every": 1},
    }
    packed = {
        "sources": (chats("train"),),
        "eval_sources": (chats("validation"),),
        "length": 32,
        "batch_size": 8,
        "optim": OPTIM,
        **loop,
    }
    config = ConfigDict({"stages": STAGES})
    config.tokenizer = stage_config(
        "tokenizer", sources=(chats("train"),), vocab_size=VOCAB
    )
    shape = {
        "vocab_size": VOCAB,
        "d_model": 16,
        "n_layers": 1,
        "n_heads": 2,
        "d_ff": 32,
        "max_length": 32,
    }
    config.pretrain = stage_config(
        "pretrain", tokenizer="stage:tokenizer", model=shape, data_shards=4, **packed
    )
    config.sft = stage_config("sft", init_from="stage:pretrain", **packed)
    config.collect = stage_config(
        "collect",
        init_from="stage:sft",
        labeler="gold:sentiment",
        prompts={"source": chats("train"), "limit": 24},
        eval_prompts={"source": chats("validation"), "limit": 8},
        batch_size=8,
        **SAMPLING,
    )
    config.reward = stage_config(
        "reward",
        init_from="stage:sft",
        preferences=("stage:collect/preferences",),
        length=32,
        batch_size=8,
        optim=OPTIM,
        **loop,
    )
    config.ppo = stage_config(
        "ppo",
        init_from="stage:sft",
        reward="stage:reward",
        gold="gold:sentiment",
        prompts={"source": chats("train")},
        eval_prompts={"source": chats("validation"), "limit": 8},
        batch_size=16,
        epochs=2,
        minibatches=2,
        kl={"coefficient": 0.1, "target": 2.0, "horizon": 160},
        ptx={
            "coefficient": 0.5,
            "ratio": 1,
            "length": 32,
            "sources": (chats("train"),),
        },
        ema=0.9,
        optim=OPTIM,
        value_optim=OPTIM,
        **loop,
        **SAMPLING,
    )
    config.evaluate = stage_config(
        "evaluate",
        policy="stage:ppo",
        baseline="stage:sft",
        gold="gold:sentiment",
        proxy="stage:reward",
        prompts={"source": chats("test")},
        batch_size=8,
        **SAMPLING,
    )
    config.stages = STAGES[: STAGES.index(arg.until) + 1]
    for name in STAGES[len(config.stages) :]:
        del config[name]
    return config
