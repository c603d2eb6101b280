"""An engine that serves many requests at a time from one model.

`engine.Engine` takes requests (`requests.Request`) from any thread and emits their tokens from its
own. It imports no web library.
"""
