"""The constants that separate random streams, all of them: a changed value changes every run.

A run has one seed. A stage draws with `fold_in(key(seed), step)`, and splits that key further.
Two numbers that are folded into the same key must differ; so must `fold_in(key, n)` and
`split(key)[n]`, which are equal for threefry keys.
"""

# Folded into the key of an iteration. The rollout is sampled with the iteration's key itself.
UPDATE = 1  # the order of episodes in each epoch, and dropout
FIRST_ROLLOUT = 2  # one_step_off: iteration 0 samples its own rollout and the next one

# Folded into key(seed), plus the number of the held-out batch. Training steps are below 2**31.
HELD_OUT = 2**31

# Folded into the key that initializes a stage's parameters.
VALUE_INIT = 1

# Folded into a layer's key, which is also split in two for dropout in attention and blocks.
LORA_DROPOUT = 2

# Added to a stage's seed, which seeds the order of its data.
PRETRAINING_MIX = 1  # ppo.ptx: the documents beside an iteration's prompts
PER_DATA_STREAM = 104729  # times the index of the data stream: shuffling of packed rows
PER_SOURCE = 7919  # times the index of the source: shuffling of its examples

# The seed of draw n of the stage `critique` is seed * PER_CRITIQUE_SEED + n.
PER_CRITIQUE_SEED = 1_000_003

# The seed of draw n of the stage `synthesize` is seed * PER_SYNTHESIS_SEED + n * batch_size.
PER_SYNTHESIS_SEED = 1_000_033
