"""Status page of a device, at `/` of its local API, and the JSON beneath it."""
