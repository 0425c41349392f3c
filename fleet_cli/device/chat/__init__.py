"""`fleet device chat`: a conversation on the terminal."""

from fleet_cli.device.chat.command import chat_command

__all__ = ["chat_command"]
