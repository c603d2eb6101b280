"""Bad input for every reader: any bytes give a value or one of our errors, soon and in little room.

    pytest -n0 -m fuzz tests/fuzz                   every reader for about a second, always alike
    RLHFJAX_FUZZ_SECONDS=3600 pytest -n0 -m fuzz tests/fuzz    an hour over all readers, at random
    python -m tests.fuzz [READER...] [--seconds=60] prints what it finds, the smallest input of each
    python -m tests.fuzz READER --input=FILE        one input; without a finding prints the outcome

`readers` is the table of readers, `inputs` makes bytes from good ones, `watch` judges one call, and
`explore` gives a reader a separate process. `found/READER/` has inputs that once failed; the
default tests try them again.
"""
