"""What starts an `rlhfjax` command on other machines, waits for it, restarts it when it was
preempted, and cleans up.

    python -m launch.tpu run --name=a --zone=… --accelerator=v5litepod-16 -- rlhfjax run --config=…
    --workdir=…

These files need Python and absl alone (slurm.py also submitit), neither jax nor rlhfjax: they run
on the laptop that has the credentials. That is why they are no command of `rlhfjax`. Each takes the
command after `--`, and ends with its exit code.
"""
