"""Exactness proof: texts that devices write through a real mosquitto follow the target's distribution."""
