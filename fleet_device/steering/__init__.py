"""Steering of a device from afar: settings that an administrator wants it to have, and commands."""
