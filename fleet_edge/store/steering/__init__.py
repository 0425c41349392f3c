"""What an administrator has decided of devices: labels, wanted settings, commands, and the audit log of all changes."""
