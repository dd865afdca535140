"""`make bench`: throughtime's layers against their peers, each answer checked before it is timed."""
