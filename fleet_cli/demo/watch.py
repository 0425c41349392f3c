"""Progress of the demo: a line for each device, and the texts as they grow."""

import time
from dataclasses import dataclass, field
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fleet_common.logs import Event
from schemas.printable import printable

_TAIL_CHARACTERS = 320
_BAR_WIDTH = 16


@dataclass(slots=True)
class _Seen:
    """What is known of a device so far."""

    prompt: str
    tokens: int = 0
    text: str = ""
    started: float | None = None
    state: str = "starting"

    @property
    def tokens_per_s(self) -> float:
        elapsed = time.monotonic() - self.started if self.started else 0.0
        return self.tokens / elapsed if elapsed > 0 else 0.0


@dataclass(slots=True)
class Watch:
    """Live progress on a terminal, plain lines elsewhere. Use it as a context manager.

    Attributes:
        console: Where to.
        max_new_tokens: Of every device.
        show_text: Whether to stream the texts.
    """

    console: Console
    max_new_tokens: int
    show_text: bool
    _devices: dict[str, _Seen] = field(default_factory=dict)
    _live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(self._draw(), console=self.console, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def add(self, device: str, prompt: str) -> None:
        self._devices[device] = _Seen(prompt)

    def event(self, device: str, fields: dict[str, Any] | None) -> None:
        """Take an event of a device."""
        seen = self._devices[device]
        before = seen.state
        match fields:
            case {"event": Event.START}:
                seen.started, seen.state = time.monotonic(), "writing"
            case {"event": Event.TOKENS, "number": number, "text": text}:
                seen.tokens += number
                seen.text += text
            case {"event": Event.END, "finish": finish}:
                seen.state = finish
            case None if seen.state in ("starting", "writing"):
                seen.state = "failed"
        if self._live is not None:
            self._live.update(self._draw())
        elif seen.state != before:
            self.console.print(f"{device}: {seen.state}, {seen.tokens} tokens", markup=False, highlight=False)

    def _draw(self) -> RenderableType:
        # What is left of the terminal's width goes to the prompt, and not the other way round.
        table = Table(box=None, pad_edge=False, expand=True)
        for heading in ("device", "", "tokens", "tokens/s", ""):
            table.add_column(heading, justify="right" if heading.startswith("tokens") else "left", no_wrap=True)
        table.add_column("prompt", ratio=1, no_wrap=True, overflow="ellipsis")
        for device, seen in self._devices.items():
            bar = ProgressBar(total=self.max_new_tokens, completed=seen.tokens, width=_BAR_WIDTH)
            prompt = Text(seen.prompt, overflow="ellipsis", no_wrap=True, style="dim")
            table.add_row(device, bar, str(seen.tokens), f"{seen.tokens_per_s:.1f}", seen.state, prompt)
        if not self.show_text:
            return table
        panels = [
            Panel(Text(printable(seen.text[-_TAIL_CHARACTERS:])), title=device, title_align="left")
            for device, seen in self._devices.items()
        ]
        return Group(table, *panels)
