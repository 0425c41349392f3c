import io

import pytest
from rich.console import Console

from fleet_cli.demo import DemoProgress
from fleet_common.logs import Event

LONG = "Write a short story about a lighthouse keeper who finds a message in a bottle that he once sent himself."


@pytest.mark.parametrize("width", [72, 80, 120])
def test_however_narrow_the_terminal_the_figures_are_there_and_the_prompt_gives_way(width: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, color_system=None)
    watch = DemoProgress(console, 96, show_text=False)
    watch.add("device-1", LONG)
    watch.event("device-1", {"event": Event.START})
    watch.event("device-1", {"event": Event.TOKENS, "number": 48, "text": "Once"})
    console.print(watch._draw())
    heading, row = screen.getvalue().rstrip().splitlines()[-2:]
    assert ("device" in heading, "tokens/s" in heading, "prompt" in heading) == (True, True, True)
    assert ("device-1" in row, " 48 " in row, "generating" in row, "Write" in row) == (True, True, True, True)
    assert max(len(heading), len(row)) <= width
