"""What every HTTP server of rlhfjax shares: who may ask, how much, and how it starts and ends.

`rlhfjax serve` and `rlhfjax label` are Starlette applications that uvicorn runs; both are in the
extra `serve`. Nothing here knows what an application answers.
"""
