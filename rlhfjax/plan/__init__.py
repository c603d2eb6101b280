"""What a run will do before it runs: memory by hand and by the compiler, roofline, time. `rlhfjax plan`."""
