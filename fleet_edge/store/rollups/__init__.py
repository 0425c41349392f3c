"""Rollups: what segments came to in each hour, day and month, which outlives them and is quick to add up.

A writer marks the hours of which it writes segments as *stale*; `rolling` makes those anew, and `cover` tells of which
rows a period is to be added up: months, days and hours as far as they hold, and segments for stale hours and for parts
of an hour. So totals are at any time what the segments came to.
"""
