"""Updates that a device pulls: download, verification, installation, self-test and rollback."""
