"""What a method costs on a cluster, before anything is rented."""
