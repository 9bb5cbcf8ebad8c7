"""The line editor of the chat: history, multi-line input, and keys that never lose the session by accident."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from edge_spec.cli.status import remark


class LinePrompt:
    """Reads messages from the terminal.

    Enter sends, Alt-Enter or a backslash at the end starts a new line, Ctrl-C clears the message.
    """

    def __init__(self, history_path: Path) -> None:
        self._session: PromptSession[str] = PromptSession(
            "> ",
            history=_open_history(history_path),
            key_bindings=_key_bindings(),
            multiline=True,
            prompt_continuation=_continuation,
        )

    def __iter__(self) -> Iterator[str]:
        """The messages until Ctrl-D."""
        while True:
            try:
                yield self._session.prompt()
            except KeyboardInterrupt:
                remark("Ctrl-D or /quit leaves")
            except EOFError:
                return


def _continuation(_width: int, _line: int, num_wraps: int) -> str:
    """What stands before a further line: a dot where the user began one, space where a long line goes on."""
    return "  " if num_wraps else ". "


@contextmanager
def echo_off() -> Iterator[None]:
    """Keys pressed within the block do not show between the words of an answer; the next prompt takes them up."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    quiet = termios.tcgetattr(keyboard)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(keyboard, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _open_history(path: Path) -> History:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.chmod(0o600)  # Prompts are private, and an older file may not be.
    except OSError as exc:
        remark(f"note: the history of this session is not kept: {exc}")
        return InMemoryHistory()
    return _ForgivingHistory(str(path))


class _ForgivingHistory(FileHistory):
    """A file that cannot be written any more (a full disk, say) costs the history, not the chat."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def _key_bindings() -> KeyBindings:
    keys = KeyBindings()
    editing = has_focus(DEFAULT_BUFFER)  # Else Enter in a history search would send.

    @keys.add("enter", filter=editing)
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=editing)
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=editing)
    @keys.add("<sigint>")
    def _clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys
