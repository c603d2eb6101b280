"""`rlhfjax chat`: reads messages and commands, prints responses.

Responses go to the standard output. Prompts are printed only in a terminal, and everything else
goes to the standard error: `rlhfjax chat … < questions > answers` writes the responses alone.
"""

import io
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rlhfjax import chat_model, json_text, paths
from rlhfjax.chat import Chat
from rlhfjax.chat_settings import (
    Options,
    choose_settings,
    shown_settings,
    validate_template,
)
from rlhfjax.data.chat import render
from rlhfjax.errors import ConfigError, UserError
from rlhfjax.interop import generation_config
from rlhfjax.paths import Path
from rlhfjax.sampling.structured import ANY_OBJECT, Form
from rlhfjax.tokenize_text import print_pieces, visible

log = logging.getLogger("rlhfjax")
TextFile = Any  # no type has both sys.stdout and a StringIO
_QUOTES = '"""'
_INTERRUPTED = 128 + signal.SIGINT
_PATIENCE = 0.5  # seconds until the user is told why a response does not stop at once


def run(
    path: str | Path,
    options: Options,
    adapter: str = "",
    *,
    inputs: TextFile | None = None,
    out: TextFile | None = None,
    notes: TextFile | None = None,
) -> None:
    """Responds to one message after the other, until the input ends.

    Args:
      path: a model's folder or workdir, or a foreign name (see `interop.foreign`).
      adapter: a PEFT folder, which is merged into the model; empty: none.
      inputs, out, notes: standard input, output and error unless given.
    Raises:
      CheckpointError: there is no model.
      ConfigError: it is a reward model, or an option is out of its range.
      DataError: it has no chat template, or one that takes no system message.
    """
    screen = Screen(inputs or sys.stdin, out or sys.stdout, notes or sys.stderr)
    start = time.monotonic()
    opened = chat_model.open_model(path, adapter, "chat")
    validate_template(opened.tokenizer, options.system)
    chosen = choose_settings(path, opened.opened, options)
    saved, notes = opened.read(options.int8)
    chat = Chat(
        saved,
        chosen.sampling,
        seed=options.seed,
        system=options.system,
        note=screen.note,
    )
    log.info("ready after %.1f s", time.monotonic() - start)
    screen.note(f"{shown_settings(chat.sampling)}; /help lists the commands")
    for text in (*notes, *chosen.notes):
        screen.note(text)
    try:
        Session(chat, screen).loop()
    except KeyboardInterrupt:
        screen.write("\n")
        sys.exit(_INTERRUPTED)


# ------------------------------------------------------------------ the screen


class Screen:
    """The terminal, or files in its place."""

    def __init__(self, inputs: TextFile, out: TextFile, notes: TextFile):
        self._inputs, self._out, self._notes = inputs, out, notes
        self.interactive = inputs is sys.stdin and inputs.isatty()
        self._line_is_open = False
        if self.interactive:
            import readline  # noqa: F401  (line editing and history)
        if isinstance(inputs, io.TextIOWrapper):
            inputs.reconfigure(errors="replace")

    def read(self) -> str | None:
        """Returns the next message, without blanks around it; None at the end of the input.

        Lines between triple quotes are one message.
        """
        line = self._read_line("> ")
        if line is None or not line.strip().startswith(_QUOTES):
            return line if line is None else line.strip()
        text = line.strip().removeprefix(_QUOTES)
        while not text.rstrip().endswith(_QUOTES):
            line = self._read_line("… ")
            if line is None:
                break
            text += "\n" + line
        return text.rstrip().removesuffix(_QUOTES).strip()

    def _read_line(self, prompt: str) -> str | None:
        if not self.interactive:
            line = self._inputs.readline()
            return line.rstrip("\n") if line else None
        try:
            return input(prompt)
        except EOFError:
            self.write("\n")
            return None

    def write(self, text: str) -> None:
        """Prints a part of a response. Control characters are spelled out."""
        print(visible(text), end="", file=self._out, flush=True)
        self._line_is_open = bool(text) and not text.endswith("\n")

    def end_line(self) -> None:
        """Ends a line that a part of a response left open."""
        if self._line_is_open:
            self.write("\n")

    def note(self, text: str) -> None:
        """Prints what is no response."""
        text = f"({visible(text)})"
        dim = self._notes.isatty()
        print(f"\x1b[2m{text}\x1b[0m" if dim else text, file=self._notes, flush=True)

    def tokens(self, chat: Chat) -> None:
        """Prints the tokens of the conversation."""
        system = [{"role": "system", "content": chat.system}] if chat.system else []
        ids = render(chat.tokenizer, [*system, *chat.messages])[0].tolist()
        print_pieces(chat.tokenizer, ids, self._notes)


# ------------------------------------------------------------------ the conversation


