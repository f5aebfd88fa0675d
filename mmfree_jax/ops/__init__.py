"""The operations of the models, each defined as in its paper; `ops.fast` computes the same functions faster."""
