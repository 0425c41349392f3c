"""Records: what the edge writes to the session log.

Every record is applied as a merge that neither order nor repetition can disturb (see `merge`): a counter is
absolute, a state carries its time, a round has its key. So a record can be spooled and replayed freely.
"""
