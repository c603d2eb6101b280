"""Functions for a pool's processes, in a module that imports nothing."""

import os


def add(state, task):
    return state + task


def exit_at_once(state, task):
    os._exit(3)
