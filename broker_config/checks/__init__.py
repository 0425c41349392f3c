"""Checks of rendered broker files, on a throw-away broker and with certificates of its own."""
