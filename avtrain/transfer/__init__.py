"""Transfer: tasks, protocols, and what comes out of them."""
