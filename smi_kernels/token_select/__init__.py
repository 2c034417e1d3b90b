"""Which tokens go on: rank, cut, compact."""