class Session:
    """Messages and commands, one after the other."""

    def __init__(self, chat: Chat, screen: Screen):
        self.chat, self.screen = chat, screen

    def loop(self) -> None:
        """Responds to messages until the input ends or /quit."""
        while (text := self.screen.read()) is not None:
            if text == "/quit":
                return
            try:
                if text.startswith("/"):
                    self._command(text)
                elif text:
                    self._respond(text)
            except UserError as error:
                self.screen.note(str(error))

    def _respond(self, text: str) -> None:
        worker = Worker(self.chat.respond(text))
        try:
            for piece in worker:
                self.screen.write(piece)
        except KeyboardInterrupt:
            self._stop(worker)
            if not self.screen.interactive:
                raise
        self.screen.write("\n")
        self._note_end()

    def _stop(self, worker: "Worker") -> None:
        """Waits until the response has stopped; at a second Ctrl-C, ends the process."""
        try:
            if not worker.stop(_PATIENCE):
                self.screen.end_line()
                self.screen.note(
                    "stopping after this step; Ctrl-C again leaves at once"
                )
                worker.stop()
        except KeyboardInterrupt:
            self.screen.end_line()
            # The other thread is in XLA, which an ordinary exit would wait for.
            os._exit(_INTERRUPTED)

    def _note_end(self) -> None:
        last = self.chat.last
        if last.end == "max_new_tokens":
            self.screen.note(
                f"cut at max_new_tokens={last.tokens}; /max_new_tokens N allows more"
            )
        elif last.end == "stopped":
            self.screen.note(f"stopped after {last.tokens} tokens")
        elif not self.chat.messages[-1]["content"]:
            self.screen.note("an empty response")

    # -------------------------------------------------------------- commands

    def _command(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        argument = argument.strip()
        if name in generation_config.SETTINGS:
            self._set(name, argument)
        elif name in COMMANDS:
            COMMANDS[name](self, argument)
        else:
            self.screen.note(f"/{name} is unknown; /help lists the commands")

    def _set(self, name: str, argument: str) -> None:
        """Changes a setting of the sampler, or prints all of them."""
        if argument:
            kind = generation_config.SETTINGS[name]
            try:
                value = kind(argument)
            except ValueError:
                number = "an integer" if kind is int else "a number"
                raise ConfigError(f"{name}={argument}: expected {number}") from None
            self.chat.set_sampling(**{name: value})
        self.screen.note(shown_settings(self.chat.sampling))

    def stop(self, text: str) -> None:
        """Sets the text that ends a response; in it `\\n` stands for a line break."""
        if text:
            ends = () if text == "-" else (text.replace("\\n", "\n"),)
            self.chat.set_sampling(stop=ends)
        self.screen.note(shown_settings(self.chat.sampling))

    def json(self, file: str) -> None:
        """Makes responses JSON that fits a schema, or any JSON object without a file."""
        if file == "-":
            self.chat.set_form(None)
            self.screen.note("responses are any text")
            return
        schema = json_text.read(paths.path(file)) if file else ANY_OBJECT.value
        self.chat.set_form(Form("json", schema))
        self.screen.note("responses are JSON; /json - allows any text again")

    def system(self, text: str) -> None:
        if text:
            self.chat.set_system("" if text == "-" else text)
        self.screen.note(f"system message: {self.chat.system or 'none'}")

    def retry(self, _: str) -> None:
        before = self.chat.messages[-1:]
        text = self.chat.undo()
        if not text:
            self.screen.note("there is no message yet")
            return
        self._respond(text)
        if self.chat.messages[-1:] == before:
            self.screen.note(
                "the same response again: a higher temperature or top_p varies it"
            )

    def undo(self, _: str) -> None:
        text = self.chat.undo()
        self.screen.note(f"forgot: {text}" if text else "there is no message yet")

    def reset(self, _: str) -> None:
        self.chat.reset()
        self.screen.note("a new conversation")

    def tokens(self, _: str) -> None:
        if not self.chat.messages:
            self.screen.note("there is no message yet")
            return
        self.screen.tokens(self.chat)
        last, context = self.chat.last, self.chat.context
        used = len(self.chat.prompt().ids)
        self.screen.note(f"{used} tokens of a context of {context}")
        if last.seconds > 0:
            rate = (last.tokens - 2) / last.seconds
            self.screen.note(
                f"last response: {last.tokens} tokens, {rate:.1f} per second"
            )

    def help(self, _: str) -> None:
        for line in HELP.splitlines():
            self.screen.note(line)


HELP = '''\
/system TEXT: sets the system message; /system - removes it
/temperature X, /top_p X, /top_k N, /min_p X, /repetition_penalty X, /max_new_tokens N: settings
of the sampler
/stop TEXT: ends responses before this text, \\n is a line break; /stop - removes it
/json FILE: makes responses JSON that fits the schema in FILE; /json any object; /json - any text
/retry: another response to the last message
/undo: forgets the last message and its response
/tokens: the conversation as the model sees it, and the tokens per second
/reset: a new conversation
/quit or Ctrl-D: ends the program
Ctrl-C: stops the response; at the prompt, ends the program
""" before and after a message of several lines'''
COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "stop": Session.stop,
    "json": Session.json,
    "system": Session.system,
    "retry": Session.retry,
    "undo": Session.undo,
    "tokens": Session.tokens,
    "reset": Session.reset,
    "help": Session.help,
}


class Worker:
    """Runs a generator in a thread.

    Ctrl-C raises KeyboardInterrupt in the main thread, which only waits, so that it takes effect at
    once and never in the middle of jax.
    """

    def __init__(self, pieces: Iterator[str]):
        self._pieces: Any = pieces
        self._queue: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        end = None
        try:
            for piece in self._pieces:
                self._queue.put(piece)
                if self._is_stopped.is_set():
                    break
            self._pieces.close()
        except Exception as error:  # raised in the other thread
            end = error
        self._queue.put(end)

    def __iter__(self) -> Iterator[str]:
        while isinstance(item := self._queue.get(), str):
            yield item
        if item is not None:
            raise item

    def stop(self, seconds: float | None = None) -> bool:
        """Stops the generator after its next piece; returns whether it has stopped by then."""
        self._is_stopped.set()
        self._thread.join(seconds)
        return not self._thread.is_alive()
