"""Expert MLPs of other CPU libraries, each in a process of its own, over the same weights."""
