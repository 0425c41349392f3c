"""MQTT client of a device: drives sessions over a link, with timeouts, retries and cancellation."""
