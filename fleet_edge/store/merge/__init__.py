"""Merges records into rows, in a way that neither order nor repetition can disturb.

Each record first makes sure that the rows it belongs to exist, widening their times (least, greatest), and
then says what it knows: a counter becomes the greater of two, a state, an end or a fence yields only to a later one,
a description only to an earlier segment's, a round is never rewritten. All of these commute and are idempotent, so a
batch may be grouped by kind and replayed at will.

A session's rows belong to one device, which is part of their key: no record of another device reaches them. A device's
Close ends its session for good: a device does not go on with what it has closed, and the clocks of edges, by which
segments are ordered, may differ or jump. A Close of a session that its edge did not serve makes no session: it waits in
`reported_closes`, and is applied whenever rows of that device's session change. So what was granted ends as the device
says, in whichever order the two are told, and what was not granted leaves no session behind.
"""
