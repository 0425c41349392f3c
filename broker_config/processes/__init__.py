"""Processes: throw-away brokers, started on a loopback port and gone afterwards."""
