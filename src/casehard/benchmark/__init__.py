"""Turn a plan file into a matrix of runs, and the runs into records a sceptic can rebuild."""
