"""TLS of a link: its files, what is demanded of the broker, and the stream over a socket."""
