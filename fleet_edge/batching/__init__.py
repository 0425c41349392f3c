"""Which sessions a step verifies together, for how long it waits for more, and the decision on their drafts."""
