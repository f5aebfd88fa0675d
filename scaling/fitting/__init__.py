"""Laws to tables: objectives, two independent solvers, certificates."""
