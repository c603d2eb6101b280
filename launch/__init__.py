"""Starts an `rlhfjax` command on other machines, waits for it, restarts it, and cleans up.

    python -m launch.tpu run --name=a --zone=… --accelerator=v5litepod-16 -- \\
        rlhfjax run --config=… --workdir=…

These programs run on the laptop that has the credentials. They need Python and absl only (slurm.py
also submitit), neither jax nor rlhfjax, and are therefore no commands of `rlhfjax`. Each takes the
command after `--` and exits with the command's exit code.
"""
