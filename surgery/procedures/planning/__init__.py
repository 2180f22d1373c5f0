"""Planning: what a merge would do to each weight, and all that stands against it."""
