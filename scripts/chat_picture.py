#!/usr/bin/env python3
"""Draws docs/pictures/chat.png: the page of a running device, such as one of `make demo`; needs Chromium.

usage: chat_picture.py [URL]
"""

import sys
from pathlib import Path

from tests.support.chromium import Chromium

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "pictures" / "chat.png"
QUESTION = "Why is the sky blue?"


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8321/"
    with Chromium() as browser:
        tab = browser.tab(width=1280, height=800)
        tab.goto(url)
        tab.evaluate("document.getElementById('question').focus()")
        tab.call("Input.insertText", text=QUESTION)
        tab.evaluate("document.getElementById('ask').requestSubmit()")
        tab.until("document.querySelectorAll('#messages [title]').length && document.getElementById('stop').disabled")
        tab.screenshot(PICTURE)


if __name__ == "__main__":
    main()
