"""One step of a published model, traced without weights and without a GPU: what it launches, moves and multiplies."""
