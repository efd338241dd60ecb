"""A page and a server that draw with one saved student: requests -> bounded queue -> batches -> images."""
