"""Rules that behave and rules that do not, imported by name in worker processes."""

import os
import time


def words(prompt, response, metadata):
    return len(response.split()) + metadata.get("bonus", 0.0)


def misbehave(prompt, response, metadata):
    if response == "raise":
        raise ValueError("no\nnumber  here")
    if response == "hang":
        time.sleep(3600)
    if response == "die":
        os._exit(3)
    if response == "leave":
        raise SystemExit(1)
    if response == "sleep":
        time.sleep(0.4)
    return {
        "nan": float("nan"),
        "none": None,
        "zero": 0.0,
        "half": 0.5,
        "true": True,
    }.get(response, 1.0)


NOT_A_FUNCTION = 3


def letters(prompt, response, metadata):
    return float(response.count("o"))


def where_tea(prompt, response, metadata):
    return float("tea" in prompt)
